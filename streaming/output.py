"""Write a stream's results: one folder, or one for each variant of a sweep, which appear when all are complete."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.files import in_utf8
from checkpoints.finished import Finished, Part
from checkpoints.folder import Folder
from checkpoints.provenance import Digest, describe_input, model_card, versions, write_recipe
from checkpoints.staging import Stage
from checkpoints.writer import CheckpointWriter, HashName, Shard
from streaming.ahead import fits_in_memory
from streaming.commits import Commits
from streaming.log import Log, no_log
from streaming.stream import (
    Observer,
    Output,
    PlannedTensor,
    StreamOptions,
    bytes_read,
    count_non_finite,
    expect_changes,
    stream,
)
from streaming.tally import Tally
from streaming.work import CARD_FILE, Findings, Variant, Work, bytes_written, remaining

if TYPE_CHECKING:
    from streaming.processes import Processes

DEFAULT_SHARD_BYTES = 5_000_000_000
TURN_BYTES = 512_000_000
"""Of inputs, which the methods of a sweep merge one after the other before the next are read."""


@dataclass(frozen=True)
class RunOptions:
    """How a run goes and what is written beside the tensors, whose bytes depend on none of it.

    Attributes:
        stream: device, threads, size of a block.
        max_shard_bytes: size of the output's files.
        digest: which digests merge_recipe.json gets.
        digest_hash: with which hash they are taken.
        report: the merge report: `sample` of one block in 16, `full`, or `none`.
        overwrite: replace an earlier result.
        resume: go on with what an interrupted run left.
        trust_remote_code: let Python files of a checkpoint run.
        quiet: no progress bars.
        command: what the model card shows.
        log: told of every tensor.
        processes: those that share the run; None where one does all of it.
    """

    stream: StreamOptions = field(default_factory=StreamOptions)
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    digest: Digest = "outputs"
    digest_hash: HashName = "blake3"
    report: Literal["none", "sample", "full"] = "sample"
    overwrite: bool = False
    resume: bool = True
    trust_remote_code: bool = False
    quiet: bool = False
    command: Sequence[str] | None = None
    log: Log = no_log
    processes: Processes | None = None


@dataclass(frozen=True)
class Written:
    """What a run moved, and noticed.

    Attributes:
        bytes_read: every input tensor counts once; what an earlier run had finished does not.
        peak_memory_bytes: the largest resident memory the process ever had.
        findings: of the numbers.
        outputs: for each variant, weight file -> its digest and size; nothing in a process that is not the first of several.
        processes: how many shared the run.
    """

    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    findings: Findings
    outputs: Sequence[Mapping[str, Mapping[str, int | str]]] = ()
    processes: int = 1


def write_checkpoints(
    work: Work,
    variants: Sequence[Variant],
    stage: Stage,
    options: RunOptions,
    observer: Observer | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Written:
    """Stream a work's tensors into every variant's folder, but for those that an earlier run of the stage finished; where several
    processes share the run, one's share of them, and the first finishes what all have written.

    Args:
        work: whose inputs must be unchanged at the end.
        variants: at least one.
        stage: where to; its journal says what is finished.
        observer, progress: see `stream`.

    Raises: InputError: as `stream`.
    """
    started, processes = time.monotonic(), options.processes
    transforms = [variant.transform for variant in variants]
    groups = group_variants(variants)
    non_finite = [count_non_finite(len(group)) for group in groups]
    tallies = [*non_finite, *(each.tally for each in (observer, *transforms) if each is not None)]
    # What an earlier run finished is not streamed again; its sums go into the tallies.
    there = There(stage.finished, tallies, work.shards, variants)
    usable = there.whole
    todo = remaining(work.tensors, usable, there.spans)
    for name in usable:
        for tally, numbers in zip(tallies, stage.finished.tensors[name], strict=True):
            tally.restore(name, numbers)
    mine: list[tuple[str, tuple[int, int] | None]] = []
    moved = [0, 0]
    if processes is not None:
        from streaming.shares import share_of

        progress = processes.counting(progress)

    def finish(tensor: PlannedTensor, changed: set[int], seconds: float) -> None:
        name = tensor.spec.name
        if tensor.part is not None:
            commits.add(name, [tally.take(name, tensor.part) for tally in tallies], changed, tensor.part)
            options.log("part", name=name, elements=tensor.part, seconds=round(seconds, 6))
            return
        notes = [tally.close(name) for tally in tallies]
        commits.add(name, notes, changed)
        seen = [note for tally, numbers in zip(tallies, notes, strict=True) if (note := tally.describe(numbers))]
        options.log("tensor", name=name, seconds=round(seconds, 6), seen=seen)

    # One writer for each variant, on the files that are there, which the first of several processes makes.
    writers: dict[str, CheckpointWriter] = {}
    drops = not fits_in_memory(bytes_read(todo, transforms) + len(variants) * bytes_written(todo))
    places = {each.folder: stage.work.subfolder(each.folder) if each.folder else stage.work for each in variants}
    if processes is not None and not processes.is_first:
        processes.hear("files")
    try:
        for number, (name, folder) in enumerate(places.items()):
            writers[name] = CheckpointWriter(
                folder,
                work.shards,
                digest=options.digest_hash if options.digest != "none" else None,
                finished=usable,
                parts=there.spans,
                chunks=_chunks_of(stage.finished, number),
                makes=processes is None or processes.is_first,
                drops=drops,
            )
        stage.work.sync()
        if processes is not None and processes.is_first:
            processes.say("files")
        # Stream into all of them, committing meanwhile and once more at the end.
        changed = set(stage.finished.changed)
        with Commits(stage.journal, writers) as commits, closing(work.parts(todo, stage)) as coming:
            for coming_part in coming:
                part = (
                    coming_part
                    if processes is None
                    else share_of(processes, coming_part, work.shards, variants, options.stream.elements)
                )
                mine += [(tensor.spec.name, tensor.part) for tensor in part]
                moved[0] += bytes_read(part, transforms)
                moved[1] += len(variants) * bytes_written(part)
                # Several methods take turns at a few tensors, which are in the system's cache after the first.
                for some in [part] if len(groups) == 1 else _in_turns(part):
                    for number, group in enumerate(groups):
                        changed |= stream(
                            [_merged_by(group[0], tensor) for tensor in some],
                            [Output(writers[each.folder], each.transform) for each in group],
                            options=options.stream,
                            observer=observer if number == 0 else None,
                            progress=progress,
                            finished=finish if number == len(groups) - 1 else _go_on,
                            changed=changed,
                            non_finite=non_finite[number],
                        )
        # Every weight of ours is on the disk: look at the inputs once more.
        for model in work.inputs:
            model.weights.check_unchanged()
        moved.append(peak_memory_bytes())
        everyone = [moved]
        if processes is not None:
            answers = processes.gather("done", json.dumps(moved))
            if not processes.is_first:
                return Written(moved[0], moved[1], time.monotonic() - started, moved[2], Findings(frozenset(), {}))
            everyone = [json.loads(answer) for answer in answers]
        if processes is not None or there.spans:
            from streaming.shares import take_over

            changed |= take_over(stage, work.tensors, (usable, there.spans), mine, list(writers.values()), tallies)
        digests = [writer.close() for writer in writers.values()]
    finally:
        for writer in writers.values():
            writer.release()
    counts: Counter[str] = Counter()
    for tally in non_finite:
        counts.update({name: int(count) for name, (count,) in tally.by_tensor().items()})
    findings = Findings(frozenset(expect_changes(work.tensors) - changed), counts)
    return Written(
        sum(each[0] for each in everyone),
        sum(each[1] for each in everyone) + len(variants) * sum(len(shard.header) for shard in work.shards),
        time.monotonic() - started,
        max(*(each[2] for each in everyone), peak_memory_bytes()),
        findings,
        digests,
        len(everyone),
    )


def _chunks_of(finished: Finished, variant: int) -> Mapping[str, Mapping[str, str]]:
    """The digests of a variant's complete pieces that are known."""
    return finished.chunks[variant] if variant < len(finished.chunks) else {}


def group_variants(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Those that have the same methods together: each group is one stream."""
    groups: dict[int, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(id(variant.methods), []).append(variant)
    return list(groups.values())


def _merged_by(variant: Variant, tensor: PlannedTensor) -> PlannedTensor:
    if variant.methods is None:
        return tensor
    return replace(tensor, method=variant.methods[tensor.spec.name])


def _in_turns(part: Sequence[PlannedTensor]) -> Iterator[list[PlannedTensor]]:
    """Tensors whose inputs together are of at most `TURN_BYTES`, or one."""
    some: list[PlannedTensor] = []
    taken = 0
    for tensor in part:
        size = bytes_read([tensor])
        if some and taken + size > TURN_BYTES:
            yield some
            some, taken = [], 0
        some.append(tensor)
        taken += size
    if some:
        yield some


def _go_on(tensor: PlannedTensor, changed: set[int], seconds: float) -> None:
    """A tensor that other methods have yet to merge is not finished."""


class There:
    """What an earlier run finished for every variant, with notes that these tallies can have made.

    Attributes:
        whole: tensors.
        spans: parts of others, elements from and to.
    """

    def __init__(
        self, finished: Finished, tallies: Sequence[Tally], shards: Sequence[Shard], variants: Sequence[Variant]
    ):
        self._tallies, self._folders = tallies, [variant.folder for variant in variants]
        self._shards = {name: shard for shard in shards for name in shard.offsets}
        noted = (name for name, notes in finished.tensors.items() if self._is_noted(name, notes, Tally.accepts))
        self.whole = frozenset(name for name in noted if self._is_written(name, None, finished.written[name]))
        parts = {name: [part for part in parts if self._has(name, part)] for name, parts in finished.parts.items()}
        self.spans = {name: [(part.start, part.stop) for part in known] for name, known in parts.items() if known}

    def _has(self, name: str, part: Part) -> bool:
        is_noted = self._is_noted(name, part.notes, Tally.accepts_rows)
        return is_noted and self._is_written(name, (part.start, part.stop), part.written)

    def _is_noted(self, name: str, notes: Sequence[Any], accepts: Callable[[Tally, Any], bool]) -> bool:
        is_known = name in self._shards and len(notes) == len(self._tallies)
        return is_known and all(map(accepts, self._tallies, notes))

    def _is_written(
        self, name: str, part: tuple[int, int] | None, written: Sequence[tuple[str, Sequence[int]]]
    ) -> bool:
        shard = self._shards[name]
        begin, end = shard.bytes_of(name, part)
        files = [f"{folder}/{shard.file_name}" if folder else shard.file_name for folder in self._folders]
        is_inside = end <= shard.bytes_of(name)[1]
        return (
            is_inside
            and [file for file, _ in written] == files
            and all(_cover(pieces, begin, end - begin) for _, pieces in written)
        )


def _cover(pieces: Sequence[int], begin: int, count: int) -> bool:
    """Whether pieces (first byte, bytes, checksum, ...) follow each other from `begin` on, `count` bytes in all."""
    position = begin
    for first, nbytes in zip(pieces[::3], pieces[1::3], strict=True):
        if first != position:
            return False
        position += nbytes
    return position == begin + count


def unfinished(tensors: Sequence[PlannedTensor], stage: Stage) -> list[PlannedTensor]:
    """The tensors, and parts of them, that no earlier run of the stage finished."""
    parts = stage.finished.parts
    spans = {name: [(part.start, part.stop) for part in known] for name, known in parts.items()}
    return remaining(tensors, stage.finished.tensors.keys(), spans)


def write_description(
    folder: Folder, work: Work, options: RunOptions, *, title: str, card: str, recipe: Mapping[str, Any]
) -> None:
    """Write what is no weight: side files, the model card, merge_recipe.json.

    Args:
        folder: of the checkpoint.
        work: its side files, whose config's dtype changes where `out_dtype` says so, and its inputs, the base first.
        title, card: of the model card, Markdown: what was made of which models, and how.
        recipe: what merge_recipe.json says.
    """
    dtype = None if work.out_dtype == "auto" else work.out_dtype
    config = work.files.read_json("config.json")
    if dtype is None and "float64" in (config.get("dtype"), config.get("torch_dtype")):
        dtype = "float32"  # the widest that is written
    work.files.write(folder, dtype=dtype)
    text = model_card(title=title, models=work.inputs, text=card, command=options.command)
    folder.write(CARD_FILE, in_utf8(text))
    write_recipe(folder, recipe)


def record_of(work: Work, options: RunOptions) -> dict[str, Any]:
    """What every merge_recipe.json says: inputs, versions and the command."""
    return {
        "inputs": [describe_input(model, options.digest, options.digest_hash) for model in work.inputs],
        "versions": versions(),
        "command": list(options.command) if options.command else None,
    }


def identity_of(work: Work, options: RunOptions, **more: Any) -> dict[str, Any]:
    """Everything that decides the bytes of an output, for `checkpoints.staging.staged`: `more` is what else counts."""
    headers = hashlib.sha256(b"".join(shard.file_name.encode() + shard.header for shard in work.shards)).hexdigest()
    return {
        "recipe": dict(work.decides),
        "inputs": [describe_input(model, "outputs") for model in work.inputs],
        "files": headers,
        "side_files": work.files.digest(),
        "digest": options.digest,
        "report": options.report,
        "device": options.stream.device.type,
        "allow_non_finite": options.stream.allow_non_finite,
        "versions": versions(),
        **more,
    }


def peak_memory_bytes() -> int:
    """The largest resident memory this process ever had."""
    try:
        # ru_maxrss of a process counts what its parent held when it was started; this does not.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
