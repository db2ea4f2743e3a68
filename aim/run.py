"""Relax an existing checkpoint: performAIM's own run, from two opened models to finished folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from aim.calibrate import Numerics
from aim.relaxing import Relaxations, Relaxing, make_relaxations, outputs_of
from aim.statistics import Activations
from checkpoints.errors import ArgumentError, InputError, Refusals, unknown
from checkpoints.location import ModelName, parse_name
from checkpoints.model import Model, close_all, open_and_plan
from checkpoints.provenance import fingerprint
from checkpoints.sidecars import side_file_bytes
from checkpoints.source import FLOAT_DTYPES, TensorInfo, TensorRef
from checkpoints.staging import check_save_path, check_space
from checkpoints.writer import plan_shards
from streaming.blocks import Block, Scan, TensorSpec
from streaming.matching import check_plain, left_out, list_kinds, match_model
from streaming.output import RunOptions, Variant, Written, bytes_read, write_checkpoints, write_description
from streaming.stream import PlannedTensor

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
    vocabulary, where they fit.
    """

    base: Model
    merged: Model
    tensors: tuple[PlannedTensor, ...]
    notes: list[str]
    save_path: Path
    options: RunOptions
    out_dtype: str

    @property
    def bytes_to_read(self) -> int:
        """Bytes of all inputs, each counted once, where every tensor is relaxed; see `bytes_to_move`."""
        return sum(ref.info.nbytes for tensor in self.tensors for ref in {tensor.base, *tensor.inputs})

    @property
    def bytes_to_write(self) -> int:
        """Bytes of one output's tensors."""
        return sum(tensor.spec.numel * tensor.dtype.itemsize for tensor in self.tensors)

    def bytes_to_move(self, relaxations: Relaxations) -> int:
        """Bytes that `run` reads and writes; of a tensor that no omega relaxes, the base's is not read."""
        transforms = [variant.transform for variant in relaxations.variants]
        return bytes_read(self.tensors, transforms) + self.bytes_to_write * len(transforms)

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

    def run(self, relaxations: Relaxations, progress: Callable[[int], object] = lambda count: None) -> Written:
        """Relax and write; one reading of base and merged, one checkpoint for each variant."""
        infos = {tensor.spec.name: TensorInfo(tensor.dtype, tensor.spec.shape) for tensor in self.tensors}
        merged_fingerprint = fingerprint(self.merged.weights)
        shards = plan_shards(infos, self.options.max_shard_bytes)

        def describe(folder: Path, variant: Variant, outputs: Mapping[str, Any], unchanged: set[int]) -> None:
            details = dict(variant.details())
            details["aim"] = {**details["aim"], "merged_fingerprint": merged_fingerprint}
            write_description(
                folder,
                title=" ".join(filter(None, (self.save_path.resolve().name, variant.folder))),
                primary=self.merged,
                inputs=(self.base, self.merged),
                out_dtype=self.out_dtype,
                card=f"`{self.merged.label}`, a model merged from fine-tunes of `{self.base.label}`, relaxed towards it.\n\n{variant.card}",
                recipe={
                    "merge_method": "passthrough",
                    "base_model": self.base.label,
                    "models": [{"model": self.merged.label, "parameters": {}}],
                    "parameters": {},
                    "out_dtype": self.out_dtype,
                    "seed": None,
                    **details,
                    "outputs": outputs,
                    "notes": self.notes,
                    "warnings": relaxations.warnings,
                },
                options=self.options,
            )

        return write_checkpoints(
            self.tensors,
            shards,
            relaxations.variants,
            self.save_path,
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
    omegas: int = 1,
    numerics: Numerics = "float32",
) -> AimJob:
    """Match the base's tensors with the merged model's; nothing is written.

    Args:
        base, merged: opened. The output has the merged model's tensors, dtypes, tokenizer and side files.
        save_path, options: where to and how.
        out_dtype: `auto` keeps each tensor's dtype in the merged model; under `reference` it means bfloat16.
        omegas: checkpoints that will be written, for the disk space.
        numerics: `reference` gives a token that the base lacks the mean of the base's rows; else it stays as merged.

    Raises: Refusals: everything that does not fit.
    """
    folders = [base.location.folder, merged.location.folder]
    problems: list[str | InputError] = list(check_save_path(save_path, folders, overwrite=options.overwrite))
    for model in (base, merged):
        problems += check_plain(model)
    if out_dtype not in OUT_DTYPES:
        problems.append(ArgumentError(f"--dtype: {unknown('dtype', out_dtype, OUT_DTYPES)}"))
    if problems:
        raise Refusals(problems)
    dropped = left_out(merged)
    names = [name for name in merged.weights.tensors if name not in dropped]
    new_rows: Literal["base", "mean"] = "mean" if numerics == "reference" else "base"
    matched = match_model(merged, base, names, new_rows=new_rows, advice=ITS_BASE)
    problems += matched.problems
    if problems:
        raise Refusals(problems)
    notes = list(matched.notes)
    if dropped:
        notes.insert(0, f"{merged.label}: left out, as loading ignores or recomputes them: {list_kinds(dropped)}.")
    if base.location.folder == merged.location.folder:
        notes.append(f"{merged.label}: is the base itself, so that relaxing changes nothing.")
    if numerics == "reference" and out_dtype == "auto":
        out_dtype = "bfloat16"  # what the published program writes, whatever the merge is stored in
    tensors = tuple(_plan_tensor(merged, name, matched.tensors.get(name), out_dtype) for name in names)
    job = AimJob(base, merged, tensors, notes, save_path, options, out_dtype)
    problems += check_space(save_path, omegas * (job.bytes_to_write + side_file_bytes(merged.location.folder)))
    if problems:
        raise Refusals(problems)
    return job


def open_job(
    base: str,
    merged: str,
    save_path: Path,
    how: Relaxing,
    options: RunOptions,
    *,
    out_dtype: str = "auto",
    check: Callable[[Model], object] | None = None,
    download: bool = True,
) -> AimJob:
    """Open two models by name and prepare; see `prepare` and `open_and_plan`. Raises Refusals."""

    def plan(opened: list[Model]) -> AimJob:
        numbers = {"omegas": len(how.omegas), "numerics": how.numerics}
        return prepare(opened[0], opened[1], save_path, options, out_dtype=out_dtype, **numbers)  # type: ignore[arg-type]

    names = [_parse("--pretrained_model_name", base), _parse("--merged_model", merged)]
    return open_and_plan(
        names, plan, check=check, download=download, quiet=options.quiet, trust_remote_code=options.trust_remote_code
    )


def _parse(flag: str, text: str) -> ModelName:
    try:
        return parse_name(text)
    except ArgumentError as error:
        raise ArgumentError(f"{flag}: {error}") from None


def _plan_tensor(merged: Model, name: str, base: TensorRef | None, out_dtype: str) -> PlannedTensor:
    own = TensorRef(merged.weights, name)
    spec = TensorSpec(name, own.info.shape)
    dtype = own.info.dtype
    if dtype.is_floating_point:  # float64, in which nothing is computed, is written as float32
        dtype = FLOAT_DTYPES.get(out_dtype, torch.float32 if dtype == torch.float64 else dtype)
    if base is None or not own.info.dtype.is_floating_point:
        return PlannedTensor(spec, dtype, own, (), None, "not in the base" if base is None else "not a weight")
    return PlannedTensor(spec, dtype, base, (own,), Keep())


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
    job = prepare(
        base, merged, Path(save_path), options, out_dtype=out_dtype, omegas=len(how.omegas), numerics=how.numerics
    )
    outputs = outputs_of(job.tensors)
    return job.run(make_relaxations(base, activations, how, device=options.stream.device, outputs=outputs))
