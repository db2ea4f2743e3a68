"""Small files and folders, written so that they are on the disk for good."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, WriteError
from checkpoints.settings import setting


def parse_json(content: bytes, **hooks: Any) -> Any:
    """JSON that every library reads alike: `json.loads` alone takes other encodings and half characters, too.

    Args:
        content: the file; hooks: of `json.loads`.

    Raises: ValueError: anything else.
    """
    text = content.decode("utf-8")
    try:
        tree = json.loads(text, **hooks)
        if "\\ud" in text or "\\uD" in text:  # half of a pair stands for nothing; UTF-8 has none
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("a nesting too deep") from None
    return tree


def in_utf8(text: str) -> bytes:
    """As bytes; those of a path that are no text become escapes, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def is_plain_name(name: str) -> bool:
    """Whether a name can only mean a file of the very folder that it is looked for in."""
    plain = name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
    return plain and len(os.fsencode(name)) <= 255


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and flush it to the disk. Raises WriteError where the disk is full or fails."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(path, error) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk. Raises WriteError where the disk fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WriteError(folder, error) from error


def write_text(path: Path, text: str, *, name: str = "save_path") -> None:
    """Write a file whole or not at all; folders above it are made. Raises InputError, which names the setting `name`: it cannot be written."""
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}. Choose another {setting(name)}.") from error
