"""A disk that fails or loses power at a chosen moment, for the process that imports it: what faults.py injects.

Moments are counted over all calls that write, flush or rename. A power loss leaves of a watched folder what had been flushed
to the disk, no more: of a file its content at its last fsync, of a folder its entries at its last fsync. A real disk keeps
more at random; so does this one, where asked.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = ("pwrite", "write", "ftruncate", "mkdir", "rename", "replace")
FLUSHES = ("fsync",)
AFTER_POWER_LOSS = ".after"
"""Beside the watched folder: what is left of it, for faults.py to put in its place."""


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    Attributes:
        kind: `power` or `power, kindly` (random parts of what was not flushed survive), or `error` (the call fails, and
            every later one of its kind does).
        at: number of the call, from 0, among `calls`.
        calls: which calls are counted.
        seed: of what survives.
    """

    kind: str
    at: int
    calls: tuple[str, ...] = (*WRITES, *FLUSHES)
    seed: int = 0


@dataclass
class FragileDisk:
    """Replaces the functions of `os` in this process, for good.

    Args:
        folder: what is watched; everything in it counts as flushed.
        fault: what to inject; None only counts.
    """

    folder: Path
    fault: Fault | None
    count: int = 0
    _contents: dict[int, bytes] = field(default_factory=dict)
    _entries: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def install(self) -> None:
        """Begin."""
        for path in (self.folder, *self.folder.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            self._note(descriptor)
            os.close(descriptor)
        for name in (*WRITES, *FLUSHES):
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:  # one at a time, so that what is left is of one moment
                return attempt(*arguments, **keywords)

        def attempt(*arguments: Any, **keywords: Any) -> Any:
            if self.fault is not None and name in self.fault.calls:
                self.count += 1
                if self.count > self.fault.at and self.fault.kind == "error":
                    raise OSError(28 if name in WRITES else 5, "an injected fault", str(arguments[0]))
                if self.count == self.fault.at + 1:
                    self._lose_power()
            elif self.fault is None:
                self.count += 1
            result = original(*arguments, **keywords)
            if name in FLUSHES:
                self._note(arguments[0])
            return result

        return call

    def _note(self, descriptor: int) -> None:
        """Remember what is now on the disk for good."""
        number = os.fstat(descriptor).st_ino
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_dir():
            self._entries[number] = _entries_of(path)
        else:
            self._contents[number] = path.read_bytes()
        self._held.append(os.dup(descriptor))  # so that the number is not given to another file

    def _lose_power(self) -> None:
        assert self.fault is not None
        rng = random.Random(self.fault.seed)
        kindly = self.fault.kind == "power, kindly"
        left = self.folder.with_name(self.folder.name + AFTER_POWER_LOSS)
        shutil.rmtree(left, ignore_errors=True)
        paths = {path.stat().st_ino: path for path in (self.folder, *self.folder.rglob("*"))}

        def entries(number: int) -> dict[str, tuple[int, bool]]:
            if kindly and number in paths and rng.random() < 0.5:
                return _entries_of(paths[number])
            return self._entries.get(number, {})

        def content(number: int) -> bytes:
            if kindly and number in paths and rng.random() < 0.5:
                return paths[number].read_bytes()
            return self._contents.get(number, b"")

        def build(number: int, target: Path) -> None:
            os.makedirs(target)
            for name, (inner, is_folder) in entries(number).items():
                if is_folder:
                    build(inner, target / name)
                else:
                    (target / name).write_bytes(content(inner))

        self.fault = None
        build(self.folder.stat().st_ino, left)
        os._exit(137)


def _entries_of(folder: Path) -> dict[str, tuple[int, bool]]:
    """Name -> number, and whether it is a folder."""
    with os.scandir(folder) as found:
        return {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in found}
