"""Make what is finished durable while the stream goes on, and note it in the journal."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from checkpoints.journal import Journal
from checkpoints.writer import CheckpointWriter

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
