"""Relax an existing checkpoint: performAIM's own run, from two opened models to finished folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from aim.calibrate import Numerics
from aim.relaxing import Relaxations, Relaxing, make_relaxations, names_of, outputs_of
from aim.statistics import Activations
from alignment.align import Alignment, align
from alignment.layout import Layout, NewTokenRows
from alignment.stored import check_plain
from alignment.tokenizer_choice import choose_tokenizer_files
from checkpoints.errors import ArgumentError, InputError, Refusals, unknown
from checkpoints.location import ModelName, parse_model
from checkpoints.model import Model, close_all, open_and_plan
from checkpoints.sidecars import SideFiles
from checkpoints.source import FLOAT_DTYPES, TensorInfo
from checkpoints.staging import Stage, check_complete, check_save_path, check_space, read_recipe, staged
from checkpoints.writer import Shard, plan_shards
from streaming.blocks import Block, Scan, TensorSpec
from streaming.output import (
    Findings,
    RunOptions,
    Variant,
    Written,
    bytes_written,
    identity_of,
    unfinished,
    write_checkpoints,
    write_description,
)
from streaming.stream import PlannedTensor, bytes_read

OUT_DTYPES = ("auto", "float32", "bfloat16", "float16")
ITS_BASE = "Name the base that the merged model was made from."


class Keep:
    """The merger of a run that merges nothing: the one model as it is."""

    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False

    def measure(self, tensor: TensorSpec, scan: Scan) -> None:
        """Nothing to measure."""

    def combine(self, block: Block, statistics: None) -> torch.Tensor:
        """The model's own weights."""
        return block.weights[0]


@dataclass
class AimJob:
    """A relaxation of an existing merge that has been planned and can be run.

    base: the pretrained model; merged: what is relaxed; base_as_merged: the base's tensors under the merged one's names and
    vocabulary, where they fit; folders: of the checkpoints to be, below `save_path`; aim: how it is relaxed, for JSON.
    """

    base: Model
    merged: Model
    tensors: tuple[PlannedTensor, ...]
    files: SideFiles
    layout: Layout
    notes: list[str]
    save_path: Path
    options: RunOptions
    out_dtype: str
    folders: Sequence[str]
    aim: Any

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all inputs, each counted once, where every tensor is relaxed; see `bytes_to_move`."""
        return sum(ref.info.nbytes for tensor in self.tensors for ref in {tensor.base, *tensor.inputs})

    @property
    def bytes_to_write(self) -> int:
        """Bytes of one output's tensors."""
        return bytes_written(self.tensors)

    def bytes_to_move(self, stage: Stage, relaxations: Relaxations) -> int:
        """Bytes that `run` reads and writes; of a tensor that no omega relaxes, the base's is not read."""
        transforms = [variant.transform for variant in relaxations.variants]
        todo = unfinished(self.tensors, stage)
        return bytes_read(todo, transforms) + bytes_written(todo) * len(transforms)

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "refusals": [],
            "merged_model": self.merged.label,
            "base_model": self.base.label,
            "tensors": len(self.tensors),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """The plan for people."""
        lines = [f"merged model {self.merged.label}, base {self.base.label}"]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(
            f"reads {self.bytes_to_read:,} bytes; writes {self.bytes_to_write:,} bytes an omega. Nothing was written."
        )
        return "\n".join(lines)

    def close(self) -> None:
        """Close the inputs, for a job that is not run."""
        close_all((self.base, self.merged))

    @cached_property
    def shards(self) -> list[Shard]:
        """The files to be written."""
        infos = {tensor.spec.name: TensorInfo(tensor.dtype, tensor.spec.shape) for tensor in self.tensors}
        return plan_shards(infos, self.options.max_shard_bytes)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the output's bytes."""
        recipe = {"merged_model": self.merged.label, "base_model": self.base.label, "out_dtype": self.out_dtype}
        recipe |= self.layout.as_json()
        return identity_of(recipe, (self.base, self.merged), self.shards, self.files, self.options, aim=self.aim)

    def staged(self) -> AbstractContextManager[Stage]:
        """The folder to `run` in, which becomes the output when the context ends well. Raises as `checkpoints.staging.staged`."""
        return staged(
            self.save_path,
            overwrite=self.options.overwrite,
            folders=self.folders,
            identity=self.identity,
            resume=self.options.resume,
        )

    def run(
        self, stage: Stage, relaxations: Relaxations, progress: Callable[[int], object] = lambda count: None
    ) -> Written:
        """Relax and write; one reading of base and merged, one checkpoint for each variant.

        Args:
            stage: from `staged`, still open.
        """

        def describe(folder: Path, variant: Variant, outputs: Mapping[str, Any], findings: Findings) -> None:
            write_description(
                folder,
                title=" ".join(filter(None, (self.save_path.resolve().name, variant.folder))),
                files=self.files,
                inputs=(self.base, self.merged),
                out_dtype=self.out_dtype,
                card=f"`{self.merged.label}`, a model merged from fine-tunes of `{self.base.label}`, relaxed towards it.\n\n{variant.card}",
                recipe={
                    "merge_method": "passthrough",
                    "base_model": self.base.label,
                    "models": [{"model": self.merged.label, "parameters": {}}],
                    "parameters": {},
                    **self.layout.as_json(),
                    "out_dtype": self.out_dtype,
                    "seed": None,
                    **variant.details(),
                    "merged_recipe": read_recipe(self.merged.location.folder),
                    "outputs": outputs,
                    "notes": self.notes,
                    "warnings": [*relaxations.warnings, *findings.non_finite_warnings()],
                },
                identity=stage.identity,
                options=self.options,
            )

        return write_checkpoints(
            self.tensors,
            self.shards,
            relaxations.variants,
            stage,
            inputs=(self.base, self.merged),
            options=self.options,
            describe=describe,
            progress=progress,
        )


def prepare(
    base: Model,
    merged: Model,
    save_path: Path,
    options: RunOptions,
    *,
    out_dtype: str = "auto",
    how: Relaxing,
    aim: Any,
    layout: Layout | None = None,
) -> AimJob:
    """Match the base's tensors with the merged model's; nothing is written.

    Args:
        base, merged: opened. The output has the merged model's tensors, dtypes, tokenizer and side files.
        save_path, options: where to and how.
        out_dtype: `auto` keeps each tensor's dtype in the merged model; under `reference` it means bfloat16.
        how: omegas and numerics.
        aim: what decides how it is relaxed, for JSON; it is part of the run's identity.
        layout: `new_token_rows` decides on a token that the base lacks: `owner` leaves it as merged, `mean` takes the mean of
            the base's rows for the base's; the rest on head and tokenizer files. The vocabulary is the merged model's.

    Raises: Refusals: everything that does not fit; AlreadyComplete: it has been done.
    """
    problems: list[str | InputError] = []
    for model in (base, merged):
        problems += check_plain(model)
    if out_dtype not in OUT_DTYPES:
        problems.append(ArgumentError(f"--dtype: {unknown('dtype', out_dtype, OUT_DTYPES)}"))
    if problems:
        raise Refusals(problems)
    alignment = align(merged, [base], layout or layout_of(how.numerics), advice=ITS_BASE)
    choose_tokenizer_files(alignment.files, alignment.layout, (merged, base), alignment.problems)
    alignment.problems.raise_if_any()
    notes = alignment.problems.notes
    if base.folders == merged.folders:
        notes.append(f"{merged.label}: is the base itself, so that relaxing changes nothing.")
    if how.numerics == "reference" and out_dtype == "auto":
        out_dtype = "bfloat16"  # what the published program writes, whatever the merge is stored in
    tensors = tuple(_plan_tensor(alignment, name, out_dtype) for name in alignment.dtypes)
    more = (how.folders, aim)
    job = AimJob(base, merged, tensors, alignment.files, alignment.layout, notes, save_path, options, out_dtype, *more)
    if not options.overwrite and base.weights.is_here and merged.weights.is_here:
        check_complete(save_path, how.folders, job.identity)
    problems += check_save_path(save_path, [*base.folders, *merged.folders], overwrite=options.overwrite)
    if not problems:
        problems += check_space(save_path, len(how.folders) * (job.bytes_to_write + job.files.nbytes))
    if problems:
        raise Refusals(problems)
    return job


def layout_of(numerics: Numerics, new_token_rows: NewTokenRows | None = None, **more: Any) -> Layout:
    """The output's layout: the merged model's vocabulary.

    Args:
        more: what else `Layout` has, such as `tie_word_embeddings`.

    Raises: ArgumentError: the published program knows mean rows only; InputError: as `Layout`.
    """
    if numerics == "reference" and new_token_rows not in (None, "mean"):
        raise ArgumentError(
            f"--new_token_rows {new_token_rows}: --numerics reference takes the mean, as the published program does. Leave it out."
        )
    default: NewTokenRows = "mean" if numerics == "reference" else "owner"
    return Layout("base", new_token_rows or default, **more)


def open_job(
    base: str,
    merged: str,
    save_path: Path,
    how: Relaxing,
    options: RunOptions,
    *,
    aim: Any,
    out_dtype: str = "auto",
    layout: Layout | None = None,
    check: Callable[[Model], object] | None = None,
    download: bool = True,
) -> AimJob:
    """Open two models by name and prepare; see `prepare` and `open_and_plan`. Raises Refusals."""

    def plan(opened: list[Model]) -> AimJob:
        keywords: dict[str, Any] = {"out_dtype": out_dtype, "how": how, "aim": aim, "layout": layout}
        return prepare(opened[0], opened[1], save_path, options, **keywords)

    names = [_parse("--pretrained_model_name", base), _parse("--merged_model", merged)]
    return open_and_plan(
        names, plan, check=check, download=download, quiet=options.quiet, trust_remote_code=options.trust_remote_code
    )


def _parse(flag: str, text: str) -> ModelName:
    try:
        return parse_model(text)
    except ArgumentError as error:
        raise ArgumentError(f"{flag}: {error}") from None


def _plan_tensor(alignment: Alignment, name: str, out_dtype: str) -> PlannedTensor:
    own, dtype = alignment.first.tensors[name], alignment.dtypes[name]
    base = alignment.models[1].tensors.get(name)
    spec = TensorSpec(name, own.info.shape)
    if dtype.is_floating_point:  # float64, in which nothing is computed, is written as float32
        dtype = FLOAT_DTYPES.get(out_dtype, torch.float32 if dtype == torch.float64 else dtype)
    if base is None or not dtype.is_floating_point:
        return PlannedTensor(spec, dtype, own, (), None, "not in the base" if base is None else "not a weight")
    return PlannedTensor(spec, dtype, base, (own,), Keep(), base_name=alignment.models[1].own_names.get(name, name))


def relax_checkpoint(
    merged: Model,
    base: Model,
    activations: Activations,
    save_path: Path | str,
    how: Relaxing | None = None,
    options: RunOptions | None = None,
    *,
    out_dtype: str = "auto",
) -> Written:
    """Relax a merged checkpoint by the base's activations: one folder, or for several omegas one below it for each.

    Args:
        merged, base: from `checkpoints.model.open_model`.
        activations: from `calibrate` or `load_activations`, of this base.
        save_path: the folder to be; it appears complete or not at all.
        how: omegas, scaling, control; options, out_dtype: see `prepare`.

    Raises: InputError: anything does not fit; nothing is left behind.
    """
    how, options = how or Relaxing(), options or RunOptions()
    aim = {**how.as_json(), "statistics": activations.digest()}
    job = prepare(base, merged, Path(save_path), options, out_dtype=out_dtype, how=how, aim=aim)
    outputs, names, device = outputs_of(job.tensors), names_of(job.tensors), options.stream.device
    relaxations = make_relaxations(base, activations, how, device=device, outputs=outputs, names=names)
    with job.staged() as stage:
        return job.run(stage, relaxations)
