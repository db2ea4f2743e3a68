"""Where an output goes: what its folders are called, and everything that keeps it from being written, known without touching it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError
from checkpoints.settings import setting

RECIPE_FILE = "merge_recipe.json"
SWEEP_PREFIX = "omega_"
"""What the folders of a sweep over omegas are called, one checkpoint each: `omega_0.2`."""
SWEEP_PREFIXES = (SWEEP_PREFIX, "lambda_", "density_")
"""How the folders of all sweeps begin: `lambda_0.5`, `lambda_0.5_density_0.3`."""


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run left in its folder, without its report; None where there is none that can be read."""
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return {key: value for key, value in recipe.items() if key != "report"} if isinstance(recipe, dict) else None


def partial_folder(save_path: Path) -> Path:
    """Where the work for `save_path` goes on: beside it, so that the rename stays on one file system."""
    target = save_path.resolve()
    return target.with_name(target.name + ".partial")


def replaced_folder(target: Path) -> Path:
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
        return [
            ArgumentError(
                f"{setting('save_path', save_path)}: its symbolic links lead in a circle. Choose another path."
            )
        ]
    problem = (
        _check_overlap(save_path, [folder.resolve() for folder in inputs])
        or check_existing(save_path, overwrite=overwrite)
        or _check_parent(save_path)
    )
    return [problem] if problem else []


def _check_overlap(save_path: Path, inputs: Iterable[Path]) -> InputError | None:
    """A refusal where the output and an input, or the folder we are in, share files."""
    target = save_path.resolve()
    for folder in inputs:
        if target == folder:
            return ArgumentError(f"{setting('save_path', save_path)}: is the input {folder}. Choose another folder.")
        if target in folder.parents:
            return ArgumentError(f"{setting('save_path', save_path)}: holds the input {folder}. Choose another folder.")
        if folder in target.parents and (folder / "config.json").exists():
            return ArgumentError(
                f"{setting('save_path', save_path)}: lies inside the input {folder}. Choose another folder."
            )
    here = Path.cwd()
    if target in (here, *here.parents):
        return ArgumentError(
            f"{setting('save_path', save_path)}: is the current folder or holds it, which cannot be replaced. Name a new folder."
        )
    return None


def check_existing(save_path: Path, *, overwrite: bool) -> InputError | None:
    """A refusal where something is at `save_path` that must stay."""
    replaced = replaced_folder(save_path.resolve())
    if replaced.exists():
        return ArgumentError(
            f"{setting('save_path', save_path)}: {replaced} holds an earlier result, from a run that was cut off. Move it back or remove it."
        )
    if not save_path.exists():
        return None
    if not save_path.is_dir():
        return ArgumentError(f"{setting('save_path', save_path)}: expected a folder, got a file. Choose another path.")
    if not any(save_path.iterdir()):
        return None
    if not overwrite:
        return ArgumentError(
            f"{setting('save_path', save_path)}: the folder is not empty. Choose another, or add {setting('overwrite')}."
        )
    if not is_result(save_path):
        return ArgumentError(
            f"{setting('save_path', save_path)}: {setting('overwrite')} replaces only a folder that holds a {RECIPE_FILE}, or nothing but the folders of a sweep that do. Choose another folder."
        )
    return None


def is_result(folder: Path) -> bool:
    """Whether a run wrote the folder: one checkpoint, or a sweep of them and nothing beside it."""
    if (folder / RECIPE_FILE).is_file():
        return True
    return all(entry.name.startswith(SWEEP_PREFIXES) and (entry / RECIPE_FILE).is_file() for entry in folder.iterdir())


def _check_parent(save_path: Path) -> InputError | None:
    """A refusal where the folder above `save_path` cannot be made or written to."""
    ancestor = existing_ancestor(save_path)
    if not ancestor.is_dir():
        return ArgumentError(
            f"{setting('save_path', save_path)}: {ancestor} is a file, no folder. Choose another path."
        )
    if not is_writable(ancestor):
        return InputError(
            f"{setting('save_path', save_path)}: {ancestor} cannot be written to. Choose another folder or change its permissions."
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
    """A refusal where the disk of `save_path` has fewer than `needed` bytes free; what an interrupted run took counts as free."""
    ancestor = existing_ancestor(save_path)
    work = partial_folder(save_path)
    taken = sum(path.lstat().st_blocks * 512 for path in work.rglob("*")) if work.is_dir() else 0
    free = shutil.disk_usage(ancestor).free + taken
    if needed <= free:
        return []
    return [
        InputError(
            f"{setting('save_path', save_path)}: the output needs {needed:,} bytes, {ancestor} has {free:,} free. Free space or choose another disk."
        )
    ]
