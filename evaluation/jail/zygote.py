"""Inside the room: waits for programs, and runs each in a process of its own that locks itself up first.

The zygote imports the usual modules once, so that a run costs a fork and not the start of a Python. It never reads a
program: its child does, from a descriptor that the outside made. It runs one program at a time, and answers only when
every process of that run is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time

from . import kernel, landlock, program, room, seccomp
from .settings import FIRST_DESCRIPTOR, LANDLOCK, LIMITS, NAMESPACES, NOBODY, SECCOMP, Settings, descriptor_path

FILE_BYTES = 16 << 20
OPEN_FILES = 64
PROCESSES = 64  # threads too; counted within the run's own user namespace
FOLDER_BYTES = 64 << 20
FOLDER_INODES = 1024
LOOK_S = 0.05  # how often a run past its time is looked at
PATIENCE_S = 5.0  # so long after its time on the clock a run is ended from here, should the outside not do it
CPUCLOCK_SCHED = 2
SETUP_FAILED = 70
PATH_DESCRIPTORS, LAST_DESCRIPTOR = 64, 256  # the zygote keeps descriptors of paths up there, below there its others

# What solutions import most; anything else of the standard library is read when a program asks for it.
PRELOADED = (
    *("abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "copy", "datetime", "decimal"),
    *("enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "numbers", "operator"),
    *("queue", "random", "re", "site", "statistics", "string", "struct", "textwrap", "threading", "time", "traceback"),
    *("types", "typing", "unicodedata"),
)


def main(arguments: list[str]) -> None:
    """Lock up and wait; arguments[0] is a Settings as JSON, standard input the socket to the outside."""
    settings = Settings.from_json(arguments[0])
    control = socket.socket(fileno=os.dup(0))
    _to_nothing(0)
    for name in PRELOADED:  # while still root: its Python may lie where nobody else can read
        importlib.import_module(name)
    if settings.root:
        room.build(settings)
    paths = _open_paths(settings)
    if sys.platform == "linux":
        kernel.drop_root(NOBODY)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or the files of its own /proc entry are root's
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    _prepare_python(settings)
    control.sendall(b"ready")
    _to_nothing(2)
    number = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 3)
        if not message:
            return
        number += 1
        timeout_s, clock_s = map(float, message.split())
        answer = _run_one(settings, paths, number, timeout_s, clock_s, *descriptors)
        control.sendall(json.dumps(answer).encode())


def _to_nothing(descriptor: int) -> None:
    with open(os.devnull, "r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), descriptor)


def _open_paths(settings: Settings) -> list[int]:
    """Descriptors of what programs may read, for Landlock; and of the hidden folders, each with its own number."""
    paths = []
    for path in (*settings.readable, *room.DEVICES):
        if os.path.exists(path):
            low = os.open(path, os.O_PATH)
            paths.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, PATH_DESCRIPTORS))
            if path in settings.hidden:
                os.dup2(low, FIRST_DESCRIPTOR + settings.hidden.index(path), inheritable=False)
            os.close(low)
    return paths


def _prepare_python(settings: Settings) -> None:
    """Import, and leave programs an interpreter as they expect it: no environment, the standard library, numpy."""
    importlib.import_module("site").setquit()  # Python was started with -S, which leaves out `exit` and `quit`
    os.environ.clear()
    # Read by numpy's OpenBLAS when it is loaded: one thread. putenv does not show in os.environ.
    os.putenv("OPENBLAS_NUM_THREADS", "1")
    del sys.path[-1]  # this package
    sys.path += settings.library
    for index, folder in enumerate(settings.hidden):
        new = descriptor_path(index)
        sys.path = [path.replace(folder, new) for path in sys.path]
        for module in list(sys.modules.values()):
            if isinstance(getattr(module, "__path__", None), list):
                module.__path__ = [path.replace(folder, new) for path in module.__path__]
    sys.path_importer_cache.clear()
    gc.collect()
    gc.freeze()


def _run_one(
    settings: Settings,
    paths: list[int],
    number: int,
    timeout_s: float,
    clock_s: float,
    task: int,
    result: int,
    leash: int,
) -> dict[str, int | str]:
    """Run one program until the leash says that it is over, and see to it that nothing of it is left.

    Args:
        paths: descriptors of what it may read.
        number: makes the run's folder unique.
        timeout_s: its processor time, looked at from when as much has passed on the clock.
        clock_s: time on the clock; the outside holds it, and from here it is held too, should the outside fail to.
        task, result: descriptors, handed to the program.
        leash: a descriptor; when it can be read, or its other end is gone, what still runs is killed.
    Returns: `status`, as waitpid gives it; `late`, whether it was killed for its processor time; `problem`: why the
        program never started, or an empty text.
    """
    folder = settings.folder if NAMESPACES in settings.layers else os.path.join(settings.folder, str(number))
    started, started_end = os.pipe()
    child = _fork_locked(settings, paths, folder, timeout_s, task, result, started_end)
    for descriptor in (task, result, started_end):
        os.close(descriptor)
    with open(started, "rb") as file:
        said = file.read()
    late = said == b"ok" and _runs_out_of_time(child, timeout_s, clock_s, leash)
    os.close(leash)
    status = 0
    if child:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            if NAMESPACES not in settings.layers:
                os.killpg(child, signal.SIGKILL)
        # The first process of a process namespace is only gone when all others there are.
        _, status = os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # without namespaces: orphans that came to us
            pass
    if NAMESPACES not in settings.layers:
        remove_tree(folder)
    return {
        "status": status,
        "late": late,
        "problem": "" if said == b"ok" else said.decode(errors="replace") or "no start",
    }


def _runs_out_of_time(child: int, timeout_s: float, clock_s: float, leash: int) -> bool:
    """Wait until a run is over: by the leash, or by its processor time or the clock, in which case it was late."""
    started = time.monotonic()
    patience_s = timeout_s
    while not select.select([leash], [], [], patience_s)[0]:
        if time.monotonic() - started > clock_s + PATIENCE_S or processor_s(child) >= timeout_s:
            return True
        patience_s = LOOK_S
    return False


def processor_s(process: int) -> float:
    """Processor time that a process has used, infinite where it cannot be asked for."""
    try:
        return time.clock_gettime(~process << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3) does it
    except OSError:
        return math.inf


def _fork_locked(
    settings: Settings, paths: list[int], folder: str, timeout_s: float, task: int, result: int, started: int
) -> int:
    """Fork the process that locks itself up and runs the program.

    Returns: its number as the zygote sees it; 0 where its namespaces could not be made.
    """
    numbers, numbers_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if NAMESPACES in settings.layers:
                _enter_namespaces(folder, numbers_end)
            _lock_up(settings, paths, folder, timeout_s, task, result, started)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(started, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(SETUP_FAILED)
    os.close(numbers_end)
    with open(numbers, "rb") as file:
        if NAMESPACES in settings.layers:
            os.waitpid(child, 0)
            child = int(file.read() or 0)
    return child


def _enter_namespaces(folder: str, numbers: int) -> None:
    """Go on as the first process of new namespaces; the process that called writes its number to `numbers` and ends."""
    user, group = os.getuid(), os.getgid()
    flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    kernel.unshare(flags)
    kernel.map_identity(NOBODY, user, group)
    first = os.fork()
    if first:
        os.write(numbers, str(first).encode())
        os._exit(0)
    limited = f"size={FOLDER_BYTES},nr_inodes={FOLDER_INODES},mode=0700"
    kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, limited)
    kernel.mount("tmpfs", "/proc", "tmpfs", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, "nr_inodes=2")


def _lock_up(
    settings: Settings, paths: list[int], folder: str, timeout_s: float, task: int, result: int, started: int
) -> None:
    """Put on every layer, and run the program. Does not return, unless a layer cannot be put on: then it raises."""
    if NAMESPACES not in settings.layers:
        os.mkdir(folder, 0o700)
        if sys.platform == "linux":
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.chdir(folder)
    # First out of the way, so that none is overwritten by another.
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, PATH_DESCRIPTORS) for descriptor in (task, result, started)]
    task, result, started = (os.dup2(descriptor, low, inheritable=False) for low, descriptor in enumerate(kept, 3))
    if sys.platform == "linux":
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no core, not even to a pipe, and nobody may trace it
    if LIMITS in settings.layers:
        _limit(settings, timeout_s)
    if LANDLOCK in settings.layers:
        landlock.restrict(paths, (folder, os.devnull))
    os.closerange(started + 1, FIRST_DESCRIPTOR)
    os.closerange(FIRST_DESCRIPTOR + len(settings.hidden), LAST_DESCRIPTOR)
    if SECCOMP in settings.layers:
        seccomp.restrict()
    os.write(started, b"ok")
    os.close(started)
    program.run(task, result)


def _limit(settings: Settings, timeout_s: float) -> None:
    """Set the resource limits; a lower one that is there already stays."""
    limits = {
        "RLIMIT_AS": settings.memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if NAMESPACES in settings.layers:  # elsewhere it counts all processes of the user
        limits["RLIMIT_NPROC"] = PROCESSES
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except ValueError:
            if sys.platform == "linux":  # macOS knows no limit on address space
                raise


def remove_tree(folder: str) -> None:
    """Remove a folder whose content means harm: folders without rights, or nested deeper than a path or stack is long.

    Its folders are moved up into it, one level at a time, so that no path grows and nothing recurses.
    """
    moved = 0
    with contextlib.suppress(OSError):
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in os.scandir(entry.path):
                    if inner.is_dir(follow_symlinks=False):
                        moved += 1
                        os.chmod(inner.path, 0o700)
                        os.rename(inner.path, f"{folder}/moved {moved}")
                    else:
                        os.unlink(inner.path)
                os.rmdir(entry.path)
        os.rmdir(folder)
