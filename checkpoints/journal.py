"""The journal of an unfinished run: what is on the disk for good, one line for each commit, in the order of the commits.

A line is appended, and flushed to the disk, after everything it speaks of is there. A crash can tear the last line, which
its digest shows; it is cut off then.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from checkpoints.errors import WriteError

DIGEST_DIGITS = 16


class Journal:
    """The records of a run so far, and a file that more are appended to.

    Args:
        path: read where it exists, made where it does not.

    Attributes:
        records: JSON objects, the oldest first.

    Raises: WriteError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            whole = 0
            for line in path.read_bytes().splitlines(keepends=True):
                record = _parse(line)
                if record is None:
                    break
                self.records.append(record)
                whole += len(line)
            os.ftruncate(self._descriptor, whole)
            os.lseek(self._descriptor, whole, os.SEEK_SET)
        except OSError as error:
            raise WriteError(path, error) from error

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns. Raises WriteError: the disk is full or fails."""
        content = json.dumps(record).encode()
        line = _digest(content) + b" " + content + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise WriteError(self.path, error) from error
        self.records.append(record)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a line that was not written to its end."""
    digest, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or digest != _digest(content):
        return None
    record: dict[str, Any] = json.loads(content)
    return record


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS].encode()
