"""A folder in which experts are trained and merges are scored, each once: what is finished stays, so an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import merge
from checkpoints.errors import ArgumentError
from examples.miniature import run_command
from examples.real import base
from examples.real.domains import Split
from examples.real.rules import Rule, Settings
from examples.real.statistics import Losses
from examples.real.texts import Encoded, digest, find_domains, read_encoded, write_domains
from examples.real.train import Recipe, train

MARKER = "real"
"""Name of a file that shows that a folder is ours; it holds what the scores depend on."""
CALIBRATION = Path(__file__).resolve().parent / "calibration.jsonl"
ADAPTERS = Path(__file__).resolve().parent / "adapters"


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
        counts: documents of each domain that are scored, by split.
        seed: of the trainings.
        adapters: take the committed adapters as experts, and train nothing.

    Raises: ArgumentError: the folder holds something else, or scores of other models or texts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base_model: Path | None = None,
        data: Path | None = None,
        chosen: Sequence[str] = (),
        counts: Mapping[Split, int],
        seed: int = 1,
        adapters: bool = False,
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
        self._adapters = adapters
        self.data = data or folder / "data"
        if data is None:
            write_domains(self.data)
        self.domains = find_domains(self.data, chosen)
        self.base = base_model or folder / "base"
        if base_model is None and not self.base.exists():
            base.convert(base.find_model(), self.base)
        self._results = folder / ("quick" if adapters else f"seed_{seed}")
        self._check_identity()
        self._documents: dict[Split, dict[str, list[Encoded]]] = {}

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
        if self._adapters:
            return ADAPTERS / domain
        folder = self._results / "experts" / domain
        if not folder.exists():
            documents = read_encoded(self.data, domain, "train", self._tokenizer())
            train(self.base, documents, folder, Recipe(seed=self._seed), domain)
        return folder

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    # -------------------------------------------------------------------------------------------------------- merges

    def merge_command(self, rule: Rule, settings: Settings, domains: Sequence[str] = ()) -> list[str]:
        """The arguments of merge.py that make a candidate, without where it goes to."""
        models = [str(self.expert(domain)) for domain in domains or self.domains]
        if self._adapters:
            models = [f"{self.base}+{model}" for model in models]
        texts = ",".join(str(self.data / f"{domain}_train.jsonl") for domain in domains or self.domains)
        places = {"statistics": self._statistics(), "texts": texts}
        command = [*rule.command(settings, places), "--base_model", str(self.base)]
        return [*command, "--models_to_merge", ",".join(models), "--dtype", "float32", "--report", "none"]

    def _statistics(self) -> str:
        """Flags that give AIM the base's statistics: kept from an earlier merge, or taken now and kept."""
        kept = self.folder / "activations.safetensors"
        if kept.exists():
            return f"--activations {kept}"
        return f"--calibration_data {CALIBRATION} --n_samples 16 --save_activations {kept}"

    def score_merge(self, rule: Rule, settings: Settings, split: Split) -> Scores:
        """Merge and score a candidate, unless its scores are there. The merge itself is not kept."""
        return self._scored(
            rule.label(settings), split, lambda out: [*self.merge_command(rule, settings), "--save_path", str(out)]
        )

    def score_base(self, split: Split) -> Scores:
        """Score the base."""
        return self._scored("base", split, self.base)

    def score_expert(self, domain: str, split: Split) -> Scores:
        """Score an expert on all domains; an adapter is put on the base first."""
        if not self._adapters:
            return self._scored(f"expert {domain}", split, self.expert(domain))
        rule = Rule("expert", "--method task_arithmetic")
        return self._scored(
            f"expert {domain}", split, lambda out: [*self.merge_command(rule, {}, [domain]), "--save_path", str(out)]
        )

    def is_done(self, label: str, split: Split) -> bool:
        """Whether a model's scores are there."""
        return self._file(label, split).exists()

    def _file(self, label: str, split: Split) -> Path:
        return self._results / "scores" / f"{label.replace(', ', '-').replace(' ', '_')}-{split}.json"

    def _scored(self, label: str, split: Split, model: Any) -> Scores:
        """Scores of a checkpoint, or of the merge whose arguments `model` gives for an output folder."""
        file = self._file(label, split)
        if not file.exists():
            command: list[str] = []
            folder = model
            if callable(model):
                folder = self._results / "merges" / file.stem
                shutil.rmtree(folder, ignore_errors=True)
                command = model(folder)
                run_command(merge.main, [*command, "--quiet"])
            scores = self._score(folder, split)
            if command:
                shutil.rmtree(folder)
            file.parent.mkdir(exist_ok=True)
            content: dict[str, Any] = {
                "model": label,
                "split": split,
                "command": ["merge.py", *command] if command else None,
            }
            content |= {"losses": scores.losses, "exact": scores.exact}
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(content) + "\n")
            partial.replace(file)
        stored = json.loads(file.read_text())
        return Scores(stored["losses"], stored["exact"])

    def _score(self, folder: Path, split: Split) -> Scores:
        import torch
        from transformers import AutoModelForCausalLM

        from examples.real.losses import score

        if split not in self._documents:
            tokenizer = self._tokenizer()
            count = self._counts[split]
            self._documents[split] = {
                one: read_encoded(self.data, one, split, tokenizer, count) for one in self.domains
            }
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = {domain: score(model, documents) for domain, documents in self._documents[split].items()}
        return Scores(
            {domain: [round(one.loss, 6) for one in scores] for domain, scores in found.items()},
            {domain: [one.exact for one in scores] for domain, scores in found.items()},
        )
