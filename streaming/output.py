"""Write a stream's results: one folder, or one for each variant of a sweep, which appear when all are complete."""

from __future__ import annotations

import functools
import hashlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints.files import in_utf8
from checkpoints.finished import Finished
from checkpoints.folder import Folder
from checkpoints.provenance import Digest, describe_input, model_card, versions, write_recipe
from checkpoints.staging import Stage
from checkpoints.writer import CheckpointWriter, HashName
from streaming.ahead import fits_in_memory
from streaming.commits import Commits, There
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
from streaming.work import CARD_FILE, Findings, Variant, Work, bytes_written, remaining

if TYPE_CHECKING:
    from streaming.processes import Processes

DEFAULT_SHARD_BYTES = 5_000_000_000
TURN_BYTES = 512_000_000
"""Of inputs, which the methods of a sweep merge one after the other before the next are read."""


class Alone:
    """The only process of a run: what `streaming.processes.Processes` is to several, with nobody to tell or to wait for."""

    size, is_first = 1, True

    def agree(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Agree."""

    def first_before_others(self, key: str) -> AbstractContextManager[None]:
        """A block that is run at once."""
        return nullcontext()

    def counting(self, progress: Callable[[int], object]) -> Callable[[int], object]:
        """What is told of bytes."""
        return progress

    def gather(self, key: str, content: str) -> list[bytes]:
        """The content of the only one."""
        return [content.encode()]


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

    @property
    def team(self) -> Processes | Alone:
        """Those that share the run, of one or more."""
        return self.processes or Alone()


@dataclass
class Moved:
    """What a process has read and written, and the largest resident memory that it ever had."""

    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Written:
    """What a run moved, and noticed.

    Attributes:
        bytes_read: every input tensor counts once; what an earlier run had finished does not.
        peak_memory_bytes: the largest resident memory that a process of it ever had.
        findings: of the numbers; none in a process that is not the first of several.
        outputs: for each variant, weight file -> its digest and size; likewise.
        processes: how many shared the run.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    findings: Findings = field(default_factory=lambda: Findings(frozenset(), {}))
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
    started, team = time.monotonic(), options.team
    writing = _Writing(work, variants, stage, options, observer)
    try:
        with team.first_before_others("files"):
            writing.open_writers()
        writing.stream(team.counting(progress))
        # Every weight of ours is on the disk: look at the inputs once more.
        for model in work.inputs:
            model.weights.check_unchanged()
        writing.moved.peak_memory_bytes = peak_memory_bytes()
        answers = team.gather("done", json.dumps(asdict(writing.moved)))
        if not team.is_first:
            return Written(**asdict(writing.moved), seconds=time.monotonic() - started)
        digests = writing.put_together()
    finally:
        writing.release()
    everyone = [Moved(**json.loads(answer)) for answer in answers]
    headers = len(variants) * sum(len(shard.header) for shard in work.shards)
    return Written(
        bytes_read=sum(each.bytes_read for each in everyone),
        bytes_written=sum(each.bytes_written for each in everyone) + headers,
        peak_memory_bytes=max(*(each.peak_memory_bytes for each in everyone), peak_memory_bytes()),
        seconds=time.monotonic() - started,
        findings=writing.findings(),
        outputs=digests,
        processes=len(everyone),
    )


class _Writing:
    """One process's part of writing a work; `release` after all else.

    Args:
        work, variants, stage, options, observer: see `write_checkpoints`.

    Attributes:
        moved: so far.
    """

    def __init__(
        self, work: Work, variants: Sequence[Variant], stage: Stage, options: RunOptions, observer: Observer | None
    ):
        self._work, self._variants, self._stage, self._options = work, variants, stage, options
        self._observer = observer
        self._groups = group_variants(variants)
        self._transforms = [variant.transform for variant in variants]
        self._non_finite = [count_non_finite(len(group)) for group in self._groups]
        self._tallies = [
            *self._non_finite,
            *(each.tally for each in (observer, *self._transforms) if each is not None),
        ]
        self._writers: dict[str, CheckpointWriter] = {}
        self._changed = set(stage.finished.changed)
        self._mine: list[tuple[str, tuple[int, int] | None]] = []
        self.moved = Moved()
        # What an earlier run finished is not streamed again; its sums go into the tallies.
        self._there = There(stage.finished, self._tallies, work.shards, variants)
        self._todo = remaining(work.tensors, self._there.whole, self._there.spans)
        for name in self._there.whole:
            for tally, numbers in zip(self._tallies, stage.finished.tensors[name], strict=True):
                tally.restore(name, numbers)

    def open_writers(self) -> None:
        """Open one for each variant, on the files that are there, which the first process makes."""
        stage, options = self._stage, self._options
        nbytes = bytes_read(self._todo, self._transforms) + len(self._variants) * bytes_written(self._todo)
        drops = not fits_in_memory(nbytes)
        folders = {
            each.folder: stage.work.subfolder(each.folder) if each.folder else stage.work for each in self._variants
        }
        for number, (name, folder) in enumerate(folders.items()):
            self._writers[name] = CheckpointWriter(
                folder,
                self._work.shards,
                digest=options.digest_hash if options.digest != "none" else None,
                finished=self._there.whole,
                parts=self._there.spans,
                chunks=_chunks_of(stage.finished, number),
                makes=options.team.is_first,
                drops=drops,
            )
        stage.work.sync()

    def stream(self, progress: Callable[[int], object]) -> None:
        """Stream this process's share into all writers, committing meanwhile and once more at the end. Raises InputError."""
        writers, parts = self._writers, self._work.parts(self._todo, self._stage)
        with Commits(self._stage.journal, writers) as commits, closing(parts):
            finish = functools.partial(self._finish, commits)
            for part in map(self._share_of, parts):
                self._mine += [(tensor.spec.name, tensor.part) for tensor in part]
                self.moved.bytes_read += bytes_read(part, self._transforms)
                self.moved.bytes_written += len(self._variants) * bytes_written(part)
                # Several methods take turns at a few tensors, which are in the system's cache after the first.
                for some in [part] if len(self._groups) == 1 else _in_turns(part):
                    for number, group in enumerate(self._groups):
                        self._changed |= stream(
                            [_merged_by(group[0], tensor) for tensor in some],
                            [Output(writers[each.folder], each.transform) for each in group],
                            options=self._options.stream,
                            observer=self._observer if number == 0 else None,
                            progress=progress,
                            finished=finish if number == len(self._groups) - 1 else _go_on,
                            changed=self._changed,
                            non_finite=self._non_finite[number],
                        )

    def _share_of(self, part: Sequence[PlannedTensor]) -> Sequence[PlannedTensor]:
        processes = self._options.processes
        if processes is None:
            return part
        from streaming.shares import share_of

        return share_of(processes, part, self._work.shards, self._variants, self._options.stream.elements)

    def _finish(self, commits: Commits, tensor: PlannedTensor, changed: set[int], seconds: float) -> None:
        """Leave a tensor, or a part of one, whose elements are written to the next commit, and log it."""
        name, log = tensor.spec.name, self._options.log
        if tensor.part is not None:
            commits.add(name, [tally.take(name, tensor.part) for tally in self._tallies], changed, tensor.part)
            log("part", name=name, elements=tensor.part, seconds=round(seconds, 6))
            return
        notes = [tally.close(name) for tally in self._tallies]
        commits.add(name, notes, changed)
        seen = [note for tally, numbers in zip(self._tallies, notes, strict=True) if (note := tally.describe(numbers))]
        log("tensor", name=name, seconds=round(seconds, 6), seen=seen)

    def put_together(self) -> list[Mapping[str, Mapping[str, int | str]]]:
        """Take over what other processes and earlier runs have written, and close the files.

        Returns: for each variant, see `Written.outputs`.
        """
        if self._options.team.size > 1 or self._there.spans:
            from streaming.shares import take_over

            known, writers = (self._there.whole, self._there.spans), list(self._writers.values())
            self._changed |= take_over(self._stage, self._work.tensors, known, self._mine, writers, self._tallies)
        return [writer.close() for writer in self._writers.values()]

    def findings(self) -> Findings:
        """What was noticed in the numbers of all tensors, when they are put together."""
        counts: Counter[str] = Counter()
        for tally in self._non_finite:
            counts.update({name: int(count) for name, (count,) in tally.by_tensor().items()})
        return Findings(frozenset(expect_changes(self._work.tensors) - self._changed), counts)

    def release(self) -> None:
        """Let go of the files, finished or not."""
        for writer in self._writers.values():
            writer.release()


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
