"""The output folder appears complete or not at all: work goes on in `OUT.partial/`, the last act is a rename.

Where `OUT` is a symbolic link, what it points to is meant: the work goes on beside that, on its disk.

What an interrupted run leaves in `OUT.partial/` is gone on with by a run of the same identity: a mapping of everything that
decides the output's bytes. It lies in `OUT.partial/.merge-in-progress/`, with a journal of what is on the disk for good.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import AlreadyComplete, ArgumentError, InputError, Interrupted, WriteError
from checkpoints.files import sync_folder, write_file
from checkpoints.journal import Journal

RECIPE_FILE = "merge_recipe.json"
SWEEP_PREFIX = "omega_"
"""What the folders of a sweep are called, one checkpoint each: `omega_0.2`."""
STATE = ".merge-in-progress"
"""Folder in the work folder: whose run it is (`run.json`), its journal, and what else the run keeps."""


class ForeignFolder(InputError):
    """The work folder is in use for something else; nothing in it may be touched."""


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
    """A refusal where the disk of `save_path` has fewer than `needed` bytes free; what an interrupted run took counts as free."""
    ancestor = existing_ancestor(save_path)
    work = partial_folder(save_path)
    taken = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0
    free = shutil.disk_usage(ancestor).free + taken
    if needed <= free:
        return []
    return [
        InputError(
            f"--save_path {save_path}: the output needs {needed:,} bytes, {ancestor} has {free:,} free. Free space or choose another disk."
        )
    ]


@dataclass(frozen=True)
class Stage:
    """A folder to work in, which becomes the output.

    Attributes:
        folder: for the output's files.
        state: for what the run keeps until it is complete.
        journal: what of the run is on the disk for good; records of earlier runs among them.
        identity: digest of what decides the output's bytes, for merge_recipe.json.
    """

    folder: Path
    state: Path
    journal: Journal
    identity: str


def digest_of(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity, the same for equal ones."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_complete(save_path: Path, folders: Sequence[str], identity: Mapping[str, Any]) -> None:
    """Raise AlreadyComplete where an earlier run has written this very output.

    Args:
        save_path: the folder to be; folders: below it, one for each checkpoint, `""` for the folder itself.
        identity: see `staged`.
    """
    if _holds(save_path, folders, digest_of(identity)):
        raise AlreadyComplete(f"{save_path}: is complete already, made of the same inputs in the same way.")


def _holds(folder: Path, parts: Sequence[str], identity: str) -> bool:
    """Whether a folder has every checkpoint of a run: its recipe, which is written last, and files of the sizes it names."""
    for part in parts:
        try:
            recipe = json.loads((folder / part / RECIPE_FILE).read_bytes())
            sizes = {name: entry["bytes"] for name, entry in recipe["outputs"].items()}
            if recipe.get("identity") != identity:
                return False
            if any((folder / part / name).stat().st_size != size for name, size in sizes.items()):
                return False
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
    return True


@contextmanager
def staged(
    save_path: Path,
    *,
    overwrite: bool,
    folders: Sequence[str] = ("",),
    identity: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Iterator[Stage]:
    """Give a folder to work in; rename it to `save_path` at the end.

    Where the run is cut off (Ctrl-C, a full disk, `kill -9`), what its journal has stays for the next run of the same
    identity. Where an input is at fault, nothing stays.

    Args:
        save_path: the folder to be.
        overwrite: whether an earlier result may be replaced, which happens by rename; it is back where a step fails.
        folders: of the checkpoints, as in `check_complete`.
        identity: everything that decides the output's bytes, for JSON.
        resume: go on with what an interrupted run of this identity left; without, begin again, whoever's it is.

    Raises:
        InputError: another run works on the same output, or has just written it; the work folder holds an unfinished run
            of another identity, or something else; it cannot be made.
        AlreadyComplete: an earlier run was cut off just before the rename, which has been done now.
        Interrupted: Ctrl-C, with something to go on with.
    """
    target = save_path.resolve()
    work = partial_folder(target)
    known = dict(identity or {})
    made = [parent for parent in reversed(work.parents) if not parent.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"{work}: cannot be created: {error.strerror}. Choose another --save_path.") from error
    journal: Journal | None = None
    try:
        if not _lock(lock, work):
            raise InputError(
                f"{save_path}: another run is writing it. Wait for that run, or choose another --save_path."
            )
        try:
            done = resume and _holds(work, folders, digest_of(known))
            if not done:
                _claim(work, known, resume=resume)
            # Once more, now that no other run can publish: one may have done so since the plan was made.
            problem = _check_existing(target, overwrite=overwrite)
            if problem:
                raise problem
            if not done:
                journal = Journal(work / STATE / "journal")
                yield Stage(work, work / STATE, journal, digest_of(known))
            _publish(work, target)
        except ForeignFolder:
            raise
        except BaseException as error:
            stays = isinstance(error, WriteError) or not isinstance(error, InputError)
            if not (stays and journal and journal.records):
                shutil.rmtree(work, ignore_errors=True)
                _remove_empty(made)
            elif isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"interrupted. Run the same command again to go on; {work} holds what is done."
                ) from None
            raise
        if done:
            raise AlreadyComplete(f"{save_path}: is complete now; an earlier run had left only its renaming to do.")
    finally:
        if journal:
            journal.close()
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


def _claim(work: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Make a work folder ours: as it is where a run of this identity left it, else emptied.

    Raises: ForeignFolder: it holds something else, or what a run of another identity can go on with.
    """
    run = work / STATE / "run.json"
    if any(work.iterdir()) and not (work / STATE).is_dir() and not _is_result(work):
        raise ForeignFolder(
            f"{work}: holds files that no run of ours put there. Move them, or choose another --save_path."
        )
    earlier: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        earlier = json.loads(run.read_bytes())
    normal = json.loads(json.dumps(identity))
    if resume and earlier == normal:
        return
    if resume and earlier is not None and _has_records(work / STATE / "journal"):
        raise ForeignFolder(
            f"{work}: holds an unfinished run that differs in {', '.join(_differences(earlier, normal))}. Run that command again "
            "to go on with it, add --no_resume to begin anew, or choose another --save_path."
        )
    clear(work)
    run.parent.mkdir()
    partial = run.with_suffix(".partial")
    write_file(partial, json.dumps(normal, indent=1).encode())
    os.rename(partial, run)
    for folder in (run.parent, work, work.parent):
        sync_folder(folder)


def _has_records(path: Path) -> bool:
    """Whether a journal has anything to go on with."""
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two identities differ, as `recipe.parameters.lambda (0.5 there, 1.0 here)`."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [
            line
            for key in keys
            if one.get(key) != other.get(key)
            for line in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for at, (a, b) in pairs if a != b for line in _differences(a, b, f"{path}[{at}]")]
    texts = [json.dumps(value) for value in (one, other)]
    return [f"{path} ({texts[0]} there, {texts[1]} here)" if max(map(len, texts)) < 80 else path]


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
    shutil.rmtree(work / STATE, ignore_errors=True)
    for folder in (*(path for path in work.rglob("*") if path.is_dir()), work):
        sync_folder(folder)
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
    sync_folder(target.parent)
