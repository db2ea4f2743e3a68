"""What both commands do and say about AIM: check, calibrate or load, keep, summarise, draw."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aim.calibrate import (
    calibrate,
    check_block_size,
    check_causal,
    check_complete,
    quiet_transformers,
    read_blocks,
    select,
)
from aim.calibration import Blocks, is_local
from aim.flags import check_files, read_calibration, read_relaxing
from aim.relaxing import Relaxations, check_activations, group_kept, make_relaxations, names_of, outputs_of, why_kept
from aim.statistics import Activations, load_activations
from aim.summary import format_summaries
from aim.targets import Selection
from aim.unfinished import UnfinishedCalibration
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting
from checkpoints.model import Model
from checkpoints.staging import Stage
from checkpoints.tensor_names import kind_of
from checkpoints.writer import chunked_sha256
from streaming.stream import PlannedTensor

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Console:
    """How to speak to the user.

    say: prints a line of the result; note: prints a remark beside it; bar: makes a progress bar from a title and a number of tokens.
    """

    say: Callable[[str], object]
    note: Callable[[str], object]
    bar: Bar


class AimRequest:
    """AIM as the flags ask for it.

    Args:
        arguments: with the flags of `add_aim_flags`, `--seed`, `--device`, `--save_path`, `--dry_run` and `--quiet`.
        device: of the blocks, and of calibration where `--device` named one.

    Raises: Refusals: flags that are wrong or exclude each other, and files that could not be written.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        problems: list[str | InputError] = []
        with collecting(problems):
            self.how = read_relaxing(arguments)
        with collecting(problems):
            self.data, self.calibration = read_calibration(arguments, None if arguments.device == "auto" else device)
        problems += check_files(arguments)
        if problems:
            raise Refusals(problems)
        self._device = device
        self._file = arguments.activations and Path(arguments.activations).expanduser()
        self._keep = arguments.save_activations and Path(arguments.save_activations).expanduser()
        self._figures = arguments.figures and Path(arguments.figures).expanduser()
        self._dry_run, self._quiet = arguments.dry_run, arguments.quiet
        self._loaded: Activations | None = None
        self._blocks: Blocks | None = None

    def check(self, base: Model) -> None:
        """Find everything that is known without running the base, which can take an hour; reads the texts.

        Raises: Refusals: a base that cannot be calibrated, texts or statistics that do not fit, filters that match nothing.
        """
        _ = base.architecture  # without it, nothing else can be looked at
        problems: list[str | InputError] = []
        with collecting(problems):
            selection, _ = select(base, self.how.numerics)
            self._check_filters(selection)
            if self._file:
                self._loaded = self._loaded or load_activations(self._file)
                if base.weights.is_here:
                    check_activations(self._loaded, base, selection, self.how.numerics, self._source)
        for check in () if self._file else (check_causal, check_complete, self._check_texts):
            with collecting(problems), quiet_transformers():
                check(base)
        if problems:
            raise Refusals(problems)

    @property
    def _source(self) -> str:
        return f"--activations {self._file}" if self._file else "the statistics"

    def _check_texts(self, base: Model) -> None:
        check_block_size(base, self.data.block_size)
        if self._blocks is None and (is_local(self.data.source) or not self._dry_run):
            self._blocks = read_blocks(base, self.data, quiet=self._quiet)

    def _check_filters(self, selection: Selection) -> None:
        """Refuse a filter that no tensor is left for: a slip of the pen would otherwise relax with another omega."""
        for omega in self.how.omegas:
            first = Counter(omega.filter_of(name) for name in selection.targets)
            for part, _ in omega.filters:
                if not first[part]:
                    shadowed = any(part in name for name in selection.targets)
                    kinds = ", ".join(sorted({kind_of(name) for name in selection.targets}))
                    raise ArgumentError(
                        f"--omega: the filter '{part}' is "
                        + (
                            "in no name that an earlier filter leaves. Put it first."
                            if shadowed
                            else "in no name of what is relaxed."
                        )
                        + f" Those are: {kinds}."
                    )

    def describe(self, base: Model, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        """What would be done, known without running the base, as JSON.

        Args:
            base: that was checked; tensors: what would be written.
        """
        selection, warnings = select(base, self.how.numerics)
        selection = selection.renamed(names_of(tensors))
        loaded = self._loaded.renamed(names_of(tensors)) if self._loaded else None
        kept = why_kept(selection, outputs_of(tensors), loaded)
        at_1 = [name for name in selection.targets if all(omega.of(name) == 1.0 for omega in self.how.omegas)]
        kept |= {name: "omega 1" for name in at_1 if name not in kept}
        relaxed = [tensor.spec.name for tensor in tensors if tensor.spec.name not in kept]
        described: dict[str, Any] = {
            "omegas": [str(omega) for omega in self.how.omegas],
            "scaling": self.how.scaling,
            "control": self.how.control,
            "numerics": self.how.numerics,
            "statistics": str(self._file or self.data.source),
            "relaxes": dict(Counter(kind_of(name) for name in relaxed)),
            "keeps": [{"tensors": kind, "count": count, "why": why} for (kind, why), count in group_kept(kept).items()],
            "warnings": warnings,
        }
        if self._blocks:
            described["calibration"] = self._blocks.as_json()
        return described

    def identity(self) -> dict[str, Any]:
        """Everything of it that decides the output's bytes, for JSON."""
        if self._file:
            return {**self.how.as_json(), "activations": chunked_sha256(self._file)}
        options = {"dtype": self.calibration.dtype, "batch_size": self.calibration.batch_size}
        path = Path(self.data.source)
        changed = path.stat().st_mtime_ns if is_local(self.data.source) and path.is_file() else None
        return {**self.how.as_json(), "calibration": {**self.data.as_json(), **options, "mtime_ns": changed}}

    def relaxations(self, base: Model, tensors: Sequence[PlannedTensor], console: Console, stage: Stage) -> Relaxations:
        """Statistics and transforms, with a summary for the user.

        Args:
            base: that was checked; tensors: what will be written; stage: where the calibration is kept.

        Raises: InputError: see `calibrate` and `make_relaxations`.
        """
        unfinished = UnfinishedCalibration(stage)
        activations = self._loaded or unfinished.finished() or self._calibrate(base, console, unfinished)
        if self._loaded:
            console.say(f"statistics: {self._file}, taken with {blocks_of(activations)}")
        if self._keep:
            activations.save(self._keep)
            console.say(f"{self._keep}: statistics of {len(activations.statistics)} tensors")
        found = make_relaxations(
            base, activations, self.how,
            device=self._device, outputs=outputs_of(tensors), names=names_of(tensors), source=self._source,
        )  # fmt: skip
        for warning in found.warnings:
            console.note(f"warning: {warning}")
        console.say("")
        console.say(format_summaries(found.summaries))
        if self._figures:
            from aim.figures import draw_importance

            for path in draw_importance(found.importance, self._figures, title=title_of(base, activations)):
                console.say(f"{path}: written")
        console.say("")
        return found

    def _calibrate(self, base: Model, console: Console, unfinished: UnfinishedCalibration) -> Activations:
        blocks = self._blocks or read_blocks(base, self.data, quiet=self._quiet)
        console.say(blocks.summary(self.data))
        if unfinished.blocks:
            console.note(f"going on: {unfinished.blocks} of {len(blocks.tokens)} blocks are there")
        console.note(f"loading {base.label}")
        tokens, started = blocks.tokens.numel(), 0.0
        with ExitStack() as stack:
            bar: list[Callable[[int], object]] = []

            def progress(done: int) -> None:
                """Count from when the model is loaded, so that the rate is that of the forward passes."""
                nonlocal started
                if not bar:
                    bar.append(stack.enter_context(console.bar("calibrating", tokens)))
                    started = time.monotonic()
                bar[0](done)

            activations = calibrate(
                base, self.data, self.calibration, blocks=blocks, unfinished=unfinished, progress=progress
            )
        seconds = max(time.monotonic() - started, 1e-9)
        console.say(
            f"calibrated in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, in {activations.calibration['dtype']}"
        )
        return activations


def title_of(base: Model, activations: Activations) -> str:
    """What a figure is of: the base, and the text it was run on."""
    return f"{Path(base.label).name}, {blocks_of(activations)}"


def blocks_of(activations: Activations) -> str:
    """The text that statistics were taken with."""
    calibration = activations.calibration
    source = Path(str(calibration.get("source"))).name
    return f"{calibration.get('blocks')} blocks of {calibration.get('block_size')} tokens of {source}"


def format_check(described: dict[str, Any]) -> str:
    """What `AimRequest.describe` found, for people."""
    lines = [f"AIM: omega {' and '.join(described['omegas'])}, statistics from {described['statistics']}"]
    lines += [
        f"  {key} = {described[key]}"
        for key, default in (("scaling", "identity"), ("control", "none"), ("numerics", "float32"))
        if described[key] != default
    ]
    if "calibration" in described:
        counts = described["calibration"]
        lines.append(f"  {counts['texts']} texts, {counts['blocks']} blocks, {counts['too_long']} texts too long")
    lines += [f"  {count:5d} x {kind}: relax" for kind, count in described["relaxes"].items()]
    lines += [
        f"  {entry['count']:5d} x {entry['tensors']}: stays as merged ({entry['why']})" for entry in described["keeps"]
    ]
    lines += [f"warning: {warning}" for warning in described["warnings"]]
    return "\n".join(lines)
