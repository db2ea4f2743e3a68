"""Run one merge from recipe to finished folder: open, plan, refuse or stream, describe, publish."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, named_by
from checkpoints.escaping import markdown, markdown_code, markdown_code_cell
from checkpoints.model import Model, open_and_plan
from checkpoints.problems import Problems
from checkpoints.reader import same_values
from checkpoints.settings import Remark, Show, as_in_python, setting
from checkpoints.staging import Stage
from merging.methods import is_outside
from merging.parameters import text_of
from merging.plan import Plan, make_plan
from merging.recipe import ModelInput, Recipe, source_key
from merging.report import DeltaReport
from streaming.console import Console, bar_of
from streaming.job import Job, Request, Result, Step, plan_job
from streaming.output import RunOptions
from streaming.stream import Observer, PlannedTensor
from streaming.work import Findings, Variant, Work

if TYPE_CHECKING:
    from merging.model_texts import ModelText
    from merging.moments_pass import MomentsPass


@dataclass(kw_only=True)
class Merge(Work):
    """A planned merge as a work.

    Attributes:
        plan: what is merged with what.
        detail: how much the merge report looks at.
        moments: runs the models for what the method needs of their inputs; None for most methods.
    """

    plan: Plan
    detail: str
    moments: MomentsPass | None = None
    _report: DeltaReport | None = field(default=None, init=False)

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return self.plan.as_json()

    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""
        return self.plan.as_text(show)

    def parts(self, todo: Sequence[PlannedTensor], stage: Stage) -> Generator[Sequence[PlannedTensor]]:
        """See `Work.parts`: layer by layer where the method needs its inputs' moments."""
        return super().parts(todo, stage) if self.moments is None else self.moments.parts(todo, stage)

    @property
    def runs_models(self) -> bool:
        """See `Work.runs_models`."""
        return self.moments is not None

    def merged_by(self, variant: Variant, tensor: PlannedTensor) -> PlannedTensor:
        """See `Work.merged_by`; what was found out by running the models stays."""
        merged = super().merged_by(variant, tensor)
        return merged if self.moments is None else self.moments.merged_by(merged.method, tensor)

    def start(self, count: int) -> Sequence[Observer | None]:
        """The merge report of each merge, where there are task vectors to look at."""
        if self.detail == "none" or not self.plan.has_deltas:
            return super().start(count)
        reports = [DeltaReport(self.plan.models, full=self.detail == "full") for _ in range(count)]
        self._report = reports[0]
        return reports

    @cached_property
    def _compared_equal(self) -> set[int]:
        """Positions of the models that equal the base, found by comparing: a method in weight space sees no task vectors."""
        merged = [tensor for tensor in self.plan.tensors if tensor.method and tensor.method.space == "weights"]
        return {
            index
            for index in range(len(self.plan.models) if merged and self.plan.has_deltas else 0)
            if all(same_values(tensor.base, tensor.inputs[index]) for tensor in merged)
        }

    def warnings_of(self, findings: Findings) -> list[str]:
        """Models that equal the base, a base that is hardly theirs, and numbers that are not finite."""
        equal = sorted(self._compared_equal | findings.unchanged) if self.plan.has_deltas else []
        warnings = [
            f"{self.plan.models[index]} equals the base: its task vector is zero throughout." for index in equal
        ]
        if equal and len(equal) == len(self.plan.models):
            warnings.append("All models equal the base, and so does the output.")
        matrices = {tensor.spec.name for tensor in self.plan.tensors if not tensor.spec.is_vector}
        if self._report is not None and self._report.suspects_base(matrices):
            warnings.append(
                f"The task vectors of all models are nearly the same and large: is {self.inputs[0].label} the base that they were fine-tuned "
                "from? Name that one, or merge without a base (linear, slerp)."
            )
        return [*warnings, *findings.non_finite_warnings()]

    def closing_record(self, observer: Observer | None) -> dict[str, Any]:
        """The merge report."""
        return {"report": observer.as_json() if isinstance(observer, DeltaReport) else None}


def make_work(recipe: Recipe, opened: list[Model], options: RunOptions) -> Merge:
    """Plan a merge of opened models. Raises Refusals: everything that does not fit."""
    problems = Problems(_check_same(recipe, opened))
    plan: Plan | None = None
    with problems.collect():
        plan = make_plan(recipe, opened, max_shard_bytes=options.max_shard_bytes)
    problems.raise_if_any()
    assert plan is not None
    plan.notes += [note for model in opened for note in model.notes]
    moments, data = None, {}
    if plan.recipe.method_class.needs_data:
        from merging.model_texts import read_model_text

        moments, texts, moment_notes = prepare_moments(plan, opened, options, read_model_text)
        plan.notes += moment_notes
        data = {"data": texts}
    name = plan.recipe.merge_method
    code = {}
    if is_outside(name):
        from merging.methods.outside import source_digest

        code = {"method_source": source_digest(name)}
    return Merge(
        verb="merging",
        inputs=opened,
        tensors=plan.tensors,
        shards=plan.shards,
        files=plan.files,
        out_dtype=plan.recipe.out_dtype,
        decides={**plan.recipe.as_json(), **code, **data},
        recipe=plan.recipe.as_json(),
        card=f"{card_head(plan.recipe, opened)}\n\n{card_text(plan.recipe)}",
        notes=plan.notes,
        warnings=plan.warnings,
        plan=plan,
        detail=options.report,
        moments=moments,
    )


def prepare_moments(
    plan: Plan, opened: Sequence[Model], options: RunOptions, read: Callable[[Model, str, int], ModelText]
) -> tuple[MomentsPass, list[dict[str, Any]], list[str]]:
    """What runs the models, what on, and what to say of it.

    Args:
        read: gives a model's text, as `read_model_text` does.

    Raises: Refusals: texts that cannot be read or are too short, models that cannot be run.
    """
    from merging.model_texts import ModelText, check_tokens
    from merging.moments_pass import MomentsPass, texts_as_json

    recipe, problems = plan.recipe, Problems()
    by_key = {source_key(name): model for name, model in zip(recipe.inputs, opened, strict=True)}
    models = [by_key[source_key(source.name)] for source in recipe.models]
    if plan.is_stacked:
        raise ArgumentError(
            f"{setting('models')}: {recipe.merge_method} merges whole models, which it runs. Name no layers."
        )
    chosen = {key: recipe.parameters[key] for key in ("data_tokens", "inputs")}
    for key, value in chosen.items():
        if not value.is_constant:
            raise ArgumentError(f"{setting(key)}: expected one value for all tensors, got several.")
    tokens, has_base = int(chosen["data_tokens"].at("", 0.0)), recipe.uses("base_weight")
    is_merged = chosen["inputs"].at("", 0.0) == "merged"
    if is_merged and has_base:
        raise ArgumentError(
            f"{setting('inputs', 'merged')}: {setting('base_weight')} takes the base's own inputs. Leave one of them out."
        )
    sources = [source.data or "" for source in recipe.models]
    asked = [(model, [source]) for model, source in zip(models, sources, strict=True)]
    asked += [(opened[0], sources)] if has_base else []
    texts: list[ModelText] = []
    for model, files in asked:
        with problems.collect():
            text = ModelText.joined([read(model, file, tokens) for file in files])
            check_tokens(text, model, opened[0], is_merged=is_merged)
            texts.append(text)
    problems.raise_if_any()
    models = [model for model, _ in asked]
    moments = MomentsPass(
        models, texts, options.stream, plan.tensors, has_base=has_base, is_merged=is_merged, processes=options.processes
    )
    count = moments.check()
    lines = [
        f"{entry['model']}: runs on {entry['documents']} documents of {'all tasks' if has_base and at == len(models) - 1 else 'its own task'}, {entry['tokens']} tokens."
        for at, entry in enumerate(texts_as_json(models, texts))
    ]
    rest = sum(tensor.method is not None for tensor in plan.tensors) - count
    lines.append(
        Remark(
            f"{recipe.merge_method}: {count} matrices are merged by the moments of their inputs, {rest} other tensors by {setting('rest_lambda')}."
        )
    )
    return moments, texts_as_json(models, texts), lines


def card_head(recipe: Recipe, opened: Sequence[Model]) -> str:
    """The model card's list of what was merged."""
    has_base = recipe.base_model is not None
    listed = "\n".join(f"- {markdown_code(model.label)}" for model in opened[has_base:])
    fine_tuned = f", fine-tuned from {markdown_code(opened[0].label)}" if has_base else ""
    return f"A merge of these models{fine_tuned}:\n\n{listed}"


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
        from alignment.tokenizer_choice import template_label

        given["chat_template"] = template_label(keys["chat_template"])
    settings = [
        f"{key} {markdown_code(text_of(value) if isinstance(value, bool | list) else str(value))}"
        for key, value in given.items()
        if value is not None
    ]
    lines = [", ".join([f"Method `{recipe.merge_method}`", *settings])]
    sources = [source for part in recipe.slices for source in part.sources]
    own = list(dict.fromkeys(key for source in sources for key in source.parameters))
    columns = [*(["layers"] if recipe.is_sliced else []), *own]
    if columns:
        lines += ["", f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        lines += [
            f"| {markdown_code_cell(str(source.name))} | {' | '.join(map(markdown, _cells(source, columns)))} |"
            for source in sources
        ]
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
    step: Step | None = None,
    download: bool = True,
    make: Callable[[list[Model], RunOptions], Merge] | None = None,
) -> Job:
    """Open the inputs and plan; nothing is written.

    Hub models are planned from their headers first, so that what does not fit is said before gigabytes are fetched.

    Args:
        recipe, save_path, options: see `merge`.
        step: what happens to the merge before it is written (AIM).
        download: False leaves the weights of hub models where they are (a dry run).
        make: plans the opened models otherwise than as the recipe says (`merging.sweep`).

    Raises: Refusals: everything that keeps the merge from working.
    """

    def plan(opened: list[Model]) -> Job:
        def plan_merge() -> Merge:
            work = make(opened, options) if make is not None else make_work(recipe, opened, options)
            if step is not None:
                _check_relaxable(recipe, work)
            return work

        return plan_job(plan_merge, opened, save_path, options, step)

    with named_by(recipe.places):
        return open_and_plan(
            recipe.inputs, plan, download=download, quiet=options.quiet, trust_remote_code=options.trust_remote_code
        )


def _check_relaxable(recipe: Recipe, work: Merge) -> None:
    """Raise ArgumentError where a step has no base to look at: there is none, or the output's layers are not its."""
    if recipe.base_model is None:
        raise ArgumentError(f"{setting('base_model')}: AIM needs one. Name it, or leave AIM out.")
    if work.plan.is_stacked:
        raise ArgumentError(
            f"{setting('omega')}: the recipe stacks layers, so that the base has none to match. Merge whole models, or leave AIM out."
        )


def _check_same(recipe: Recipe, opened: Sequence[Model]) -> list[InputError]:
    """Refuse two names of one folder among the models merged with each other: of a hub model its branch and its commit, say."""
    models = {source_key(name): model for name, model in zip(recipe.inputs, opened, strict=True)}
    problems: list[InputError] = []
    for part in recipe.slices:
        seen: dict[tuple[Path, ...], Model] = {}
        for model in (models[source_key(source.name)] for source in part.sources):
            other = seen.setdefault(model.folders, model)
            if other is not model:
                problems.append(
                    ArgumentError(
                        f"{setting('models')}: {other.label} and {model.label} are the same model. Give it once, with the sum of its weights."
                    )
                )
    return problems


def merge(
    recipe: Recipe,
    save_path: Path | str,
    options: RunOptions | None = None,
    progress: Callable[[int], object] | None = None,
    *,
    aim: Request | None = None,
) -> Result:
    """Merge models into a new checkpoint folder; where an earlier call has, find it complete.

    Args:
        recipe: from `make_recipe` or `read_recipe_file`.
        save_path: the folder to be; it appears when it is complete, or not at all.
        options: how to run.
        progress: called with numbers of bytes read and written as they are done, from several threads.
        aim: relaxes the merge by the base's activations before it is written: an `aim.AimRequest`.

    Returns: what was done; `was_complete` where the folder holds already what this recipe makes of these inputs.

    Raises:
        InputError: an input or the output folder does not fit (`Refusals`, before anything is written), or a number is not
            finite, or the disk fails.
    """
    if recipe.aim is not None and aim is None:
        raise ArgumentError(
            f"{recipe.places.get('aim', 'aim')}: the recipe asks for AIM. Pass aim=read_request(recipe.aim), from the package aim, or "
            "take it out of the recipe."
        )
    save_path, options = Path(save_path), options or RunOptions()
    step = aim.step(save_path, options) if aim else None
    with named_by(recipe.places):
        job = prepare(recipe, save_path, options, step=step)
        return job.run(Console(bar=bar_of(progress)) if progress else None)
