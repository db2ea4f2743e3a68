"""One merge from recipe to finished folder: open, plan, refuse or stream, describe, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, Refusals
from checkpoints.model import Model, open_models
from checkpoints.staging import check_save_path, check_space
from merging.plan import Plan, make_plan
from merging.recipe import Recipe
from merging.report import DeltaReport
from streaming.output import SIDE_FILE_BYTES, RunOptions, Variant, Written, write_checkpoints, write_description


@dataclass(frozen=True)
class Result:
    """What a merge did.

    Attributes:
        save_path: the finished folder.
        plan: what was carried out.
        report: see `DeltaReport.as_json`; None where none was asked for.
        warnings: what a user should look at.
        written: bytes, seconds, memory.
    """

    save_path: Path
    plan: Plan
    report: dict[str, Any] | None
    warnings: list[str]
    written: Written


@dataclass
class Job:
    """A merge that has been planned and can be run."""

    plan: Plan
    base: Model
    models: list[Model]
    save_path: Path
    options: RunOptions

    def run(
        self, progress: Callable[[int], object] = lambda count: None, variants: Sequence[Variant] = (Variant(),)
    ) -> Result:
        """Carry the plan out; see `merge`. Several variants of the merge are written from one reading of the inputs."""
        report = DeltaReport(self.plan.models, full=self.options.report == "full")
        written = write_checkpoints(
            self.plan.tensors,
            self.plan.shards,
            variants,
            self.save_path,
            inputs=(self.base, *self.models),
            options=self.options,
            describe=lambda *arguments: self._describe(report, *arguments),
            observer=None if self.options.report == "none" else report,
            progress=progress,
        )
        described = None if self.options.report == "none" else report.as_json()
        return Result(self.save_path, self.plan, described, self._warnings(written.unchanged), written)

    def close(self) -> None:
        """Close the inputs, for a job that is not run."""
        for model in (self.base, *self.models):
            model.weights.close()

    def _warnings(self, unchanged: set[int] | frozenset[int]) -> list[str]:
        return [
            f"{self.plan.models[index]} equals the base: it adds nothing to the merge." for index in sorted(unchanged)
        ]

    def _describe(
        self,
        report: DeltaReport,
        folder: Path,
        variant: Variant,
        outputs: Mapping[str, Mapping[str, int | str]],
        unchanged: set[int],
    ) -> None:
        """Write side files, model card and recipe of one variant."""
        recipe = self.plan.recipe.as_json()
        parameters = ", ".join(f"{key} {value}" for key, value in recipe["parameters"].items()) or "no parameters"
        rows = "\n".join(
            f"| `{entry['model']}` | {', '.join(f'{key} {value:g}' for key, value in entry['parameters'].items())} |"
            for entry in recipe["models"]
        )
        text = f"Method: `{recipe['merge_method']}` ({parameters})\n\n| model | parameters |\n| --- | --- |\n{rows}\n\n{variant.card}"
        write_description(
            folder,
            title=" ".join(filter(None, (self.save_path.name, variant.folder))),
            primary=self.base,
            inputs=(self.base, *self.models),
            out_dtype=self.plan.recipe.out_dtype,
            card=text,
            recipe={
                **recipe,
                **variant.details(),
                "outputs": outputs,
                "notes": self.plan.notes,
                "warnings": self._warnings(unchanged),
                "report": None if self.options.report == "none" else report.as_json(),
            },
            options=self.options,
        )


def prepare(recipe: Recipe, save_path: Path, options: RunOptions, *, variants: int = 1, download: bool = True) -> Job:
    """Open the inputs and plan; nothing is written.

    Hub models are planned from their headers first, so that what does not fit is said before gigabytes are fetched.

    Args:
        recipe, save_path, options: see `merge`.
        variants: checkpoints that will be written, for the disk space.
        download: False leaves the weights of hub models where they are (a dry run).

    Raises: Refusals: everything that keeps the merge from working.
    """
    names = [recipe.base_model, *(model.name for model in recipe.models)]
    for fetch in (False, True):
        opened = open_models(names, weights=fetch, quiet=options.quiet, trust_remote_code=options.trust_remote_code)
        job = _plan(recipe, opened, save_path, options, variants)
        if not download or all(model.weights.is_here for model in opened):
            break
    return job


def _plan(recipe: Recipe, opened: list[Model], save_path: Path, options: RunOptions, variants: int) -> Job:
    base, *models = opened
    folders = [model.location.folder for model in opened]
    problems: list[str | InputError] = list(check_save_path(save_path, folders, overwrite=options.overwrite))
    try:
        plan = make_plan(recipe, base, models, max_shard_bytes=options.max_shard_bytes)
        problems += check_space(save_path, variants * (plan.bytes_to_write + SIDE_FILE_BYTES))
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
