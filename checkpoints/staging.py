"""The output folder appears complete or not at all: work goes on in `OUT.partial/`, the last act is a rename.

Where `OUT` is a symbolic link, what it points to is meant: the work goes on beside that, on its disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError

RECIPE_FILE = "merge_recipe.json"
SWEEP_PREFIX = "omega_"
"""What the folders of a sweep are called, one checkpoint each: `omega_0.2`."""


MARKER = ".merge-in-progress"


class ForeignFolder(InputError):
    """The work folder is in use for something else; nothing in it may be touched."""


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run left in its folder, without its report; None where there is none that can be read."""
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return {key: value for key, value in recipe.items() if key != "report"} if isinstance(recipe, dict) else None


def write_text(path: Path, text: str, *, flag: str = "--save_path") -> None:
    """Write a file whole or not at all; folders above it are made. Raises InputError, which names `flag`: it cannot be written."""
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
        raise InputError(f"{path}: cannot be written: {error.strerror}. Choose another {flag}.") from error


def partial_folder(save_path: Path) -> Path:
    """Where the work for `save_path` goes on: beside it, so that the rename stays on one file system."""
    target = save_path.resolve()
    return target.with_name(target.name + ".partial")


def _replaced_folder(target: Path) -> Path:
    """Where an earlier result lies for the moment between two renames."""
    return target.with_name(target.name + ".replaced")


def check_save_path(save_path: Path, inputs: Iterable[Path], *, overwrite: bool) -> list[InputError]:
    """Everything that keeps an output folder from being written, known without touching it.

    Args:
        save_path: the folder to be.
        inputs: folders that are read; none may be the output, lie in it or hold it.
        overwrite: whether an earlier result may be replaced.
    """
    try:
        save_path.resolve()
    except RuntimeError:
        return [ArgumentError(f"--save_path {save_path}: its symbolic links lead in a circle. Choose another path.")]
    problem = (
        _check_overlap(save_path, [folder.resolve() for folder in inputs])
        or _check_existing(save_path, overwrite=overwrite)
        or _check_parent(save_path)
    )
    return [problem] if problem else []


def _check_overlap(save_path: Path, inputs: Iterable[Path]) -> InputError | None:
    """A refusal where the output and an input, or the folder we are in, share files."""
    target = save_path.resolve()
    for folder in inputs:
        if target == folder:
            return ArgumentError(f"--save_path {save_path}: is the input {folder}. Choose another folder.")
        if target in folder.parents:
            return ArgumentError(f"--save_path {save_path}: holds the input {folder}. Choose another folder.")
        if folder in target.parents and (folder / "config.json").exists():
            return ArgumentError(f"--save_path {save_path}: lies inside the input {folder}. Choose another folder.")
    here = Path.cwd()
    if target in (here, *here.parents):
        return ArgumentError(
            f"--save_path {save_path}: is the current folder or holds it, which cannot be replaced. Name a new folder."
        )
    return None


def _check_existing(save_path: Path, *, overwrite: bool) -> InputError | None:
    """A refusal where something is at `save_path` that must stay."""
    replaced = _replaced_folder(save_path.resolve())
    if replaced.exists():
        return ArgumentError(
            f"--save_path {save_path}: {replaced} holds an earlier result, from a run that was cut off. Move it back or remove it."
        )
    if not save_path.exists():
        return None
    if not save_path.is_dir():
        return ArgumentError(f"--save_path {save_path}: expected a folder, got a file. Choose another path.")
    if not any(save_path.iterdir()):
        return None
    if not overwrite:
        return ArgumentError(f"--save_path {save_path}: the folder is not empty. Choose another, or add --overwrite.")
    if not _is_result(save_path):
        return ArgumentError(
            f"--save_path {save_path}: --overwrite replaces only a folder that holds a {RECIPE_FILE}, or nothing but the folders of a sweep that do. Choose another folder."
        )
    return None


def _is_result(folder: Path) -> bool:
    """Whether a run wrote the folder: one checkpoint, or a sweep of them and nothing beside it."""
    if (folder / RECIPE_FILE).is_file():
        return True
    return all(entry.name.startswith(SWEEP_PREFIX) and (entry / RECIPE_FILE).is_file() for entry in folder.iterdir())


def _check_parent(save_path: Path) -> InputError | None:
    """A refusal where the folder above `save_path` cannot be made or written to."""
    ancestor = existing_ancestor(save_path)
    if not ancestor.is_dir():
        return ArgumentError(f"--save_path {save_path}: {ancestor} is a file, no folder. Choose another path.")
    if not is_writable(ancestor):
        return InputError(
            f"--save_path {save_path}: {ancestor} cannot be written to. Choose another folder or change its permissions."
        )
    return None


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, found by trying: permissions do not tell of read-only and virtual disks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def existing_ancestor(save_path: Path) -> Path:
    """The nearest folder above `save_path` that is there."""
    return next(parent for parent in save_path.resolve().parents if parent.exists())


def check_space(save_path: Path, needed: int) -> list[InputError]:
    """A refusal where the disk of `save_path` has fewer than `needed` bytes free."""
    ancestor = existing_ancestor(save_path)
    free = shutil.disk_usage(ancestor).free
    if needed <= free:
        return []
    return [
        InputError(
            f"--save_path {save_path}: the output needs {needed:,} bytes, {ancestor} has {free:,} free. Free space or choose another disk."
        )
    ]


@contextmanager
def staged(save_path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to work in; rename it to `save_path` at the end, or remove it where anything went wrong.

    Args:
        save_path: the folder to be.
        overwrite: whether an earlier result may be replaced, which happens by rename; it is back where a step fails.

    Raises: InputError: another run works on the same output, or has just written it; the folder cannot be made.
    """
    target = save_path.resolve()
    work = partial_folder(target)
    made = [parent for parent in reversed(work.parents) if not parent.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"{work}: cannot be created: {error.strerror}. Choose another --save_path.") from error
    try:
        if not _lock(lock, work):
            raise InputError(
                f"{save_path}: another run is writing it. Wait for that run, or choose another --save_path."
            )
        try:
            _claim(work)
            # Once more, now that no other run can publish: one may have done so since the plan was made.
            problem = _check_existing(target, overwrite=overwrite)
            if problem:
                raise problem
            yield work
            _publish(work, target)
        except ForeignFolder:
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            _remove_empty(made)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, work: Path) -> bool:
    """Take the lock on the open folder `work`, which dies with its process, so that a crash leaves none behind.

    False where another run holds it, or held it and has renamed or removed the folder since we opened it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(work))
    except OSError:
        return False


def _claim(work: Path) -> None:
    """Empty a work folder that an earlier run left, and mark it as one. Raises InputError where it is somebody else's."""
    if any(work.iterdir()) and not (work / MARKER).is_file():
        raise ForeignFolder(
            f"{work}: holds files that no run of ours put there. Move them, or choose another --save_path."
        )
    clear(work)
    (work / MARKER).touch()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those folders, the last first, that exist and hold nothing."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what is in a folder, and not the folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(work: Path, target: Path) -> None:
    (work / MARKER).unlink()
    _sync(work)
    if target.exists() and any(target.iterdir()):
        replaced = _replaced_folder(target)
        os.rename(target, replaced)
        try:
            os.rename(work, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(work, target)  # an empty folder gives way
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
