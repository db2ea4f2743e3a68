"""Files beside an unfinished output that a run keeps for the next one, each spoken of by the journal with its checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from checkpoints.folder import Folder
from checkpoints.staging import Stage


def keep(stage: Stage, name: str, pieces: Sequence[bytes | memoryview], record: Mapping[str, Any]) -> None:
    """Write a file, and a record of the journal that speaks of it. Raises WriteError: the disk is full or fails."""
    hasher = xxhash.xxh3_64()
    for piece in pieces:
        hasher.update(piece)
    stage.state.replace(name, pieces)
    stage.journal.append({**record, "file": name, "xxh3": hasher.intdigest()})


def content_of(state: Folder, record: Mapping[str, Any], name: str) -> bytes | None:
    """The file that a record speaks of; None where it is another, missing, or without a checksum."""
    content = state.read(name) if record.get("file") == name else None
    return content if content is not None and xxhash.xxh3_64_intdigest(content) == record.get("xxh3") else None
