"""AIM as the step of a job: check, calibrate or load, keep, summarise, draw; whatever command or program asks for it."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from aim.activations import Activations, load_activations
from aim.calibrate import (
    calibrate,
    check_block_size,
    check_has_all_weights,
    check_runs_on_text,
    read_blocks,
    select,
)
from aim.calibration_text import TokenBlocks, is_local
from aim.choices import Calibration, Kept, Relaxing
from aim.summary import as_json, format_summaries, times_of
from aim.targets import Selection
from aim.together import Alone, Together
from aim.transforms import Relaxations, check_activations, group_kept, make_relaxations, names_of, outputs_of, why_kept
from aim.unfinished import UnfinishedCalibration
from checkpoints.errors import ArgumentError, named_by
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import Show, setting, shown
from checkpoints.staging import Stage
from checkpoints.tensor_names import kind_of
from checkpoints.writer import chunked_digest
from forward.loading import quiet_transformers
from streaming.console import Console
from streaming.output import RunOptions
from streaming.stream import PlannedTensor


class AimStep:
    """What carries a request out within one job; a `streaming.job.Step`.

    Args:
        how: weights are relaxed.
        statistics: how they are taken, the file that has them, or they themselves.
        options: of the run.
        kept: what is kept of them.
        places: setting -> where a file gives it, for messages.
        dry_run: fetch no texts from a hub.
    """

    def __init__(
        self,
        how: Relaxing,
        statistics: Calibration | Path | Activations,
        options: RunOptions,
        kept: Kept,
        places: Mapping[str, str],
        *,
        dry_run: bool = False,
    ):
        self.how, self._statistics, self._kept, self._places = how, statistics, kept, places
        self._options, self._dry_run = options, dry_run
        self._file = statistics if isinstance(statistics, Path) else None
        self._loaded = statistics if isinstance(statistics, Activations) else None
        self._calibration = statistics if isinstance(statistics, Calibration) else Calibration()
        self._blocks: TokenBlocks | None = None

    @property
    def folders(self) -> list[str]:
        """Of the checkpoints, below the save path."""
        return self.how.folders

    def check(self, base: Model) -> None:
        """Find everything that is known without running the base, which can take an hour; reads the texts.

        Raises: Refusals: a base that cannot be calibrated, texts or statistics that do not fit, filters that match nothing.
        """
        with named_by(self._places):
            self._check(base)

    def _check(self, base: Model) -> None:
        _ = base.architecture  # without it, nothing else can be looked at
        problems = Problems()
        with problems.collect():
            selection, _ = select(base, self.how.numerics)
            self._check_filters(selection)
            if self._file:
                self._loaded = self._loaded or load_activations(self._file)
            if self._loaded and base.weights.is_here:
                check_activations(self._loaded, base, selection, self.how, self._source)
        for check in (
            () if self._loaded or self._file else (check_runs_on_text, check_has_all_weights, self._check_texts)
        ):
            with problems.collect(), quiet_transformers():
                check(base)
        problems.raise_if_any()

    @property
    def _source(self) -> str:
        return setting("statistics", self._file) if self._file else "the statistics"

    def _check_texts(self, base: Model) -> None:
        data = self._calibration.data
        check_block_size(base, data.block_size)
        if self._blocks is None and (is_local(data.source) or not self._dry_run):
            self._blocks = read_blocks(base, data, quiet=self._options.quiet)

    def _check_filters(self, selection: Selection) -> None:
        """Refuse a filter that no tensor is left for: a slip of the pen would otherwise relax with another omega."""
        for omega in self.how.omegas:
            first = Counter(omega.filter_of(name) for name in selection.targets)
            for part, _ in omega.filters:
                if not first[part]:
                    shadowed = any(part in name for name in selection.targets)
                    kinds = ", ".join(sorted({kind_of(name) for name in selection.targets}))
                    raise ArgumentError(
                        f"{setting('omega')}: the filter '{part}' is "
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
            base: that was checked.
            tensors: what would be written.
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
            "protect": self.how.protect,
            "scaling": self.how.scaling,
            "control": self.how.control,
            "numerics": self.how.numerics,
            "statistics": self._origin,
            "relaxes": dict(Counter(kind_of(name) for name in relaxed)),
            "keeps": [{"tensors": kind, "count": count, "why": why} for (kind, why), count in group_kept(kept).items()],
            "warnings": warnings,
        }
        if self._blocks:
            described["calibration"] = self._blocks.as_json()
        return described

    @property
    def _origin(self) -> str:
        """Where the statistics come from, for people."""
        if isinstance(self._statistics, Activations):
            return "given"
        return str(self._file or self._calibration.data.source)

    def as_text(self, base: Model, tensors: Sequence[PlannedTensor], show: Show) -> str:
        """What `describe` finds, for people."""
        return format_check(shown(self.describe(base, tensors), show))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything of it that decides the output's bytes, for JSON."""
        if self._file:
            return {**self.how.as_json(), "activations": chunked_digest(self._file, "sha256")}
        if isinstance(self._statistics, Activations):
            return {**self.how.as_json(), "statistics": self._statistics.digest()}
        data, how = self._calibration.data, self._calibration.options
        path = Path(data.source)
        changed = path.stat().st_mtime_ns if is_local(data.source) and path.is_file() else None
        options = {**how.as_json(), "mtime_ns": changed}
        return {**self.how.as_json(), "calibration": {**data.as_json(), **options}}

    def prepare(self, base: Model, tensors: Sequence[PlannedTensor], console: Console, stage: Stage) -> Relaxations:
        """Statistics and transforms, with a summary for the user.

        Args:
            base: that was checked.
            tensors: what will be written.
            stage: where the calibration is kept.

        Raises: InputError: see `calibrate` and `make_relaxations`.
        """
        with named_by(self._places):
            return self._prepare(base, tensors, console, stage)

    def _prepare(self, base: Model, tensors: Sequence[PlannedTensor], console: Console, stage: Stage) -> Relaxations:
        unfinished, keep, figures = UnfinishedCalibration(stage), self._kept.save_activations, self._kept.figures
        if unfinished.lost and not self._loaded:
            console.note("note: what an earlier run kept of the calibration is not as it wrote it, and is made again.")
        activations = self._loaded or self._statistics_of(base, console, unfinished, stage)
        if not self._options.team.is_first:
            keep, figures = None, None
        if self._loaded:
            console.say(f"statistics: {self._origin}, taken with {blocks_of(activations)}")
        if keep:
            activations.save(keep)
            console.say(f"{keep}: statistics of {len(activations.statistics)} tensors")
        relaxations = make_relaxations(
            base, activations, self.how,
            device=self._options.stream.device, outputs=outputs_of(tensors), names=names_of(tensors), source=self._source,
        )  # fmt: skip
        for warning in relaxations.warnings:
            console.warn(shown(warning, console.show))
        console.say("")
        self._options.log("channels", **as_json(relaxations.summaries))
        console.say(format_summaries(relaxations.summaries, means=self.how.protect == "mean"))
        if figures:
            from aim.figures import draw_importance, draw_massive, draw_mean_direction, draw_mean_input

            title = title_of(base, activations)
            drawn = draw_importance(relaxations.importance, figures, title=title)
            drawn += draw_massive(
                times_of(activations.renamed(names_of(tensors)).statistics, relaxations.importance),
                figures,
                title=title,
            )
            if self.how.protect == "mean":
                drawn += draw_mean_input(relaxations.mean_energy, figures, title=title)
                relaxations.draw = functools.partial(draw_mean_direction, folder=figures, title=title)
            for path in drawn:
                console.say(f"{path}: written")
        console.say("")
        return relaxations

    def _statistics_of(
        self, base: Model, console: Console, unfinished: UnfinishedCalibration, stage: Stage
    ) -> Activations:
        """What an earlier run has kept, or a calibration, which several processes share."""
        processes, finished = self._options.processes, unfinished.finished()
        if processes is None:
            return finished or self._calibrate(base, console, unfinished)

        if processes.is_first:
            processes.say("calibration", "" if finished is None else "there")
        elif processes.hear("calibration"):
            return unfinished.of_first()
        return finished or self._calibrate(base, console, unfinished, Together(processes, stage))

    def _calibrate(
        self,
        base: Model,
        console: Console,
        unfinished: UnfinishedCalibration,
        share: Alone | None = None,
    ) -> Activations:
        data = self._calibration.data
        blocks = self._blocks or read_blocks(base, data, quiet=self._options.quiet)
        console.say(blocks.summary(data))
        if unfinished.blocks:
            console.note(f"going on: {unfinished.blocks} of {len(blocks.tokens)} blocks are there")
        console.note(f"loading {base.label}")
        tokens, started, run = blocks.tokens.numel(), 0.0, 0
        with ExitStack() as stack:
            bar: list[Callable[[int], object]] = []

            def progress(done: int) -> None:
                """Count from when the model is loaded, so that the rate is that of the forward passes."""
                nonlocal started, run
                if not bar:
                    bar.append(stack.enter_context(console.bar("calibrating", tokens, " tokens")))
                    started = time.monotonic()
                bar[0](done)
                run += done

            activations = calibrate(
                base,
                data,
                self._calibration.options,
                blocks=blocks,
                unfinished=unfinished,
                progress=progress,
                note=lambda line: console.note(f"calibration: {line}"),
                share=share,
            )
        console.say(calibrated(activations, max(time.monotonic() - started, 1e-9), run=run))
        return activations


def calibrated(activations: Activations, seconds: float, *, run: int) -> str:
    """How much text was run and why no more, and how fast; `run`: tokens of this run."""
    calibration = activations.calibration
    difference = calibration["difference"]
    if difference is None:
        enough = ""
    elif difference < calibration["tolerance"]:
        enough = f"; enough, as s of both halves differs by {difference:.3f} at most in a kind of layer"
    else:
        enough = f"; s of both halves differed by {difference:.3f} in a kind of layer"
    return f"calibrated on {calibration['tokens']:,} tokens in {seconds:.2f} s, {run / seconds:,.0f} tokens/s, in {calibration['dtype']}{enough}"


def title_of(base: Model, activations: Activations) -> str:
    """What a figure is of: the base, and the text it was run on."""
    return f"{Path(base.label).name}, {blocks_of(activations)}"


def blocks_of(activations: Activations) -> str:
    """The text that statistics were taken with."""
    calibration = activations.calibration
    source = Path(str(calibration.get("source"))).name
    return f"{calibration.get('blocks')} blocks of {calibration.get('block_size')} tokens of {source}"


def format_check(described: dict[str, Any]) -> str:
    """What `AimStep.describe` found, for people."""
    lines = [f"AIM: omega {' and '.join(described['omegas'])}, statistics from {described['statistics']}"]
    lines += [
        f"  {key} = {described[key]}"
        for key, default in (
            ("protect", "channels"),
            ("scaling", "identity"),
            ("control", "none"),
            ("numerics", "float32"),
        )
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
