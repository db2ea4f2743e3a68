"""From a base and a fine-tune to an adapter's folder: plan, factorise matrix by matrix, write, add it to the base again and compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adapters.check import Compared, compare, table
from adapters.files import ADAPTER_WEIGHTS, config_of, pieces_of, tensors_of
from adapters.low_rank import LoraChoice, factorise
from adapters.targets import Target, find_targets
from alignment.align import align
from alignment.layout import Layout
from alignment.stored import check_plain
from checkpoints.adapters import AdaptedWeights, read_adapter_config
from checkpoints.errors import AlreadyComplete, ArgumentError, InputError
from checkpoints.escaping import markdown_code
from checkpoints.files import in_utf8
from checkpoints.location import ModelName, parse_model
from checkpoints.model import Model, close_all, open_and_plan, tie_of
from checkpoints.placements import Placement
from checkpoints.problems import Problems
from checkpoints.provenance import describe_input, model_card, versions, write_recipe
from checkpoints.reader import ADAPTER_CONFIG, ADAPTER_FILES, open_checkpoint, same_values
from checkpoints.safetensors_format import pack_tensors, unpack_tensors
from checkpoints.save_path import RECIPE_FILE, check_save_path, check_space
from checkpoints.settings import Show, as_flag, as_in_python, setting, show_settings, shown
from checkpoints.side_names import TOKENIZER_FILES
from checkpoints.source import TensorInfo, TensorRef
from checkpoints.staging import Stage, refuse_if_written, staged
from checkpoints.tensor_names import kind_of, list_kinds
from checkpoints.writer import DIGEST_KEYS, chunked_digest
from streaming.console import Console
from streaming.kept import content_of, keep
from streaming.stream import all_finite

CARD_FILE = "README.md"
OF_THIS_BASE = "Give the base that the model was fine-tuned from."


@dataclass(frozen=True)
class ExtractOptions:
    """How an extraction goes; no number of the adapter depends on it.

    Attributes:
        device: where matrices are factorised.
        overwrite: replace an earlier result.
        resume: go on with what an interrupted run left.
        trust_remote_code: let Python files of a checkpoint run.
        quiet: no progress bars.
        command: what the card shows.
    """

    device: torch.device = torch.device("cpu")
    overwrite: bool = False
    resume: bool = True
    trust_remote_code: bool = False
    quiet: bool = False
    command: Sequence[str] | None = None


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        save_path: the adapter's folder.
        report: per kind of tensor what was kept and what was lost, as merge_recipe.json has it.
        warnings: what a user should look at.
        was_complete: an earlier run had written this very adapter.
        message: says so, for people.
    """

    save_path: Path
    report: dict[str, Any]
    warnings: list[str]
    was_complete: bool = False
    message: str = ""


@dataclass
class Extraction:
    """A planned extraction.

    Attributes:
        base, inputs: the opened base; every opened model, it first.
        made: what the adapter makes of the base, for people.
        refs: base's name -> its tensor and the changed one, of one shape.
        targets: what becomes of each of them.
        identity: what decides the adapter's bytes beside the options' device.
        tokenizer: the folder whose tokenizer files come along; None where the base's do.
    """

    base: Model
    inputs: Sequence[Model]
    made: str
    refs: Mapping[str, tuple[TensorRef, TensorRef]]
    targets: Sequence[Target]
    choice: LoraChoice
    save_path: Path
    options: ExtractOptions
    recipe: Mapping[str, Any]
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)
    complete: str = ""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the adapter's bytes."""
        return {
            "lora": self.choice.as_json(),
            "recipe": dict(self.recipe),
            "inputs": [describe_input(model, "outputs") for model in self.inputs],
            "device": self.options.device.type,
            "versions": versions(),
        }

    def of(self, how: str) -> list[Target]:
        """The tensors that become factors, whole tensors, or nothing."""
        return [target for target in self.targets if target.how == how]

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        kinds: dict[str, dict[str, int]] = {}
        for target in self.targets:
            of_kind = kinds.setdefault(kind_of(target.name), {})
            of_kind[target.how] = of_kind.get(target.how, 0) + 1
        return {
            "refusals": [],
            "base_model": self.base.label,
            "lora": self.choice.as_json(),
            "kinds": kinds,
            "bytes_to_read": self.bytes_to_read,
            "notes": self.notes,
        }

    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""
        lines = [f"an adapter of {self.made} on {self.base.label}: {self.choice.as_text()}"]
        for how, verb in (("factors", "factors"), ("whole", "stored whole, where changed"), ("lost", "not stored")):
            found: dict[tuple[str, str], int] = {}
            for target in self.of(how):
                key = (kind_of(target.name), target.why)
                found[key] = found.get(key, 0) + 1
            lines += [
                f"  {n:5d} x {kind}: {verb}{f' ({show_settings(why, show)})' if why else ''}"
                for (kind, why), n in found.items()
            ]
        lines += [f"note: {shown(note, show)}" for note in self.notes]
        return "\n".join([*lines, f"reads {self.bytes_to_read:,} bytes twice. Nothing was written."])

    @property
    def bytes_to_read(self) -> int:
        """Bytes of both models' tensors, each counted once."""
        return sum(ref.info.nbytes for pair in self.refs.values() for ref in pair)

    def close(self) -> None:
        """Close the inputs."""
        close_all(self.inputs)

    def run(self, console: Console | None = None) -> Extracted:
        """Write the adapter; the inputs are closed at the end.

        Raises: InputError: nothing differs from the base, a number is not finite, an input changes under the run, the disk
            fails, Ctrl-C.
        """
        console = console or Console()
        try:
            if not self.complete:
                for note in self.notes:
                    console.note(f"note: {shown(note, console.show)}")
                try:
                    return self._run(console)
                except AlreadyComplete as done:
                    self.complete = str(done)
            recorded = json.loads((self.save_path / RECIPE_FILE).read_bytes())
            return Extracted(self.save_path, recorded["report"], recorded["warnings"], True, self.complete)
        finally:
            self.close()

    def _run(self, console: Console) -> Extracted:
        kept = tokenizer_files(self.tokenizer)
        names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD_FILE, RECIPE_FILE, *kept]
        with staged(
            self.save_path,
            overwrite=self.options.overwrite,
            files=names,
            identity=self.identity,
            resume=self.options.resume,
        ) as stage:
            for note in stage.notes:
                console.note(f"note: {shown(note, console.show)}")
            found = self._factorise(stage, console)
            self._write_weights(stage, found)
            for name, content in kept.items():
                stage.work.write(name, content)
            for model in self.inputs:
                model.weights.check_unchanged()
            compared = self._compare(stage, console)
            report = {"kinds": [one.as_json() for one in compared]}
            warnings = self._warnings(compared)
            self._describe(stage, report, warnings, compared)
        console.say(table(compared))
        return Extracted(self.save_path, report, [str(shown(text, console.show)) for text in warnings])

    # ------------------------------------------------------------------------------------------------------ factors

    def _factorise(self, stage: Stage, console: Console) -> dict[str, dict[str, Any]]:
        """Factorise what changed, and keep each matrix's factors beside the output until all are there.

        Returns: name -> the journal's record of it.
        """
        found = {record["matrix"]: record for record in stage.journal.records if self._is_whole(stage, record)}
        todo = [target for target in self.of("factors") if target.name not in found]
        if found:
            console.note(f"going on: {len(found)} of {len(self.of('factors'))} matrices are there")
        total = sum(self.refs[target.name][1].info.nbytes for target in todo)
        with console.bar("factorising", total, "B") as advance:
            for number, target in enumerate(todo, len(stage.journal.records)):
                before, after = self.refs[target.name]
                tensors, record = self._factors_of(target, before, after)
                file = f"factors-{number}.safetensors"
                keep(stage, file, pack_tensors(tensors, {}), {"matrix": target.name, **record})
                found[target.name] = stage.journal.records[-1]
                advance(after.info.nbytes)
        return found

    def _factors_of(
        self, target: Target, before: TensorRef, after: TensorRef
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The factors of one matrix, none where it is the base's, and what the journal says of them."""
        change, norm = _difference(before, after, self.options.device)
        if not bool(change.any()):
            return {}, {"rank": 0, "energy": 1.0}
        factors = factorise(change.T if target.turned else change, self.choice, norm)
        if self.choice.is_exact and factors.rank * sum(change.shape) >= change.numel():
            raise InputError(
                f"{target.name}: expected a change of low rank, got rank {factors.rank} in a matrix of {' x '.join(map(str, change.shape))}. Methods that drop "
                "elements or elect signs change all directions, and the ranks of adapters add up: write a checkpoint, and take the largest with extract_lora.py."
            )
        made = {"a": factors.a.to(self.choice.dtype), "b": factors.b.to(self.choice.dtype)}
        return made, {"rank": factors.rank, "energy": factors.energy}

    def _is_whole(self, stage: Stage, record: Mapping[str, Any]) -> bool:
        return (
            record.get("matrix") in self.refs and content_of(stage.state, record, str(record.get("file"))) is not None
        )

    # -------------------------------------------------------------------------------------------------------- files

    def _write_weights(self, stage: Stage, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the adapter's own two files. Raises InputError: it would be empty."""
        ranks = {name: int(record["rank"]) for name, record in found.items() if record["rank"]}
        changed = [target for target in self.of("whole") if not same_values(*self.refs[target.name])]
        kept = {target.module for target in changed if not target.as_bias}
        # A module that is stored whole has all of its tensors in the adapter.
        whole = [target for target in self.of("whole") if target in changed or target.module in kept]
        if not ranks and not whole:
            lost = [target.name for target in self.of("lost") if not same_values(*self.refs[target.name])]
            more = (
                f"only {list_kinds(lost)} differ, and no plain adapter holds them but as {setting('modules_to_save', 'all')}"
                if lost
                else "it equals its base"
            )
            raise InputError(f"{self.made}: expected changed matrices, got none: {more}. There is nothing to extract.")
        # peft keeps a tie only where both of its ends are in the adapter.
        tie = tie_of(self.base) if whole else None
        tied = [Target(one.name, tie.head, "whole") for one in whole if tie is not None and one.name == tie.embedding]
        whole += tied
        factors = [target for target in self.of("factors") if target.name in ranks]
        infos = tensors_of(factors, whole, {name: self.refs[name][1].info for name in self.refs}, ranks, self.choice)

        def read(name: str) -> dict[str, torch.Tensor]:
            content = content_of(stage.state, found[name], str(found[name]["file"]))
            if content is None:
                raise InputError(f"{stage.state / str(found[name]['file'])}: was changed. Run the same command again.")
            return unpack_tensors(content, str(found[name]["file"]))[0]

        pieces = pieces_of(infos, read, {target.name: self.refs[target.name][1] for target in whole})
        stage.work.replace(ADAPTER_WEIGHTS, pieces)
        modules = {target.module for target in (*self.targets, *tied)}
        config = config_of(
            factors, whole, ranks,
            base=self.base, modules=modules, keeps_ties=bool(tied),
        )  # fmt: skip
        stage.work.write(ADAPTER_CONFIG, in_utf8(json.dumps(config, indent=2) + "\n"))

    def _describe(
        self, stage: Stage, report: Mapping[str, Any], warnings: Sequence[str], compared: Sequence[Compared]
    ) -> None:
        card = f"A LoRA adapter that makes {markdown_code(self.made)} of {markdown_code(self.base.label)}, to these errors:\n\n```text\n{table(compared)}\n```"
        text = model_card(
            title=self.save_path.resolve().name, models=self.inputs, text=card,
            command=self.options.command, library="peft", tag="lora",
        )  # fmt: skip
        stage.work.write(CARD_FILE, in_utf8(text))
        weights = stage.folder / ADAPTER_WEIGHTS
        entry = {"bytes": weights.stat().st_size, DIGEST_KEYS["blake3"]: chunked_digest(weights, "blake3")}
        recipe = {
            "base_model": self.base.label,
            **self.recipe,
            "lora": self.choice.as_json(),
            "outputs": {ADAPTER_WEIGHTS: entry},
            "notes": shown(self.notes, as_flag),
            "warnings": shown(list(warnings), as_flag),
            "report": report,
            "inputs": self.identity["inputs"],
            "versions": self.identity["versions"],
            "command": list(self.options.command) if self.options.command else None,
            "identity": stage.identity,
        }
        write_recipe(stage.work, recipe)

    # ------------------------------------------------------------------------------------------------------- check

    def _compare(self, stage: Stage, console: Console) -> list[Compared]:
        """Add what was written to the base again, and compare with what it was made of."""
        label = str(self.save_path)
        adapter = open_checkpoint(stage.folder, label, ADAPTER_FILES)
        try:
            config = read_adapter_config(stage.folder, label)
            base = self.base
            adapted = AdaptedWeights(base.weights, adapter, label, config, base.find_same, lambda: tie_of(base))
            hows = {target.name: target for target in self.targets}
            total = sum(after.info.nbytes for _, after in self.refs.values())
            with console.bar("comparing", total, "B") as advance:
                return compare(self.refs, adapted, hows, advance)
        finally:
            adapter.close()

    @staticmethod
    def _warnings(compared: Sequence[Compared]) -> list[str]:
        """That changes were lost, and what keeps them."""
        lost = [one for one in compared if one.how == "lost" and one.changed]
        problems = Problems()
        for why, wanted in ((True, "can be kept"), (False, "cannot be kept")):
            kinds = [f"{one.kind} ({one.change_of_weights:.1%})" for one in lost if one.can_be_whole == why]
            more = (
                f": {setting('modules_to_save', 'all')} stores them whole"
                if why
                else ", as no plain adapter changes them"
            )
            if kinds:
                problems.warn(f"changed, and not in the adapter: {', '.join(kinds)}. They {wanted}{more}.")
        return problems.warnings


def _difference(before: TensorRef, after: TensorRef, device: torch.device) -> tuple[torch.Tensor, float]:
    """Changed minus base, `[rows, columns]` float32, and the norm of the changed. Raises InputError: a NaN or an infinity."""
    numbers = []
    for ref in (after, before):
        raw = ref.read(0, ref.info.numel, torch.empty(ref.info.numel * 8, dtype=torch.uint8))
        numbers.append(raw.to(device=device, dtype=torch.float32, copy=True).view(ref.info.shape))
        if not all_finite(numbers[-1]):
            raise InputError(
                f"{ref.source.label}: {ref.name}: expected finite numbers, got NaN or infinity. The checkpoint is damaged; use another one."
            )
    norm = float(torch.linalg.vector_norm(numbers[0], dtype=torch.float64))
    return numbers[0].sub_(numbers[1]), norm


def tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    """The tokenizer files of a folder, its chat template among them; code is left out."""
    files = [] if folder is None else sorted(path for path in folder.iterdir() if path.is_file())
    return {
        path.name: path.read_bytes()
        for path in files
        if path.suffix != ".py" and any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)
    }


# ------------------------------------------------------------------------------------------------------------ planning


def plan_extraction(
    base: Model,
    tuned: Model,
    choice: LoraChoice,
    save_path: Path,
    options: ExtractOptions,
) -> Extraction:
    """Plan an extraction from opened models; nothing is written. Raises Refusals: everything that does not fit."""
    problems = Problems()
    for model in (base, tuned):
        problems.extend(check_plain(model))
    problems.raise_if_any()
    alignment = align(base, [tuned], Layout("base"), advice=OF_THIS_BASE)
    problems.take(alignment.problems)
    if base.folders == tuned.folders:
        problems.add(InputError(f"{tuned.label}: is the base itself. There is nothing to extract."))
    changed = alignment.models[1].tensors
    refs = {
        name: (alignment.first.tensors[name], changed[name])
        for name, dtype in alignment.dtypes.items()
        if dtype.is_floating_point and name in changed and name in alignment.first.tensors
    }
    tokenizer = _tokenizer_of(base, tuned, refs, problems)
    return make_extraction(
        base, [base, tuned], tuned.label, refs, choice, save_path, options,
        recipe={"tuned_model": tuned.label}, tokenizer=tokenizer, problems=problems,
    )  # fmt: skip


def make_extraction(
    base: Model,
    inputs: Sequence[Model],
    made: str,
    refs: Mapping[str, tuple[TensorRef, TensorRef]],
    choice: LoraChoice,
    save_path: Path,
    options: ExtractOptions,
    *,
    recipe: Mapping[str, Any],
    tokenizer: Path | None,
    problems: Problems,
) -> Extraction:
    """Say what becomes of each tensor, and check that the output can be written.

    Args:
        base, inputs, made, refs, recipe, tokenizer: see `Extraction`.
        problems: what was found so far, and the notes.

    Raises: Refusals: they, and what else does not fit.
    """
    infos: dict[str, TensorInfo] = {name: before.info for name, (before, _) in refs.items()}
    targets: list[Target] = []
    with problems.collect():
        targets = find_targets(infos, _placements(base), choice.save_whole)
        if not any(target.how == "factors" for target in targets):
            problems.add(InputError(f"{base.label}: expected matrices that an adapter can change, got none."))
    extraction = Extraction(
        base, inputs, made, refs, targets, choice, save_path, options, recipe, tokenizer, problems.notes
    )
    if not problems and not options.overwrite and all(model.weights.is_here for model in inputs):
        try:
            refuse_if_written(save_path, [""], extraction.identity)
        except AlreadyComplete as done:
            extraction.complete = str(done)
            return extraction
    folders = [folder for model in inputs for folder in model.folders]
    problems.extend(check_save_path(save_path, folders, overwrite=options.overwrite))
    problems.raise_if_any()
    problems.extend(check_space(save_path, 2 * _most_bytes(extraction)))
    problems.raise_if_any()
    return extraction


def _placements(base: Model) -> dict[str, Placement]:
    return dict(base.architecture.placements)


def _most_bytes(extraction: Extraction) -> int:
    """Bytes of the adapter at most, factors beside it not counted."""
    total = 0
    for target in extraction.targets:
        info = extraction.refs[target.name][1].info
        if target.how == "whole":
            total += info.nbytes
        elif target.how == "factors":
            rank = min(extraction.choice.rank or min(info.shape), *info.shape)
            total += rank * sum(info.shape) * extraction.choice.dtype.itemsize
    return total


def _tokenizer_of(
    base: Model, tuned: Model, refs: Mapping[str, tuple[TensorRef, TensorRef]], problems: Problems
) -> Path | None:
    """The folder of the fine-tune's tokenizer, where its files are not the base's and the base has a row for each of its tokens."""
    if tokenizer_files(tuned.tokenizer_folder) in ({}, tokenizer_files(base.tokenizer_folder)):
        return None
    embedding = base.architecture.stored_name(base.architecture.input_embedding or "")
    rows = refs[embedding][0].info.shape[0] if embedding in refs else 0
    vocabulary = tuned.vocabulary
    if vocabulary is None or vocabulary.size > rows:
        problems.note(
            f"{tuned.label}: has tokens that {base.label} has no rows for; the adapter has neither them nor its tokenizer."
        )
        return None
    return tuned.tokenizer_folder


def prepare(
    base: str, tuned: str, choice: LoraChoice, save_path: Path, options: ExtractOptions, *, download: bool = True
) -> Extraction:
    """Open two models by name and plan; nothing is written.

    Args:
        base, tuned: folders or names on the hub.
        download: False leaves the weights of hub models where they are (a dry run).

    Raises: Refusals: everything that does not fit.
    """
    problems, names = Problems(), list[ModelName]()
    for name, text in (("base_model", base), ("model", tuned)):
        try:
            names.append(parse_model(text))
        except InputError as error:
            problems.add(ArgumentError(f"{setting(name)}: {error.marked}"))
    problems.raise_if_any()

    def plan(opened: list[Model]) -> Extraction:
        return plan_extraction(opened[0], opened[1], choice, save_path, options)

    return open_and_plan(
        names, plan, download=download, quiet=options.quiet, trust_remote_code=options.trust_remote_code
    )


def extract_lora(
    base: str,
    tuned: str,
    save_path: Path | str,
    choice: LoraChoice | None = None,
    options: ExtractOptions | None = None,
) -> Extracted:
    """Make an adapter of what a fine-tune adds to its base.

    Args:
        base, tuned: folders or names on the hub.
        save_path: the adapter's folder to be; it appears complete or not at all.
        choice: ranks, what is stored whole, dtype.
        options: how to run.

    Returns: what was kept and what was lost; `was_complete` where the folder holds this very adapter already.

    Raises: InputError: anything does not fit; nothing is left behind.
    """
    return prepare(base, tuned, choice or LoraChoice(), Path(save_path), options or ExtractOptions()).run()
