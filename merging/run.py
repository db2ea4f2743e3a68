"""One merge from recipe to finished folder: open, plan, refuse or stream, describe, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignment.tokenizer_choice import template_label
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting
from checkpoints.model import Model, close_all, open_and_plan
from checkpoints.reader import same_values
from checkpoints.staging import Stage, check_complete, check_save_path, check_space, staged
from merging.parameters import text_of
from merging.plan import Plan, make_plan
from merging.recipe import ModelInput, Recipe, identity
from merging.report import DeltaReport
from streaming.output import (
    Findings,
    RunOptions,
    Variant,
    Written,
    identity_of,
    write_checkpoints,
    write_description,
)


@dataclass(frozen=True)
class Result:
    """What a merge did.

    Attributes:
        save_path: the finished folder.
        plan: what was carried out.
        report: see `DeltaReport.as_json`; None where none was asked for.
        warnings: what a user should look at, beside the plan's.
        written: bytes, seconds, memory.
    """

    save_path: Path
    plan: Plan
    report: dict[str, Any] | None
    warnings: list[str]
    written: Written


@dataclass
class Job:
    """A merge that has been planned and can be run.

    folders: of the checkpoints to be, below `save_path`; aim: what AIM's part in it is, for JSON.
    """

    plan: Plan
    inputs: list[Model]
    save_path: Path
    options: RunOptions
    folders: Sequence[str] = ("",)
    aim: Any = None

    def staged(self) -> AbstractContextManager[Stage]:
        """The folder to `run` in, which becomes the output when the context ends well. Raises as `checkpoints.staging.staged`."""
        return staged(
            self.save_path,
            overwrite=self.options.overwrite,
            folders=self.folders,
            identity=self.identity,
            resume=self.options.resume,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the output's bytes."""
        plan = self.plan
        return identity_of(plan.recipe.as_json(), self.inputs, plan.shards, plan.files, self.options, aim=self.aim)

    @property
    def base(self) -> Model:
        """The base, or the model that stands in for it: gives what is no number."""
        return self.inputs[0]

    def run(
        self,
        stage: Stage,
        progress: Callable[[int], object] = lambda count: None,
        variants: Sequence[Variant] = (Variant(),),
    ) -> Result:
        """Carry the plan out; see `merge`. Several variants of the merge are written from one reading of the inputs.

        Args:
            stage: from `staged`, still open.
            variants: as many as there are `folders`.
        """
        wanted = self.options.report != "none" and self.plan.has_deltas
        report = DeltaReport(self.plan.models, full=self.options.report == "full") if wanted else None
        written = write_checkpoints(
            self.plan.tensors,
            self.plan.shards,
            variants,
            stage,
            inputs=self.inputs,
            options=self.options,
            describe=lambda *arguments: self._describe(report, stage, *arguments),
            observer=report,
            progress=progress,
        )
        described = report.as_json() if report else None
        return Result(self.save_path, self.plan, described, self._warnings(written.findings), written)

    def close(self) -> None:
        """Close the inputs, for a job that is not run."""
        close_all(self.inputs)

    @cached_property
    def _compared_equal(self) -> set[int]:
        """Positions of the models that equal the base, found by comparing: a method in weight space sees no task vectors."""
        merged = [tensor for tensor in self.plan.tensors if tensor.method and tensor.method.space == "weights"]
        return {
            index
            for index in range(len(self.plan.models) if merged and self.plan.has_deltas else 0)
            if all(same_values(tensor.base, tensor.inputs[index]) for tensor in merged)
        }

    def _warnings(self, findings: Findings) -> list[str]:
        equal = sorted(self._compared_equal | findings.unchanged) if self.plan.has_deltas else []
        found = [f"{self.plan.models[index]} equals the base: its task vector is zero throughout." for index in equal]
        if equal and len(equal) == len(self.plan.models):
            found.append("All models equal the base, and so does the output.")
        return [*found, *findings.non_finite_warnings()]

    def _card_head(self) -> str:
        """The model card's list of what was merged."""
        has_base = self.plan.recipe.base_model is not None
        listed = "\n".join(f"- `{model.label}`" for model in self.inputs[has_base:])
        fine_tuned = f", fine-tuned from `{self.base.label}`" if has_base else ""
        return f"A merge of these models{fine_tuned}:\n\n{listed}"

    def _describe(
        self,
        report: DeltaReport | None,
        stage: Stage,
        folder: Path,
        variant: Variant,
        outputs: Mapping[str, Mapping[str, int | str]],
        findings: Findings,
    ) -> None:
        """Write side files, model card and recipe of one variant."""
        recipe = self.plan.recipe.as_json()
        write_description(
            folder,
            title=" ".join(filter(None, (self.save_path.resolve().name, variant.folder))),
            files=self.plan.files,
            inputs=self.inputs,
            out_dtype=self.plan.recipe.out_dtype,
            card=f"{self._card_head()}\n\n{card_text(self.plan.recipe)}\n\n{variant.card}",
            recipe={
                **recipe,
                **variant.details(),
                "outputs": outputs,
                "notes": self.plan.notes,
                "warnings": [*self.plan.warnings, *self._warnings(findings)],
                "report": report.as_json() if report else None,
            },
            identity=stage.identity,
            options=self.options,
        )


def card_text(recipe: Recipe) -> str:
    """The part of a model card that says what was merged with what parameters."""
    keys = recipe.as_json()
    chosen = (
        "seed",
        "exclude",
        "only",
        "pad_to_multiple_of",
        "tie_word_embeddings",
        "copy_tokenizer_from",
        "out_dtype",
    )
    given = {**keys["parameters"], **{key: keys[key] for key in chosen}}
    if keys["tokenizer_source"] != "base":
        given["tokenizer_source"] = keys["tokenizer_source"]
    if keys["chat_template"] is not None:
        given["chat_template"] = template_label(keys["chat_template"])
    settings = [
        f"{key} `{text_of(value) if isinstance(value, bool | list) else value}`"
        for key, value in given.items()
        if value is not None
    ]
    lines = [", ".join([f"Method `{recipe.merge_method}`", *settings])]
    sources = [source for part in recipe.slices for source in part.sources]
    own = list(dict.fromkeys(key for source in sources for key in source.parameters))
    columns = [*(["layers"] if recipe.is_sliced else []), *own]
    if columns:
        lines += ["", f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        lines += [f"| `{source.name}` | {' | '.join(_cells(source, columns))} |" for source in sources]
    return "\n".join(lines)


def _cells(source: ModelInput, columns: Sequence[str]) -> Iterator[str]:
    """A row of the model card's table."""
    for column in columns:
        if column == "layers":
            yield f"{source.layers[0]} to {source.layers[1] - 1}" if source.layers else "all"
        else:
            yield text_of(source.parameters[column].as_json()) if column in source.parameters else ""


def prepare(
    recipe: Recipe,
    save_path: Path,
    options: RunOptions,
    *,
    folders: Sequence[str] = ("",),
    aim: Any = None,
    check: Callable[[Model], object] | None = None,
    download: bool = True,
) -> Job:
    """Open the inputs and plan; nothing is written.

    Hub models are planned from their headers first, so that what does not fit is said before gigabytes are fetched.

    Args:
        recipe, save_path, options: see `merge`.
        folders: of the checkpoints that will be written, below the save path; one for each variant.
        aim: what AIM's part in it is, for JSON; it is part of the run's identity.
        check: looks at the base, and raises what else does not fit (AIM's calibration).
        download: False leaves the weights of hub models where they are (a dry run).

    Raises: Refusals: everything that keeps the merge from working; AlreadyComplete: it has been done.
    """

    def plan(opened: list[Model]) -> Job:
        planned: list[Plan] = []
        problems: list[str | InputError] = [*_check_same(recipe, opened)]
        with collecting(problems):
            planned.append(make_plan(recipe, opened, max_shard_bytes=options.max_shard_bytes))
        job = None if problems else Job(planned[0], opened, save_path, options, folders, aim)
        if job and not options.overwrite and all(model.weights.is_here for model in opened):
            check_complete(save_path, folders, job.identity)
        folders_read = [folder for model in opened for folder in model.folders]
        problems = [*check_save_path(save_path, folders_read, overwrite=options.overwrite), *problems]
        if job and not problems:
            needed = job.plan.bytes_to_write + job.plan.files.nbytes
            problems += check_space(save_path, len(folders) * needed)
        if problems or job is None:
            raise Refusals(problems)
        return job

    return open_and_plan(
        recipe.inputs,
        plan,
        check=check,
        download=download,
        quiet=options.quiet,
        trust_remote_code=options.trust_remote_code,
    )


def _check_same(recipe: Recipe, opened: Sequence[Model]) -> list[InputError]:
    """Refuse two names of one folder among the models merged with each other: of a hub model its branch and its commit, say."""
    models = {identity(name): model for name, model in zip(recipe.inputs, opened, strict=True)}
    problems: list[InputError] = []
    for part in recipe.slices:
        seen: dict[tuple[Path, ...], Model] = {}
        for model in (models[identity(source.name)] for source in part.sources):
            other = seen.setdefault(model.folders, model)
            if other is not model:
                problems.append(
                    ArgumentError(
                        f"--models_to_merge: {other.label} and {model.label} are the same model. Give it once, with the sum of its weights."
                    )
                )
    return problems


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
            finite, or the disk fails.
        AlreadyComplete: the folder holds what this recipe makes of these inputs.
    """
    job = prepare(recipe, Path(save_path), options or RunOptions())
    with closing(job), job.staged() as stage:
        return job.run(stage, progress)
