"""The journal of an unfinished run: what is on the disk for good, one line for each commit, in the order of the commits.

A line is appended, and flushed to the disk, after everything it speaks of is there. A crash can tear the last line, which
its digest shows; it is cut off then.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from checkpoints.errors import WriteError
from checkpoints.folder import READ_BYTES, Folder

DIGEST_DIGITS = 16
FILE = "journal"


class Journal:
    """The records of a run so far, and a file that more are appended to.

    Args:
        folder: with the file `journal`, which is read where it exists and made where it does not.

    Attributes:
        records: JSON objects, the oldest first.

    Raises: WriteError: the file cannot be read or written; ForeignFolder: it is no plain file of ours.
    """

    def __init__(self, folder: Folder):
        self.path = folder / FILE
        self.records: list[dict[str, Any]] = []
        there = folder.open_file(FILE)
        self._descriptor = folder.new_file(FILE) if there is None else there
        try:
            whole = 0
            for line in _read(self._descriptor).splitlines(keepends=True):
                record = _parse(line)
                if record is None:
                    break
                self.records.append(record)
                whole += len(line)
            os.ftruncate(self._descriptor, whole)
            os.lseek(self._descriptor, whole, os.SEEK_SET)
        except OSError as error:
            raise WriteError(self.path, error) from error

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


def _read(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, READ_BYTES):
        parts.append(part)
    return b"".join(parts)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a line that was not written to its end, or holds no JSON object."""
    digest, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or digest != _digest(content):
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS].encode()
