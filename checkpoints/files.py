"""Small files, written whole or not at all, and what is asked of their content and names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, WriteError
from checkpoints.folder import Folder
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


def write_text(path: Path, text: str, *, name: str = "save_path") -> None:
    """Write a file whole or not at all; folders above it are made.

    What is written goes to a name that nobody can guess, and takes the place of `path` by a rename, of a link itself rather
    than of what it points to.

    Raises: InputError, which names the setting `name`: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(path.parent) as folder:
            folder.replace(path.name, [text.encode()])
    except WriteError as error:
        raise InputError(f"{path}: cannot be written: {error.reason}. Choose another {setting(name)}.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}. Choose another {setting(name)}.") from error
