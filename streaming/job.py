"""One job: what is to be written, planned and checked, run from opened inputs to finished folders.

`merging` and `aim` each make a `Work`: tensors and what belongs beside them. A `Step` (AIM) changes weights on their way from the
merge to the disk. The commands and the packages' own functions run the same `Job`:

    job = plan_job(make_work, inputs, save_path, options, step)
    result = job.run()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from checkpoints.errors import AlreadyComplete
from checkpoints.model import Model, close_all
from checkpoints.problems import Problems
from checkpoints.save_path import RECIPE_FILE, check_save_path, check_space
from checkpoints.settings import Show, as_flag, as_in_python, shown
from checkpoints.staging import Stage, refuse_if_written, staged
from streaming.commits import unfinished
from streaming.console import Console
from streaming.output import (
    RunOptions,
    Written,
    group_variants,
    identity_of,
    record_of,
    write_checkpoints,
    write_description,
)
from streaming.stream import PlannedTensor, bytes_read
from streaming.work import Findings, Variant, Work, bytes_written, joined


class Changes(Protocol):
    """What a step does, ready for a stream."""

    @property
    def variants(self) -> Sequence[Variant]:
        """One for each checkpoint: of the first merge, then of the next."""

    def summary(self, show: Show) -> str:
        """Lines for people, when the weights are written."""


class Step(Protocol):
    """What happens to weights between the merge and the disk."""

    @property
    def folders(self) -> Sequence[str]:
        """Of the checkpoints, below the save path; `""` for the save path itself."""

    @property
    def identity(self) -> Any:
        """Everything of it that decides the output's bytes, for JSON."""

    def check(self, base: Model) -> None:
        """Raise InputError with everything that does not fit, known without running the base."""

    def describe(self, base: Model, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        """What would be done, for JSON; after `check`."""

    def as_text(self, base: Model, tensors: Sequence[PlannedTensor], show: Show) -> str:
        """The same for people."""

    def prepare(
        self, base: Model, tensors: Sequence[PlannedTensor], console: Console, stage: Stage, merges: Sequence[Variant]
    ) -> Changes:
        """Find out how the weights of each merge are changed; after `check`. Raises InputError."""


class Request(Protocol):
    """A step as a user asks for it: values, nothing opened."""

    def step(self, save_path: Path, options: RunOptions, *, dry_run: bool = False) -> Step:
        """What carries it out. Raises InputError: files that it keeps beside the output cannot be written."""


@dataclass(frozen=True)
class Result:
    """What a job did.

    Attributes:
        save_path: the finished folder.
        plan: what was carried out.
        report: what the merge report says, see `merging.report.DeltaReport.as_json`; None where none was asked for.
        warnings: what a user should look at, beside the plan's.
        written: bytes, seconds, memory; nothing was written where `was_complete`.
        was_complete: an earlier run had written this very output; report and warnings are those that it left.
        message: says so, for people.
        summary: of the step, for people.
    """

    save_path: Path
    plan: Work
    report: dict[str, Any] | None
    warnings: list[str]
    written: Written
    was_complete: bool = False
    message: str = ""
    summary: str = ""


@dataclass
class Job:
    """Work that has been planned and can be run.

    Attributes:
        save_path: the folder to be.
        options: how to run.
        step: what happens to the weights before they are written; None for nothing.
        complete: says that an earlier run has written this very output; empty where none has.
    """

    work: Work
    save_path: Path
    options: RunOptions
    step: Step | None = None
    complete: str = ""

    @property
    def folders(self) -> Sequence[str]:
        """Of the checkpoints to be, below the save path."""
        own = self.step.folders if self.step is not None else [""]
        return [joined(merge.folder, folder) for merge in self.work.merges() for folder in own]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the output's bytes."""
        return identity_of(self.work, self.options, aim=self.step.identity if self.step else None)

    def staged(self) -> AbstractContextManager[Stage]:
        """The folder to write in, which becomes the output when the context ends well. Raises as `checkpoints.staging.staged`."""
        return staged(
            self.save_path,
            overwrite=self.options.overwrite,
            folders=self.folders,
            files=self.work.file_names,
            identity=self.identity,
            resume=self.options.resume,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan for programs, the step's part under `aim`."""
        described = {"aim": self.step.describe(self.work.base, self.work.tensors)} if self.step else {}
        return {**self.work.as_json(), **described}

    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""
        described = [self.step.as_text(self.work.base, self.work.tensors, show)] if self.step else []
        return "\n".join([*described, self.work.as_text(show)])

    def shares(self, count: int) -> dict[str, Any]:
        """What each of so many processes would do, for programs; time where the weights are here and no model has to be run for it."""
        from streaming.estimate import measure_rate, shares_as_json

        options = self.options.stream
        is_known = all(model.weights.is_here for model in self.work.inputs) and not self.work.runs_models
        rate = measure_rate(self.work, options) if is_known else None
        return shares_as_json(self.work, count, options, len(self.folders), rate, relaxes=self.step is not None)

    def close(self) -> None:
        """Close the inputs, for a job that is not run."""
        close_all(self.work.inputs)

    def run(self, console: Console | None = None) -> Result:
        """Carry the plan out; the inputs are closed at the end.

        Args:
            console: how to speak to the user.

        Raises: InputError: a number is not finite, an input changes under the run, the disk fails, Ctrl-C.
        """
        console = console or Console()
        with closing(self):
            self.agree()
            if self.complete:
                return self._as_it_was(self.complete)
            self.options.log("plan", **shown(self.work.as_json(), console.show))
            for note in self.work.notes:
                console.note(f"note: {shown(note, console.show)}")
            for warning in self.work.warnings:
                console.warn(shown(warning, console.show))
            try:
                return self._run(console)
            except AlreadyComplete as done:
                return self._as_it_was(str(done))

    def _staged(self) -> AbstractContextManager[Stage]:
        """The folder to write in, which several processes share where they were started together."""
        processes = self.options.processes
        if processes is None:
            return self.staged()
        from streaming.shared_stage import follow, lead

        return lead(self.staged, processes) if processes.is_first else follow(self.save_path, processes)

    def agree(self) -> None:
        """See that all processes that share the run are about to do the same. Raises InputError."""
        self.options.team.agree(lambda: {**self.identity, "output": {"is_complete": bool(self.complete)}})

    def _run(self, console: Console) -> Result:
        work, merges = self.work, self.work.merges()
        with self._staged() as stage:
            for note in stage.notes:
                console.note(f"note: {shown(note, console.show)}")
            changes = self.step.prepare(work.base, work.tensors, console, stage, merges) if self.step else None
            variants = changes.variants if changes else merges
            groups = group_variants(variants)
            observers = work.start(len(groups))
            todo = unfinished(work.tensors, stage)
            if len(todo) < len(work.tensors):
                console.note(f"going on: {len(work.tensors) - len(todo)} of {len(work.tensors)} tensors are there")
            read = bytes_read(todo, [each.transform for each in variants]) * len(groups)
            moved = read + bytes_written(todo) * len(variants)
            with console.bar(work.verb, moved, "B") as advance:
                written = write_checkpoints(work, variants, stage, self.options, observers, advance)
            if not self.options.team.is_first:
                return Result(self.save_path, work, None, [], written)
            records = [work.closing_record(observer) for observer in observers]
            of_variant = {each.folder: number for number, group in enumerate(groups) for each in group}
            for variant, outputs in zip(variants, written.outputs, strict=True):
                self._describe(stage, variant, outputs, written.findings, records[of_variant[variant.folder]])
        report = records[0].get("report")
        summary = changes.summary(console.show) if changes else ""
        return Result(self.save_path, work, report, work.warnings_of(written.findings), written, summary=summary)

    def _describe(
        self,
        stage: Stage,
        variant: Variant,
        outputs: Mapping[str, Mapping[str, int | str]],
        findings: Findings,
        closing: Mapping[str, Any],
    ) -> None:
        """Write side files, model card and recipe of one variant."""
        work = self.work
        recipe = {
            **work.recipe,
            **variant.details(),
            **work.record,
            "outputs": outputs,
            "notes": work.notes,
            "warnings": [*work.warnings, *work.warnings_of(findings)],
            **closing,
        }
        write_description(
            stage.work.subfolder(variant.folder) if variant.folder else stage.work,
            work,
            self.options,
            title=" ".join(filter(None, (self.save_path.resolve().name, variant.folder))),
            card=f"{work.card}\n\n{variant.card}",
            recipe={**shown(recipe, as_flag), **record_of(work, self.options), "identity": stage.identity},
        )

    def _as_it_was(self, message: str) -> Result:
        """The result that an earlier run left."""
        recorded = json.loads((self.save_path / self.folders[0] / RECIPE_FILE).read_bytes())
        warnings = [text for text in recorded.get("warnings", ()) if text not in self.work.warnings]
        return Result(self.save_path, self.work, recorded.get("report"), warnings, Written(), True, message)


def plan_job(
    make_work: Callable[[], Work],
    inputs: Sequence[Model],
    save_path: Path,
    options: RunOptions,
    step: Step | None = None,
) -> Job:
    """Plan a work, and check that it can be written and its step be taken; nothing is written.

    Args:
        make_work: plans it from the opened inputs; raises InputError where they do not fit.
        inputs: the base, or what stands in for it, first.

    Raises: Refusals: everything that keeps it from working.
    """
    planned, problems = Problems(), Problems()
    job: Job | None = None
    with planned.collect():
        job = Job(make_work(), save_path, options, step)
    if job and not options.overwrite and all(model.weights.is_here for model in inputs):
        try:
            refuse_if_written(save_path, job.folders, job.identity)
        except AlreadyComplete as done:
            job.complete = str(done)
            return job
    folders = [folder for model in inputs for origin in model.origins for folder in origin.folders]
    problems.extend(check_save_path(save_path, folders, overwrite=options.overwrite))
    problems.extend(planned)
    if job and not problems:
        needed = sum(shard.size for shard in job.work.shards) + job.work.files.nbytes
        problems.extend(check_space(save_path, len(job.folders) * needed))
    if step is not None:
        with problems.collect():
            step.check(inputs[0])
    problems.raise_if_any()
    assert job is not None
    return job
