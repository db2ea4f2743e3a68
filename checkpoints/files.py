"""Small files and folders, written so that they are on the disk for good."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.errors import WriteError


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
