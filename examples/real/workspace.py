"""A folder in which experts are trained and merges are scored, each once: what is finished stays, so an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import merge
from checkpoints.errors import ArgumentError
from examples.miniature import run_command
from examples.real import base
from examples.real.domains import Split
from examples.real.rules import Rule, Settings
from examples.real.statistics import Losses
from examples.real.texts import Encoded, digest, file_of, find_domains, read_encoded, write_domains
from examples.real.train import Recipe, train

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "real"
"""Name of a file that shows that a folder is ours; it holds what the scores depend on."""
CALIBRATION = Path(__file__).resolve().parent / "calibration.jsonl"
ADAPTERS = Path(__file__).resolve().parent / "adapters"
EXAMPLES = 5
"""Of each domain in the text of all."""
LINE = 3
"""So many merges that differ in lambda alone are scored on the line between two of them."""


@dataclass(frozen=True)
class Scores:
    """Of one model on one split.

    Attributes:
        losses: nats per answer token, by domain and document.
        exact: whether greedy decoding gives exactly the answer, likewise.
    """

    losses: Losses
    exact: Mapping[str, Sequence[bool]]

    @property
    def exact_share(self) -> float:
        """Mean over domains of the share of exact answers."""
        return sum(sum(values) / len(values) for values in self.exact.values()) / len(self.exact)


class Workspace:
    """Base, texts, experts and scores of one comparison.

    Args:
        folder: made where it is missing.
        base_model: a checkpoint of one's own; None for the one from the package, made in `folder`.
        data: folder of texts; None for our own, made in `folder`.
        chosen: domains, in the order of the models; empty for all that are there.
        pair: those of them that are merged and scored; empty for all.
        counts: documents of each domain that are scored, by split.
        seed: of the trainings.
        longer: how many times as long the trainings are.
        adapters: take the committed adapters as experts, and train nothing.
        device: where models are trained and run: `cpu` or `cuda`.
        workers: threads of a merge; None for one per core.

    Raises: ArgumentError: the folder holds something else, or scores of other models or texts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base_model: Path | None = None,
        data: Path | None = None,
        chosen: Sequence[str] = (),
        pair: Sequence[str] = (),
        counts: Mapping[Split, int],
        seed: int = 1,
        longer: int = 1,
        adapters: bool = False,
        device: str = "cpu",
        workers: int | None = None,
    ):
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if there - {"base"} and not self.is_ours(folder):
            raise ArgumentError(f"--folder {folder}: holds something else. Choose a folder that is empty or not there.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        (folder / ".gitignore").write_text("*\n")
        self.folder = folder
        self._counts = dict(counts)
        self._seed = seed
        self._longer = longer
        self._adapters = adapters
        self._device = device
        self._workers = workers
        self.data = data or folder / "data"
        if data is None:
            write_domains(self.data)
        self.domains = list(pair) or find_domains(self.data, chosen)
        self.base = base_model or folder / "base"
        if base_model is None and not self.base.exists():
            base.convert(base.find_model(), self.base)
        trained = folder / ("quick" if adapters else f"seed_{seed}" if longer == 1 else f"seed_{seed}_times_{longer}")
        self._experts = ADAPTERS if adapters else trained / "experts"
        self._results = trained / "pairs" / "+".join(pair) if pair else trained
        self._check_identity()
        self._write_text_of_all()

    @staticmethod
    def is_ours(folder: Path) -> bool:
        """Whether an earlier run made the folder."""
        return (folder / MARKER).is_file()

    @property
    def results(self) -> Path:
        """Where scores, table and figures are."""
        return self._results

    def _check_identity(self) -> None:
        """Refuse scores of other texts, counts or another base. Raises: ArgumentError."""
        identity = {
            "texts": digest(self.data, self.domains),
            "domains": self.domains,
            "documents": self._counts,
            "base": str(self.base.resolve()),
        }
        file = self._results / "identity.json"
        if file.exists() and json.loads(file.read_text()) != identity:
            raise ArgumentError(
                f"--folder {self.folder}: holds scores of other texts or another base. Choose another folder, or add --fresh."
            )
        self._results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(identity, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------------- experts

    def expert(self, domain: str) -> Path:
        """A domain's expert, trained where it is not there yet."""
        folder = self._experts / domain
        if not folder.exists():
            recipe = Recipe(seed=self._seed, tokens=Recipe.tokens * self._longer)
            train(self.base, self._documents("train", (domain,))[domain], folder, recipe, domain, self._device)
        return folder

    def _documents(self, split: Split, domains: Sequence[str] = ()) -> Mapping[str, Sequence[Encoded]]:
        """The documents of a split, by domain: all for training, else as many as are scored."""
        domains = tuple(domains or self.domains)
        return _read(self.data, self.base, domains, split, None if split == "train" else self._counts[split])

    # -------------------------------------------------------------------------------------------------------- merges

    def merge_command(self, rule: Rule, settings: Settings, domains: Sequence[str] = ()) -> list[str]:
        """The arguments of merge.py that make a candidate, without where it goes to."""
        domains = domains or self.domains
        models = [str(self.expert(domain)) for domain in domains]
        if self._adapters:
            models = [f"{self.base}+{model}" for model in models]
        texts = [str(file_of(self.data, domain, "train")) for domain in domains]
        places = {
            "statistics": self._statistics(),
            "texts": ",".join(texts),
            "other_texts": ",".join([*texts[1:], *texts[:1]]),
            "all_texts": str(self._text_of_all),
        }
        command = [*rule.command(settings, places), "--base_model", str(self.base)]
        command += ["--models_to_merge", ",".join(models), "--dtype", "float32", "--report", "none"]
        return [*command, "--device", self._device if rule.on_device else "cpu"]

    @property
    def _text_of_all(self) -> Path:
        return self._results / "all.jsonl"

    def _write_text_of_all(self) -> None:
        """A few documents of each domain's train split, one of each in turn."""
        files = [file_of(self.data, domain, "train").read_text(encoding="utf-8").split("\n") for domain in self.domains]
        lines = [line for row in zip(*(lines[:EXAMPLES] for lines in files), strict=True) for line in row]
        self._text_of_all.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _statistics(self) -> str:
        """Flags that give AIM the base's statistics: kept from an earlier merge, or taken now and kept."""
        if self.activations.exists():
            return f"--activations {self.activations}"
        return f"--calibration_data {CALIBRATION} --n_samples 16 --save_activations {self.activations}"

    @property
    def activations(self) -> Path:
        """The base's statistics, once they are taken."""
        return self.folder / "activations.safetensors"

    def calibrate(self) -> None:
        """Take the base's statistics, where they are not there yet: several merges at once would all take them."""
        if not self.activations.exists():
            rule = Rule("calibration", "--method task_arithmetic --omega 0 {statistics}")
            shutil.rmtree(self._merged(rule, {}))

    def _merged(self, rule: Rule, settings: Settings, domains: Sequence[str] = ()) -> Path:
        """Merge; returns where."""
        out = self._results / "merges" / _file_name(rule.label(settings))
        shutil.rmtree(out, ignore_errors=True)
        command = [*self.merge_command(rule, settings, domains), "--save_path", str(out), "--quiet"]
        run_command(merge.main, [*command, *(["--workers", str(self._workers)] if self._workers else [])])
        return out

    # -------------------------------------------------------------------------------------------------------- scores

    def score_merge(self, rule: Rule, settings: Settings, *splits: Split) -> None:
        """Merge and score a candidate on the splits that have no scores of it yet. The merge itself is not kept."""
        label = rule.label(settings)
        missing = [split for split in splits if not self.is_done(label, split)]
        if not missing:
            return
        if rule.prototype:
            self.score_line(rule, [settings], *missing)
            return
        out = self._merged(rule, settings)
        model = self._load(out)
        for split in missing:
            self._keep(label, split, self._score(model, split), self.merge_command(rule, settings))
        shutil.rmtree(out)

    def score_line(self, rule: Rule, line: Sequence[Settings], *splits: Split) -> None:
        """Score candidates that differ in lambda alone, on the splits that have no scores of them yet.

        All that merge.py writes for any lambda lies on the line through what it writes for 0, which is the base for most rules, and for 1. So
        where there are several, those two are merged, and the models between and beyond them are made in memory, in float32.
        """
        line = [settings for settings in line if not all(self.is_done(rule.label(settings), split) for split in splits)]
        if not line:
            return
        if not rule.prototype and (len(line) < LINE or "lambda" not in line[0]):
            for settings in line:
                self.score_merge(rule, settings, *splits)
            return
        model, start, change = self._line(rule, line[0])
        for settings in line:
            _move(model, start, change, settings["lambda"])
            command = None if rule.prototype else self.merge_command(rule, settings)
            for split in splits:
                if not self.is_done(rule.label(settings), split):
                    self._keep(rule.label(settings), split, self._score(model, split), command, on_line=True)

    def _line(self, rule: Rule, settings: Settings) -> tuple[Any, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """A model, its weights at lambda 0, and what they change by at lambda 1."""
        if rule.prototype:
            from examples.real.prototypes import changes

            model = self._load(self.base)
            experts = [self._load(self.expert(domain)) for domain in self.domains]
            texts = [self._documents("train")[domain] for domain in self.domains]
            return model, _weights(model), changes(rule.prototype, model, experts, texts)
        ends = [] if rule.fixed_rest else [self._load(self.base)]
        for value in (0.0, 1.0)[len(ends) :]:
            out = self._merged(rule, {**settings, "lambda": value})
            ends.append(self._load(out))
            shutil.rmtree(out)
        start, one = map(_weights, ends)
        return ends[0], start, {name: one[name] - start[name] for name in start}

    def score_base(self, split: Split) -> None:
        """Score the base."""
        if not self.is_done("base", split):
            self._keep("base", split, self._score(self._load(self.base), split))

    def score_expert(self, domain: str, split: Split) -> None:
        """Score an expert on all domains; an adapter is put on the base first."""
        label = f"expert {domain}"
        if not self.is_done(label, split):
            if self._adapters:
                out = self._merged(Rule(label, "--method task_arithmetic"), {}, [domain])
                self._keep(label, split, self._score(self._load(out), split))
                shutil.rmtree(out)
            else:
                self._keep(label, split, self._score(self._load(self.expert(domain)), split))

    def is_done(self, label: str, split: Split) -> bool:
        """Whether a model's scores are there."""
        return self._file(label, split).exists()

    def scores(self, label: str, split: Split) -> Scores:
        """A model's scores, which are there."""
        stored = json.loads(self._file(label, split).read_text())
        return Scores(stored["losses"], stored["exact"])

    def _file(self, label: str, split: Split) -> Path:
        return self._results / "scores" / f"{_file_name(label)}-{split}.json"

    def _keep(
        self, label: str, split: Split, scores: Scores, command: Sequence[str] | None = None, *, on_line: bool = False
    ) -> None:
        """Write a model's scores, with the command that makes it."""
        content: dict[str, Any] = {"model": label, "split": split, "device": self._device}
        if command is not None:
            content["command"] = ["merge.py", *command, "--save_path", _file_name(label)]
        if on_line:
            content["made"] = "in memory, on the line through lambda 0 and 1"
        content |= {"losses": scores.losses, "exact": scores.exact}
        file = self._file(label, split)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(content) + "\n")
        partial.replace(file)

    def _load(self, folder: Path) -> Any:
        """A checkpoint as a model, in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(self._device).eval()

    def _score(self, model: Any, split: Split) -> Scores:
        from examples.real.losses import score

        found = {domain: score(model, documents) for domain, documents in self._documents(split).items()}
        return Scores(
            {domain: [round(one.loss, 6) for one in scores] for domain, scores in found.items()},
            {domain: [one.exact for one in scores] for domain, scores in found.items()},
        )


def _file_name(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "_")


@cache
def _read(
    data: Path, model: Path, domains: tuple[str, ...], split: Split, count: int | None
) -> Mapping[str, Sequence[Encoded]]:
    """The documents of a split, by domain, in a model's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {domain: read_encoded(data, domain, split, tokenizer, count) for domain in domains}


def _weights(model: Any) -> dict[str, Tensor]:
    """Copies of a model's weights; of those that are tied, one."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _move(model: Any, start: Mapping[str, Tensor], change: Mapping[str, Tensor], share: float) -> None:
    """Give a model the weights `start + share * change`."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(start[name] if name not in change else torch.add(start[name], change[name], alpha=share))
