"""Relax an existing checkpoint: a job of its own, from two models to finished folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from aim.activations import Activations
from aim.calibrate import Numerics, select
from aim.choices import Relaxing
from aim.request import AimRequest
from alignment.align import Alignment, align
from alignment.configs import check_configs
from alignment.layout import Layout, NewTokenRows
from alignment.output_check import check_output
from alignment.stored import check_plain
from alignment.tokenizer_choice import choose_tokenizer_files
from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.escaping import markdown_code
from checkpoints.location import ModelName, parse_model
from checkpoints.model import Model, open_and_plan
from checkpoints.problems import Problems
from checkpoints.save_path import read_recipe
from checkpoints.settings import Show, as_in_python, setting, shown
from checkpoints.source import FLOAT_DTYPES, TensorInfo
from checkpoints.writer import plan_shards
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Formula
from streaming.job import Job, Result, Step, plan_job
from streaming.output import RunOptions
from streaming.stream import PlannedTensor
from streaming.work import Work

OUT_DTYPES = ("auto", "float32", "bfloat16", "float16")
ITS_BASE = "Name the base that the merged model was made from."


class Keep:
    """The merger of a run that merges nothing: the one model as it is."""

    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    def measure(self, tensor: TensorSpec, scan: Scan) -> None:
        """Nothing to measure."""

    def combine(self, block: Block, statistics: None) -> torch.Tensor:
        """The model's own weights."""
        return block.weights[0]

    def formula(self, tensor: TensorSpec, statistics: None) -> Formula:
        """See `combine`."""
        return lambda x: x.models[0]


@dataclass(kw_only=True)
class Relaxed(Work):
    """A planned relaxation of an existing merge as a work.

    Attributes:
        merged: what is relaxed; the first input is its base.
    """

    merged: Model

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "refusals": [],
            "merged_model": self.merged.label,
            "base_model": self.base.label,
            "tensors": len(self.tensors),
            "bytes_to_read": sum(ref.info.nbytes for tensor in self.tensors for ref in {tensor.base, *tensor.inputs}),
            "bytes_to_write": self.bytes_to_write,
            "notes": self.notes,
        }

    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""
        plan = self.as_json()
        lines = [f"merged model {self.merged.label}, base {self.base.label}"]
        lines += [f"note: {shown(note, show)}" for note in self.notes]
        lines += [f"warning: {shown(warning, show)}" for warning in self.warnings]
        lines.append(
            f"reads {plan['bytes_to_read']:,} bytes; writes {plan['bytes_to_write']:,} bytes an omega. Nothing was written."
        )
        return "\n".join(lines)


def make_work(
    base: Model,
    merged: Model,
    options: RunOptions,
    how: Relaxing,
    *,
    out_dtype: str = "auto",
    layout: Layout | None = None,
) -> Relaxed:
    """Match the base's tensors with the merged model's.

    Args:
        base, merged: opened. The output has the merged model's tensors, dtypes, tokenizer and side files.
        options: how to run.
        how: omegas and numerics.
        out_dtype: `auto` keeps each tensor's dtype in the merged model; under `reference` it means bfloat16.
        layout: `new_token_rows` decides on a token that the base lacks: `owner` leaves it as merged, `mean` takes the mean of
            the base's rows for the base's; the rest on head and tokenizer files. The vocabulary is the merged model's.

    Raises: Refusals: everything that does not fit.
    """
    # What keeps everything else from being looked at.
    problems = Problems()
    for model in (base, merged):
        problems.extend(check_plain(model))
    if out_dtype not in OUT_DTYPES:
        problems.add(ArgumentError(f"{setting('out_dtype')}: {unknown('dtype', out_dtype, OUT_DTYPES)}"))
    problems.raise_if_any()
    # The base under the merged model's names, and files, configs and selection that fit.
    alignment = align(merged, [base], layout or layout_of(how.numerics), advice=ITS_BASE)
    check_configs((merged, base), alignment.layout.allow_config_difference, problems, is_base=False)
    choose_tokenizer_files(alignment.files, alignment.layout, (merged, base), alignment.problems)
    problems.take(alignment.problems)
    warnings: list[str] = []
    with problems.collect():
        warnings = select(base, how.numerics)[1]
    problems.raise_if_any()
    notes = problems.notes
    # Every tensor of the merged model, as it will be written.
    if base.folders == merged.folders:
        notes.append(f"{merged.label}: is the base itself, so that relaxing changes nothing.")
    if how.numerics == "reference" and out_dtype == "auto":
        out_dtype = "bfloat16"  # what the published program writes, whatever the merge is stored in
    tensors = tuple(_plan_tensor(alignment, name, out_dtype) for name in alignment.dtypes)
    infos = {tensor.spec.name: TensorInfo(tensor.dtype, tensor.spec.shape) for tensor in tensors}
    modules = merged.weights.modules.tensors
    own = {name: info.shape for name, info in infos.items() if name not in modules}
    check_output(alignment.files, own, merged, problems)
    problems.raise_if_any()
    written = {"merged_model": merged.label, "base_model": base.label, "out_dtype": out_dtype}
    return Relaxed(
        verb="relaxing",
        inputs=(base, merged),
        tensors=tensors,
        shards=plan_shards(infos, options.max_shard_bytes, modules.keys()),
        files=alignment.files,
        out_dtype=out_dtype,
        decides={**written, **alignment.layout.as_json()},
        recipe={
            "merge_method": "passthrough",
            "base_model": base.label,
            "models": [{"model": merged.label, "parameters": {}}],
            "parameters": {},
            **alignment.layout.as_json(),
            "out_dtype": out_dtype,
            "seed": None,
        },
        record={"merged_recipe": read_recipe(merged.location.folder)},
        card=f"{markdown_code(merged.label)}, a model merged from fine-tunes of {markdown_code(base.label)}, relaxed towards it.",
        notes=notes,
        warnings=[*problems.warnings, *warnings],
        merged=merged,
    )


def layout_of(numerics: Numerics, new_token_rows: NewTokenRows | None = None, **more: Any) -> Layout:
    """The output's layout: the merged model's vocabulary.

    Args:
        more: what else `Layout` has, such as `tie_word_embeddings`.

    Raises: ArgumentError: the published program knows mean rows only; InputError: as `Layout`.
    """
    if numerics == "reference" and new_token_rows not in (None, "mean"):
        raise ArgumentError(
            f"{setting('new_token_rows', new_token_rows)}: {setting('numerics', 'reference')} takes the mean, as the published program does. Leave it out."
        )
    default: NewTokenRows = "mean" if numerics == "reference" else "owner"
    return Layout("base", new_token_rows or default, **more)


def prepare(
    base: str,
    merged: str,
    save_path: Path,
    options: RunOptions,
    step: Step,
    how: Relaxing,
    *,
    out_dtype: str = "auto",
    layout: Layout | None = None,
    download: bool = True,
) -> Job:
    """Open two models by name and plan; nothing is written.

    Args:
        base, merged: folders or names on the hub.
        save_path, options: where to and how.
        step: carries out what `how` is a part of.
        out_dtype, layout: see `make_work`.
        download: False leaves the weights of hub models where they are (a dry run).

    Raises: Refusals: everything that does not fit.
    """

    def plan(opened: list[Model]) -> Job:
        def make() -> Relaxed:
            return make_work(opened[0], opened[1], options, how, out_dtype=out_dtype, layout=layout)

        return plan_job(make, opened, save_path, options, step)

    problems, names = Problems(), list[ModelName]()
    for name, text in (("pretrained_model_name", base), ("merged_model", merged)):
        try:
            names.append(parse_model(text))
        except InputError as error:
            problems.add(ArgumentError(f"{setting(name)}: {error.marked}"))
    problems.raise_if_any()
    return open_and_plan(
        names, plan, download=download, quiet=options.quiet, trust_remote_code=options.trust_remote_code
    )


def perform_aim(
    merged: str,
    base: str,
    save_path: Path | str,
    request: AimRequest | None = None,
    options: RunOptions | None = None,
    *,
    out_dtype: str = "auto",
) -> Result:
    """Relax a merged checkpoint, calibrating its base where the request does not bring statistics.

    Args:
        merged, base: folders or names on the hub.
        save_path: the folder to be; it appears complete or not at all.
        request: what to relax how far.
        options: how to run.
        out_dtype: see `make_work`.

    Returns: what was done; `was_complete` where the folder holds this very output already.

    Raises: InputError: anything does not fit; nothing is left behind.
    """
    save_path, request, options = Path(save_path), request or AimRequest(), options or RunOptions()
    step = request.step(save_path, options)
    return prepare(base, merged, save_path, options, step, request.relaxing, out_dtype=out_dtype).run()


def relax_checkpoint(
    merged: Model,
    base: Model,
    activations: Activations,
    save_path: Path | str,
    how: Relaxing | None = None,
    options: RunOptions | None = None,
    *,
    out_dtype: str = "auto",
) -> Result:
    """Relax an opened checkpoint by its base's activations: one folder, or for several omegas one below it for each.

    Args:
        merged, base: from `checkpoints.model.open_model`; they are closed when it has run.
        activations: from `calibrate` or `load_activations`, of this base.
        save_path: the folder to be; it appears complete or not at all.
        how: omegas, scaling, control.
        options, out_dtype: see `make_work`.

    Returns: what was done; `was_complete` where the folder holds this very output already.

    Raises: InputError: anything does not fit; nothing is left behind.
    """
    how, options, save_path = how or Relaxing(), options or RunOptions(), Path(save_path)
    step = AimRequest(how, activations).step(save_path, options)

    def make() -> Relaxed:
        return make_work(base, merged, options, how, out_dtype=out_dtype)

    return plan_job(make, (base, merged), save_path, options, step).run()


def _plan_tensor(alignment: Alignment, name: str, out_dtype: str) -> PlannedTensor:
    own, dtype = alignment.first.tensors[name], alignment.dtypes[name]
    aligned = alignment.models[1]
    base = aligned.tensors.get(name)
    spec = TensorSpec(name, own.info.shape)
    if dtype.is_floating_point:  # float64, in which nothing is computed, is written as float32
        dtype = FLOAT_DTYPES.get(out_dtype, torch.float32 if dtype == torch.float64 else dtype)
    if base is None or not dtype.is_floating_point:
        return PlannedTensor(spec, dtype, own, (), None, "not in the base" if base is None else "not a weight")
    return PlannedTensor(spec, dtype, base, (own,), Keep(), origins=aligned.origins(name))
