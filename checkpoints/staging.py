"""The output folder appears complete or not at all: work goes on in `OUT.partial/`, the last act is a rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import ArgumentError, InputError

RECIPE_FILE = "merge_recipe.json"


def partial_folder(save_path: Path) -> Path:
    """Where the work for `save_path` goes on: beside it, so that the rename stays on one file system."""
    return save_path.with_name(save_path.name + ".partial")


def check_save_path(save_path: Path, inputs: Iterable[Path], *, overwrite: bool) -> list[InputError]:
    """Everything that keeps an output folder from being written, known without touching it.

    Args:
        save_path: the folder to be.
        inputs: folders that are read; none may be the output, lie in it or hold it.
        overwrite: whether an earlier result may be replaced.
    """
    target = save_path.resolve()
    problems: list[InputError] = []
    for folder in inputs:
        other = folder.resolve()
        if target == other or target in other.parents:
            problems.append(
                ArgumentError(f"--save_path {save_path}: is an input or holds one ({folder}). Choose another folder.")
            )
        elif other in target.parents and (other / "config.json").exists():
            problems.append(
                ArgumentError(f"--save_path {save_path}: lies inside the input {folder}. Choose another folder.")
            )
    if save_path.exists() or save_path.is_symlink():
        if not save_path.is_dir():
            problems.append(ArgumentError(f"--save_path {save_path}: is no folder. Choose another path."))
        elif any(save_path.iterdir()):
            if not overwrite:
                problems.append(
                    ArgumentError(
                        f"--save_path {save_path}: the folder is not empty. Choose another, or add --overwrite."
                    )
                )
            elif not (save_path / RECIPE_FILE).is_file():
                problems.append(
                    ArgumentError(
                        f"--save_path {save_path}: --overwrite replaces only a folder that holds a {RECIPE_FILE}. Choose another folder."
                    )
                )
    ancestor = next(parent for parent in (target.parent, *target.parents) if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        problems.append(
            InputError(
                f"--save_path {save_path}: {ancestor} cannot be written to. Choose another folder or change its permissions."
            )
        )
    return problems


def check_space(save_path: Path, needed: int) -> list[InputError]:
    """A refusal where the disk of `save_path` has fewer than `needed` bytes free."""
    ancestor = next(parent for parent in save_path.resolve().parents if parent.exists())
    free = shutil.disk_usage(ancestor).free
    if needed <= free:
        return []
    return [
        InputError(
            f"--save_path {save_path}: the output needs {needed:,} bytes, {ancestor} has {free:,} free. Free space or choose another disk."
        )
    ]


@contextmanager
def staged(save_path: Path) -> Iterator[Path]:
    """Give a folder to work in; rename it to `save_path` at the end, or remove it where anything went wrong.

    An earlier `save_path` (checked by `check_save_path`) is replaced by rename, and is back where a step fails.

    Raises: InputError: another run works on the same output; the folder cannot be made.
    """
    work = partial_folder(save_path)
    made = _make_parents(work)
    try:
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{work}: cannot be opened: {error.strerror}.") from error
    try:
        try:
            # A lock dies with its process, so a crash leaves none behind.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            made = []
            raise InputError(
                f"{save_path}: another run is writing it. Wait for that run, or choose another --save_path."
            ) from None
        clear(work)
        try:
            yield work
            _publish(work, save_path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            for folder in reversed(made):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise
    finally:
        os.close(lock)


def _make_parents(work: Path) -> list[Path]:
    """Create `work` and its parents; the parents that were not there, outermost first."""
    made = [parent for parent in reversed(work.parents) if not parent.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{work}: cannot be created: {error.strerror}. Choose another --save_path.") from error
    return made


def clear(folder: Path) -> None:
    """Remove what is in a folder, and not the folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(work: Path, save_path: Path) -> None:
    _sync(work)
    replaced = save_path.with_name(save_path.name + ".replaced")
    if save_path.exists():
        os.rename(save_path, replaced)
        try:
            os.rename(work, save_path)
        except OSError:
            os.rename(replaced, save_path)
            raise
        shutil.rmtree(replaced)
    else:
        os.rename(work, save_path)
    _sync(save_path.parent)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
