"""One merge from recipe to finished folder: open, plan, refuse or stream, describe, publish."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoints.errors import InputError, Refusals
from checkpoints.model import Model, open_model
from checkpoints.provenance import Digest, describe_input, model_card, versions, write_recipe
from checkpoints.sidecars import config_with_dtype, copy_side_files
from checkpoints.staging import check_save_path, check_space, staged
from checkpoints.writer import CheckpointWriter, write_file
from merging.plan import Plan, make_plan
from merging.recipe import Recipe
from merging.report import DeltaReport
from merging.stream import Output, StreamOptions, stream

DEFAULT_SHARD_BYTES = 5_000_000_000
SIDE_FILE_BYTES = 64 << 20  # room for tokenizer files and cards when disk space is checked


@dataclass(frozen=True)
class RunOptions:
    """How a merge is run and written; the tensors' bytes depend on none of it.

    Attributes:
        stream: device, threads, size of a block.
        max_shard_bytes: size of the output's files.
        digest: which digests merge_recipe.json gets.
        report: `sample` of one block in 16, `full`, or `none`.
        overwrite: replace an earlier result.
        trust_remote_code: let Python files of a checkpoint run.
        quiet: no progress bars.
        command: what the model card shows.
    """

    stream: StreamOptions = field(default_factory=StreamOptions)
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    digest: Digest = "outputs"
    report: Literal["none", "sample", "full"] = "sample"
    overwrite: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
    command: Sequence[str] | None = None


@dataclass
class Result:
    """What a run did.

    Attributes:
        save_path: the finished folder.
        report: see `DeltaReport.as_json`; None where none was asked for.
        warnings: what a user should look at.
        bytes_read, bytes_written, seconds, peak_memory_bytes: of the whole run.
    """

    save_path: Path
    plan: Plan
    report: dict[str, Any] | None
    warnings: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int


def open_inputs(recipe: Recipe, options: RunOptions) -> tuple[Model, list[Model]]:
    """Open the base and the models; everything that cannot be opened is said at once. Raises Refusals."""
    problems: list[str | InputError] = []
    opened: list[Model] = []
    for name in (recipe.base_model, *(model.name for model in recipe.models)):
        try:
            opened.append(open_model(name, quiet=options.quiet, trust_remote_code=options.trust_remote_code))
        except InputError as error:
            problems.append(error)
    if problems:
        raise Refusals(problems)
    return opened[0], opened[1:]


@dataclass
class Job:
    """A merge that has been planned and can be run."""

    plan: Plan
    base: Model
    models: list[Model]
    save_path: Path
    options: RunOptions

    def run(self, progress: Callable[[int], object] = lambda count: None) -> Result:
        """Carry the plan out; see `merge`."""
        started = time.monotonic()
        plan, options, inputs = self.plan, self.options, (self.base, *self.models)
        report = DeltaReport(plan.models, full=options.report == "full") if options.report != "none" else None
        with staged(self.save_path) as work:
            writer = CheckpointWriter(work, plan.shards, digest=options.digest != "none")
            try:
                unchanged = stream(
                    plan.tensors, [Output(writer)], options=options.stream, report=report, progress=progress
                )
                outputs = writer.close()
            finally:
                writer.release()
            for model in inputs:
                model.weights.check_unchanged()
            warnings = [
                f"{plan.models[index]} equals the base: it adds nothing to the merge." for index in sorted(unchanged)
            ]
            described = report.as_json() if report else None
            self._describe(work, outputs, described, warnings)
        for model in inputs:
            model.weights.close()
        seconds = time.monotonic() - started
        return Result(
            self.save_path,
            plan,
            described,
            warnings,
            plan.bytes_to_read,
            plan.bytes_to_write,
            seconds,
            peak_memory_bytes(),
        )

    def _describe(
        self, work: Path, outputs: dict[str, dict[str, int | str]], report: dict[str, Any] | None, warnings: list[str]
    ) -> None:
        """Write what is no weight: side files of the base, the model card, the recipe."""
        options, inputs = self.options, (self.base, *self.models)
        recipe = self.plan.recipe.as_json()
        dtype = self.plan.recipe.out_dtype
        copy_side_files(
            self.base.location.folder,
            work,
            config=None if dtype == "auto" else config_with_dtype(self.base.config, dtype),
        )
        parameters = ", ".join(f"{key} {value}" for key, value in recipe["parameters"].items()) or "no parameters"
        rows = "\n".join(
            f"| `{m['model']}` | {', '.join(f'{k} {v:g}' for k, v in m['parameters'].items())} |"
            for m in recipe["models"]
        )
        text = f"Method: `{recipe['merge_method']}` ({parameters})\n\n| model | parameters |\n| --- | --- |\n{rows}"
        card = model_card(
            title=self.save_path.name, base=self.base, models=self.models, text=text, command=options.command
        )
        write_file(work / "README.md", card.encode())
        write_recipe(
            work,
            {
                **recipe,
                "inputs": [describe_input(model, options.digest) for model in inputs],
                "outputs": outputs,
                "versions": versions(),
                "notes": self.plan.notes,
                "warnings": warnings,
                "report": report,
                "command": list(options.command) if options.command else None,
            },
        )


def prepare(recipe: Recipe, save_path: Path, options: RunOptions) -> Job:
    """Open the inputs and plan; nothing is written. Raises Refusals with everything that keeps the merge from working."""
    base, models = open_inputs(recipe, options)
    folders = [model.location.folder for model in (base, *models)]
    problems: list[str | InputError] = list(check_save_path(save_path, folders, overwrite=options.overwrite))
    try:
        plan = make_plan(recipe, base, models, max_shard_bytes=options.max_shard_bytes)
        problems += check_space(save_path, plan.bytes_to_write + SIDE_FILE_BYTES)
    except Refusals as refusals:
        problems += refusals.problems
    if problems:
        raise Refusals(problems)
    return Job(plan, base, models, save_path, options)


def merge(
    recipe: Recipe,
    save_path: Path | str,
    options: RunOptions | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Result:
    """Merge models into a new checkpoint folder.

    Args:
        recipe: from `make_recipe`.
        save_path: the folder to be; it appears when it is complete, or not at all.
        options: how to run.
        progress: called with numbers of bytes read and written as they are done, from several threads.

    Raises:
        InputError: an input or the output folder does not fit (`Refusals`, before anything is written), or a number is not
            finite, or the disk fails; nothing is left behind.
    """
    return prepare(recipe, Path(save_path), options or RunOptions()).run(progress)


def peak_memory_bytes() -> int:
    """The largest resident memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
