"""Outside: what a program gets to see, and where. System libraries, Python's standard library, numpy; all read-only."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from . import host, room
from .settings import NOBODY, Settings, descriptor_path

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")
LIBRARY = "/site"  # in a room: a folder that holds numpy and nothing else

Pairs = tuple[tuple[str, str], ...]


def python() -> str:
    """The interpreter below any virtual environment, without links."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def numpy_folders() -> list[str]:
    """numpy's package, and the folder of libraries that its wheels come with; empty where it is not installed."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.origin:
        return []
    package = os.path.dirname(os.path.realpath(spec.origin))
    return [folder for folder in (package, package + ".libs") if os.path.isdir(folder)]


def system() -> tuple[list[str], Pairs]:
    """(folders and files to show where they are, (name, target) of links to make) for the system and Python."""
    links = tuple((path, os.readlink(path)) for path in SYSTEM if os.path.islink(path))
    shown = [path for path in SYSTEM if os.path.exists(path) and not os.path.islink(path)]
    for path in (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(python())):
        real = os.path.realpath(path)
        if not any(Path(real).is_relative_to(other) for other in shown):
            shown.append(real)
    return shown, links


def shown_in_room() -> tuple[Pairs, Pairs, tuple[str, ...]]:
    """(binds, links, what may be read) of a room."""
    shown, links = system()
    binds = [(path, path) for path in shown]
    binds += [(folder, f"{LIBRARY}/{os.path.basename(folder)}") for folder in numpy_folders()]
    return tuple(binds), links, (*shown, LIBRARY)


def bubblewrap(executable: str, layers: tuple[str, ...], memory_bytes: int) -> tuple[list[str], Settings]:
    """(start of the command, settings) for a room that bwrap makes."""
    binds, links, readable = shown_in_room()
    code = (str(host.CODE), f"{host.CODE_INSIDE}/{host.CODE.name}")
    settings = Settings(layers, memory_bytes, room.FOLDER, readable, (LIBRARY,))
    return room.bubblewrap(executable, [*binds, code], links), settings


def own_room(scratch: str, layers: tuple[str, ...], memory_bytes: int) -> Settings:
    """Settings for a room that the zygote makes, on an empty folder below `scratch`."""
    binds, links, readable = shown_in_room()
    root = tempfile.mkdtemp(dir=scratch)
    return Settings(layers, memory_bytes, room.FOLDER, readable, (LIBRARY,), root=root, binds=binds, links=links)


def no_room(scratch: str, layers: tuple[str, ...], memory_bytes: int) -> Settings:
    """Settings for a zygote that sees the system as it is.

    Where root's Python lies in a folder that is closed to others (/root/.pyenv, /root/miniconda3), the unprivileged
    user that programs run as reaches it through a descriptor, which the zygote opens while it still is root.
    """
    shown, _ = system()
    packages = numpy_folders()
    hidden = [folder for folder in (*shown, *packages) if not open_to_all(folder)]
    site = Path(tempfile.mkdtemp(dir=scratch))
    site.chmod(0o755)
    for folder in packages:
        target = descriptor_path(hidden.index(folder)) if folder in hidden else folder
        site.joinpath(os.path.basename(folder)).symlink_to(target)
    runs = tempfile.mkdtemp(dir=scratch)
    if os.getuid() == 0:
        os.chown(runs, NOBODY, NOBODY)
    readable = (*shown, *(path for path in SYSTEM if os.path.islink(path)), *packages, str(site))
    return Settings(layers, memory_bytes, runs, readable, (str(site),), tuple(hidden))


def open_to_all(path: str) -> bool:
    """Whether any user can get to a file or folder and read it; the caller can, so this matters to root alone."""
    real = Path(path).resolve()
    return os.getuid() != 0 or (
        bool(real.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in real.parents)
    )
