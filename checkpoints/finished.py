"""Find what an unfinished run has done: what its journal says, as far as the files bear it out.

A record of the journal is a JSON object with some of these keys:

- `tensors`: name -> notes of the run that wrote it; `written`: name -> for each checkpoint the file, and the tensor's pieces in
  it as `[first byte, bytes, checksum, ...]`, the checksum (xxh3, 64 bits) taken of what was handed to the system; together they say that a tensor is finished;
- `changed`: positions of models that differ from the base; `chunks`: for each checkpoint the digests of complete 64 MiB pieces;
- what others note: `checkpoints.finished` leaves other keys alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from checkpoints.folder import READ_BYTES, Folder

Written = Sequence[tuple[str, Sequence[int]]]
"""For each checkpoint, the file that a tensor is in, and its pieces: first byte, bytes, checksum, and so on."""
READERS = 4
_DIGEST = re.compile(r"([a-z0-9]+:)?[0-9a-f]{64}")


@dataclass(frozen=True)
class Finished:
    """What an unfinished run has done.

    Attributes:
        tensors: that are whole on the disk -> the notes of the run that wrote them.
        written: of the same tensors.
        chunks: for each checkpoint, digests of complete 64 MiB pieces: file -> number, as text -> digest.
        changed: positions of models that are known to differ from the base.
        lost: names of tensors that the journal calls finished and whose bytes are not there.
    """

    tensors: Mapping[str, list[Any]] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    chunks: Sequence[Mapping[str, Mapping[str, str]]] = ()
    changed: frozenset[int] = frozenset()
    lost: tuple[str, ...] = ()


def find_finished(folder: Folder, records: Iterable[Mapping[str, Any]]) -> Finished:
    """Look at every tensor that a journal calls finished.

    Args:
        folder: that the files lie in.
        records: of the journal, the oldest first; what is not of the format is passed over.

    Raises: ForeignFolder: something in the folder is not ours.
    """
    tensors: dict[str, list[Any]] = {}
    written: dict[str, Written] = {}
    chunks: list[dict[str, dict[str, str]]] = []
    changed: set[int] = set()
    for record in records:
        if "tensors" not in record or not is_record(record):
            continue
        notes = record["tensors"]
        tensors |= notes
        pieces = record.get("written", {})
        written |= {name: pieces.get(name, []) for name in notes}
        changed.update(record.get("changed", ()))
        for number, files in enumerate(record.get("chunks", ())):
            if number == len(chunks):
                chunks.append({})
            for name, digests in files.items():
                chunks[number].setdefault(name, {}).update(digests)
    lost = find_lost(folder, written)
    whole = {name: notes for name, notes in tensors.items() if name not in lost}
    kept = {name: written[name] for name in whole}
    return Finished(whole, kept, chunks, frozenset(changed), tuple(sorted(lost)))


def places_in(records: Iterable[Mapping[str, Any]]) -> dict[str, Written]:
    """Where the tensors are that a journal calls finished; what is not of the format is passed over."""
    known = (record for record in records if "tensors" in record and is_record(record))
    return {name: places for record in known for name, places in record.get("written", {}).items()}


def find_lost(folder: Folder, written: Mapping[str, Written]) -> set[str]:
    """The tensors whose bytes are not as they were written, or of which no checksum was noted. Raises ForeignFolder."""
    names = {file for places in written.values() for file, _ in places}
    descriptors = {name: folder.open_file(name) for name in sorted(names)}
    try:

        def is_whole(places: Written) -> bool:
            return bool(places) and all(_fits(descriptors[file], pieces) for file, pieces in places)

        with ThreadPoolExecutor(READERS) as pool:
            return {
                name for name, whole in zip(written, pool.map(is_whole, written.values()), strict=True) if not whole
            }
    finally:
        for descriptor in descriptors.values():
            if descriptor is not None:
                os.close(descriptor)


def _fits(descriptor: int | None, pieces: Sequence[int]) -> bool:
    """Whether a file has the bytes that were written into it; a file that cannot be read has not."""
    if descriptor is None:
        return False
    with suppress(OSError, OverflowError):
        size = os.fstat(descriptor).st_size
        return all(
            begin + count <= size and _checksum(descriptor, begin, count) == checksum
            for begin, count, checksum in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        )
    return False


def _checksum(descriptor: int, begin: int, count: int) -> int:
    """Of a range of a file that is as long."""
    hasher = xxhash.xxh3_64()
    for offset in range(begin, begin + count, READ_BYTES):
        hasher.update(os.pread(descriptor, min(READ_BYTES, begin + count - offset), offset))
    return hasher.intdigest()


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a record of finished tensors is of the format: a journal can have been written by anybody."""
    try:
        return (
            all(isinstance(notes, list) for notes in record["tensors"].values())
            and all(map(_are_places, record.get("written", {}).values()))
            and all(type(position) is int for position in record.get("changed", ()))
            and all(
                number.isdecimal() and len(number) < 10 and _DIGEST.fullmatch(digest)
                for files in record.get("chunks", ())
                for digests in files.values()
                for number, digest in digests.items()
            )
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _are_places(places: Any) -> bool:
    return isinstance(places, list) and all(
        isinstance(file, str)
        and all(part not in ("", ".", "..") and part.isprintable() for part in file.split("/"))
        and isinstance(pieces, list)
        and len(pieces) % 3 == 0
        and all(type(number) is int and 0 <= number < 1 << 64 for number in pieces)
        for file, pieces in places
    )
