"""Make what is finished durable while the stream goes on, note it in the journal, and find what an earlier run has noted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from checkpoints.finished import Finished, Part
from checkpoints.journal import Journal
from checkpoints.staging import Stage
from checkpoints.writer import CheckpointWriter, Shard
from streaming.stream import PlannedTensor
from streaming.tally import Tally
from streaming.work import Variant, remaining

COMMIT_S = 1.0
"""Seconds between commits: about what an interruption costs. Each flushes the files, so that little is left to flush at the end."""


class Commits:
    """A thread that commits now and then; a context manager, which commits once more at its end.

    Args:
        journal: gets a record for each commit, as `checkpoints.finished` describes it.
        writers: folder below the save path -> writer, of the checkpoints that every tensor is written to.

    Raises: WriteError: a disk is full or fails, at the next `add` or at the end.
    """

    def __init__(self, journal: Journal, writers: Mapping[str, CheckpointWriter]):
        self._journal = journal
        self._writers = writers
        self._lock = threading.Lock()
        self._waiting: dict[str, Any] = {}
        self._parts: list[tuple[str, tuple[int, int], Any]] = []
        self._changed: set[int] = set()
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commits", daemon=True)

    def add(self, tensor: str, notes: Any, changed: set[int], part: tuple[int, int] | None = None) -> None:
        """Leave a tensor, all of whose elements are written, to the next commit; from any thread.

        Args:
            notes: JSON, kept with it.
            changed: see `streaming.stream.stream`.
            part: elements from and to, where they are those of a part of it.
        """
        if self._error is not None:
            raise self._error
        with self._lock:
            if part is None:
                self._waiting[tensor] = notes
            else:
                self._parts.append((tensor, part, notes))
            self._changed |= changed

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            if kind is None:
                raise self._error
        elif kind is None or issubclass(kind, KeyboardInterrupt):
            self._commit()

    def _run(self) -> None:
        try:
            while not self._end.wait(COMMIT_S):
                self._commit()
        except BaseException as error:
            self._error = error

    def _commit(self) -> None:
        with self._lock:
            tensors, self._waiting = self._waiting, {}
            waiting, self._parts = self._parts, []
            changed = sorted(self._changed)
        if tensors or waiting:
            chunks = [writer.sync() for writer in self._writers.values()]
            written = {name: self._places(name) for name in tensors}
            parts = [(name, *part, notes, self._places(name, part)) for name, part, notes in waiting]
            record = {"tensors": tensors, "written": written, "changed": changed, "chunks": chunks}
            self._journal.append({**record, **({"parts": parts} if parts else {})})

    def _places(self, tensor: str, part: tuple[int, int] | None = None) -> list[tuple[str, list[int]]]:
        """The file of a tensor, or of a part of it, in each checkpoint, and its pieces there."""
        places = []
        for folder, writer in self._writers.items():
            file, pieces = writer.written(tensor, part)
            places.append((f"{folder}/{file}" if folder else file, pieces))
        return places


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
