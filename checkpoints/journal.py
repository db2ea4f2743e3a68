"""The journal of an unfinished run: what is on the disk for good, one line for each commit, in the order of the commits.

A line is appended, and flushed to the disk, after everything it speaks of is there. A crash can tear the last line, which
its digest shows; it is cut off then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

from checkpoints.errors import WriteError
from checkpoints.folder import READ_BYTES, Folder

DIGEST_DIGITS = 16
FILE = "journal"
ANY_FILE = re.compile(rf"{FILE}(-\d{{1,6}})?")
"""The journal of a run, and those of the further processes of a run in several."""


def journal_of(process: int) -> str:
    """The file name of a process's journal: that of the first is a run's only one where it is alone."""
    return f"{FILE}-{process}" if process else FILE


def other_records(folder: Folder, own: str = FILE) -> list[dict[str, Any]]:
    """The records of all journals in a folder but one's own. Raises ForeignFolder: something else has such a name."""
    names = [name for name in folder.names() if ANY_FILE.fullmatch(name) and name != own]
    return [record for name in sorted(names) for record in _parse_all(folder.read(name) or b"")[0]]


class Journal:
    """The records of a run so far, and a file that more are appended to.

    Args:
        folder: with the file, which is read where it exists and made where it does not.
        name: of the file.

    Attributes:
        records: JSON objects, the oldest first.

    Raises: WriteError: the file cannot be read or written; ForeignFolder: it is no plain file of ours.
    """

    def __init__(self, folder: Folder, name: str = FILE):
        self.path = folder / name
        self.records: list[dict[str, Any]] = []
        there = folder.open_file(name)
        self._descriptor = folder.new_file(name) if there is None else there
        try:
            self.records, whole = _parse_all(_read(self._descriptor))
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


def _parse_all(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that is damaged, and how many bytes they take."""
    records: list[dict[str, Any]] = []
    whole = 0
    for line in content.splitlines(keepends=True):
        record = _parse(line)
        if record is None:
            break
        records.append(record)
        whole += len(line)
    return records, whole


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
