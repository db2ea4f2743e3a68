"""Find what an unfinished run has done: what its journal says, as far as the files bear it out.

A record of the journal is a JSON object with some of these keys:

- `tensors`: name -> notes of the run that wrote it; `written`: name -> for each checkpoint the file, and the tensor's pieces in
  it as `[first byte, bytes, checksum, ...]`, the checksum (xxh3, 64 bits) taken of what was handed to the system; together they say that a tensor is finished;
- `parts`: the same of parts of tensors, `[name, first element, the one after the last, notes, for each checkpoint file and pieces]`;
- `changed`: positions of models that differ from the base; `chunks`: for each checkpoint the digests of complete 64 MiB pieces;
- what others note: `checkpoints.finished` leaves other keys alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import xxhash

from checkpoints.folder import READ_BYTES, Folder

Written = Sequence[tuple[str, Sequence[int]]]
"""For each checkpoint, the file that a tensor is in, and its pieces: first byte, bytes, checksum, and so on."""
Key = TypeVar("Key", bound=Hashable)
READERS = 4
_DIGEST = re.compile(r"([a-z0-9]+:)?[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """A part of a tensor that is on the disk.

    Attributes:
        start, stop: its first element, and the one after the last.
        notes: of the run that wrote it.
        written: where it is.
    """

    start: int
    stop: int
    notes: list[Any]
    written: Written


@dataclass(frozen=True)
class Finished:
    """What an unfinished run has done.

    Attributes:
        tensors: that are whole on the disk -> the notes of the run that wrote them.
        written: of the same tensors.
        parts: of tensors that are not in `tensors`, in their order; no two of a tensor have an element in common.
        chunks: for each checkpoint, digests of complete 64 MiB pieces: file -> number, as text -> digest.
        changed: positions of models that are known to differ from the base.
        lost: names of tensors that the journal calls finished and whose bytes are not there.
    """

    tensors: Mapping[str, list[Any]] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    chunks: Sequence[Mapping[str, Mapping[str, str]]] = ()
    changed: frozenset[int] = frozenset()
    lost: tuple[str, ...] = ()
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)


def find_finished(folder: Folder, records: Iterable[Mapping[str, Any]]) -> Finished:
    """Look at every tensor, and every part of one, that a journal calls finished.

    Args:
        folder: that the files lie in.
        records: of the journals, of each the oldest first; what is not of the format is passed over.

    Raises: ForeignFolder: something in the folder is not ours.
    """
    noted = read_finished(records)
    lost = find_lost(folder, noted.written)
    each = {(name, part.start): part for name, parts in noted.parts.items() for part in parts}
    lost_parts = find_lost(folder, {key: part.written for key, part in each.items()})
    whole = {name: notes for name, notes in noted.tensors.items() if name not in lost}
    kept = {
        name: [part for part in parts if (name, part.start) not in lost_parts] for name, parts in noted.parts.items()
    }
    return replace(
        noted,
        tensors=whole,
        written={name: noted.written[name] for name in whole},
        lost=tuple(sorted(lost | {name for name, _ in lost_parts})),
        parts={name: parts for name, parts in kept.items() if parts},
    )


def read_finished(records: Iterable[Mapping[str, Any]]) -> Finished:
    """What journals call finished, as they say it; see `find_finished`, which looks at it."""
    tensors: dict[str, list[Any]] = {}
    written: dict[str, Written] = {}
    parts: dict[str, list[Part]] = {}
    chunks: list[dict[str, dict[str, str]]] = []
    changed: set[int] = set()
    for record in records:
        if "tensors" not in record or not is_record(record):
            continue
        notes = record["tensors"]
        tensors |= notes
        pieces = record.get("written", {})
        written |= {name: pieces.get(name, []) for name in notes}
        for name, *fields in record.get("parts", ()):
            parts.setdefault(name, []).append(Part(*fields))
        changed.update(record.get("changed", ()))
        for number, files in enumerate(record.get("chunks", ())):
            if number == len(chunks):
                chunks.append({})
            for name, digests in files.items():
                chunks[number].setdefault(name, {}).update(digests)
    in_parts = {name: list(_apart(known)) for name, known in parts.items() if name not in tensors}
    return Finished(tensors, written, chunks, frozenset(changed), parts=in_parts)


def _apart(parts: Iterable[Part]) -> Iterator[Part]:
    """Parts in their order, without those that begin before another ends; a later record of the same elements counts."""
    latest = {part.start: part for part in parts}
    end = 0
    for start in sorted(latest):
        if start >= end:
            yield latest[start]
            end = latest[start].stop


def places_in(records: Iterable[Mapping[str, Any]]) -> dict[str, Written]:
    """Where the tensors are that a journal calls finished; what is not of the format is passed over."""
    noted = read_finished(records)
    joined = {
        name: [
            (same[0][0], [number for _, pieces in same for number in pieces])
            for same in zip(*(part.written for part in parts), strict=False)
        ]
        for name, parts in noted.parts.items()
    }
    return {**noted.written, **joined}


def find_lost(folder: Folder, written: Mapping[Key, Written]) -> set[Key]:
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
            and all(map(_is_part, record.get("parts", ())))
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


def _is_part(part: Any) -> bool:
    name, start, stop, notes, places = part
    is_range = type(start) is type(stop) is int and 0 <= start < stop < 1 << 62
    return isinstance(name, str) and is_range and isinstance(notes, list) and _are_places(places)


def _are_places(places: Any) -> bool:
    return isinstance(places, list) and all(
        isinstance(file, str)
        and all(part not in ("", ".", "..") and part.isprintable() for part in file.split("/"))
        and isinstance(pieces, list)
        and len(pieces) % 3 == 0
        and all(type(number) is int and 0 <= number < 1 << 64 for number in pieces)
        for file, pieces in places
    )
