"""A stream's results on disk: one folder, or one for each variant of a sweep, that appear when all are complete."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from checkpoints.model import Model, close_all
from checkpoints.provenance import Digest, describe_input, model_card, versions, write_recipe
from checkpoints.sidecars import copy_side_files
from checkpoints.staging import staged
from checkpoints.writer import CheckpointWriter, Shard, write_file
from streaming.stream import Observer, Output, PlannedTensor, StreamOptions, Transform, stream

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class RunOptions:
    """How a run goes and what is written beside the tensors, whose bytes depend on none of it.

    Attributes:
        stream: device, threads, size of a block.
        max_shard_bytes: size of the output's files.
        digest: which digests merge_recipe.json gets.
        report: the merge report: `sample` of one block in 16, `full`, or `none`.
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


def no_details() -> dict[str, Any]:
    """Nothing to add to merge_recipe.json."""
    return {}


@dataclass(frozen=True)
class Variant:
    """One checkpoint of a run.

    folder: below the save path; empty where the run writes one checkpoint, the save path itself.
    transform: what changes the merge on its way there.
    details: asked when the weights are written: further keys of its merge_recipe.json.
    card: a paragraph of its model card.
    """

    folder: str = ""
    transform: Transform | None = None
    details: Callable[[], Mapping[str, Any]] = no_details
    card: str = ""


@dataclass(frozen=True)
class Written:
    """What a run moved.

    bytes_read counts every input tensor once; peak_memory_bytes is the largest resident memory the process ever had.
    """

    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    unchanged: frozenset[int]
    """Positions of the models whose task vectors are zero throughout; see `stream`."""


Describe = Callable[[Path, Variant, Mapping[str, Mapping[str, int | str]], set[int]], None]
"""Writes what is no weight into a variant's folder, given the digests of its files and the models that changed nothing."""


def write_checkpoints(
    tensors: Sequence[PlannedTensor],
    shards: list[Shard],
    variants: Sequence[Variant],
    save_path: Path,
    *,
    inputs: Sequence[Model],
    options: RunOptions,
    describe: Describe,
    observer: Observer | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Written:
    """Stream `tensors` into every variant's folder; all appear at `save_path` together, or none does.

    Args:
        tensors, shards: what to write, from what, and into which files.
        variants: at least one.
        inputs: every opened model; each must be unchanged at the end, and is closed then.
        describe: called for each variant once its weights are on the disk.
        observer, progress: see `stream`.

    Raises: InputError: as `stream` and `staged`; nothing is left behind.
    """
    started = time.monotonic()
    with ExitStack() as end:
        end.callback(close_all, inputs)
        work = end.enter_context(staged(save_path, overwrite=options.overwrite))
        folders = [work / variant.folder for variant in variants]
        writers: list[CheckpointWriter] = []
        try:
            for folder in folders:
                folder.mkdir(exist_ok=True)
                writers.append(CheckpointWriter(folder, shards, digest=options.digest != "none"))
            outputs = [Output(writer, variant.transform) for writer, variant in zip(writers, variants, strict=True)]
            unchanged = stream(tensors, outputs, options=options.stream, observer=observer, progress=progress)
            digests = [writer.close() for writer in writers]
        finally:
            for writer in writers:
                writer.release()
        for model in inputs:
            model.weights.check_unchanged()
        for folder, variant, digest in zip(folders, variants, digests, strict=True):
            describe(folder, variant, digest, unchanged)
    return Written(
        bytes_read(tensors, [variant.transform for variant in variants]),
        sum(shard.size for shard in shards) * len(variants),
        time.monotonic() - started,
        peak_memory_bytes(),
        frozenset(unchanged),
    )


def bytes_read(tensors: Sequence[PlannedTensor], transforms: Sequence[Transform | None] = ()) -> int:
    """Bytes of every input tensor that a stream needs, each counted once."""
    return sum(ref.info.nbytes for tensor in tensors for ref in tensor.sources(transforms))


def write_description(
    folder: Path,
    *,
    title: str,
    primary: Model,
    inputs: Sequence[Model],
    out_dtype: str,
    card: str,
    recipe: Mapping[str, Any],
    options: RunOptions,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write what is no weight: the primary model's side files, the model card, merge_recipe.json.

    Args:
        folder: of the checkpoint.
        title: of the card.
        primary: gives config, tokenizer and the rest; its config changes in its dtype only, where `out_dtype` says so.
        inputs: every model, the base first.
        out_dtype: `auto`, or the dtype asked for.
        card: Markdown of the card: what was made of which models, and how.
        recipe: keys of merge_recipe.json, to which inputs, versions and the command are added.
        config: entries of config.json that change besides, by dotted name.
    """
    dtype = None if out_dtype == "auto" else out_dtype
    if dtype is None and "float64" in (primary.config.get("dtype"), primary.config.get("torch_dtype")):
        dtype = "float32"  # the widest that is written
    copy_side_files(primary.location.folder, folder, dtype=dtype, config=config or {})
    text = model_card(title=title, base=inputs[0], models=inputs[1:], text=card, command=options.command)
    write_file(folder / "README.md", text.encode())
    write_recipe(
        folder,
        {
            **recipe,
            "inputs": [describe_input(model, options.digest) for model in inputs],
            "versions": versions(),
            "command": list(options.command) if options.command else None,
        },
    )


def peak_memory_bytes() -> int:
    """The largest resident memory this process ever had."""
    try:
        # ru_maxrss of a process counts what its parent held when it was started; this does not.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
