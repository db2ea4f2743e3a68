"""Inside the room: waits for programs, and runs each in a process of its own that locks itself up first.

The zygote imports the usual modules once, so that a run costs two forks and not the start of a Python: one process for
the program, one for the judge, each locked up, in namespaces that the two have for themselves; between them is a channel.
The zygote never reads a program: the judge does, from a descriptor that the outside made. There is one run at a time, and
it is answered only when every process of it is dead.
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
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from . import judge, kernel, landlock, program, room, seccomp
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
LOCKED = b"."  # what each process of a run says when it has locked itself up
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
        answer = _run_one(settings, paths, number, (timeout_s, clock_s), descriptors)
        control.sendall(json.dumps(answer).encode())


def _to_nothing(descriptor: int) -> None:
    """Open the null device anew for a descriptor: its flags, locks and marks are shared with nobody."""
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
    limits: tuple[float, float],
    descriptors: Sequence[int],
) -> dict[str, int | str]:
    """Run and judge one program until the leash says that it is over, and see to it that nothing of it is left.

    Args:
        paths: descriptors of what it may read.
        number: makes the run's folder unique.
        limits: seconds. Of processor time of program and judge together, looked at from when as much has passed on the
            clock; and on the clock, which the outside holds, and from here it is held too, should the outside fail to.
        descriptors: task and result, handed to the judge, and the leash: when that can be read, or its other end is gone,
            what still runs is killed.
    Returns: `status` of the program, as waitpid gives it; `late`, whether the run was ended for its processor time;
        `problem`: why it never started, or an empty text.
    """
    timeout_s, clock_s = limits
    task, result, leash = descriptors
    folder = settings.folder if NAMESPACES in settings.layers else os.path.join(settings.folder, str(number))
    started, started_end = os.pipe()
    ours, theirs = socket.socketpair()
    roles = (
        Role(program.serve, (theirs.fileno(),), folder),
        Role(judge.run, (task, result, ours.fileno())),
    )
    children = _fork_locked(settings, paths, folder, timeout_s, roles, started_end)
    for descriptor in (task, result, started_end, ours.detach(), theirs.detach()):
        os.close(descriptor)
    with open(started, "rb") as file:
        said = file.read()
    ready = said == LOCKED * len(roles)
    late = ready and _runs_out_of_time(children, timeout_s, clock_s, leash)
    os.close(leash)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            if NAMESPACES not in settings.layers:
                os.killpg(child, signal.SIGKILL)
    # In this order: the first process of a process namespace is only gone when all others there are.
    statuses = [os.waitpid(child, 0)[1] for child in reversed(children)]
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # without namespaces: orphans that came to us
            pass
    if NAMESPACES not in settings.layers:
        remove_tree(folder)
    return {
        "status": statuses[-1] if statuses else 0,
        "late": late,
        "problem": "" if ready else said.replace(LOCKED, b"").decode(errors="replace") or "no start",
    }


def _runs_out_of_time(children: list[int], timeout_s: float, clock_s: float, leash: int) -> bool:
    """Wait until a run is over: by the leash, or by its processor time or the clock, in which case it was late."""
    started = time.monotonic()
    patience_s = timeout_s
    while not select.select([leash], [], [], patience_s)[0]:
        if time.monotonic() - started > clock_s + PATIENCE_S or sum(map(processor_s, children)) >= timeout_s:
            return True
        patience_s = LOOK_S
    return False


def processor_s(process: int) -> float:
    """Processor time that a process has used, infinite where it cannot be asked for."""
    try:
        return time.clock_gettime(~process << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3) does it
    except OSError:
        return math.inf


@dataclass(frozen=True)
class Role:
    """What one of the processes of a run does.

    Attributes:
        act: called in it when it is locked up, with its descriptors by their new numbers; never returns.
        descriptors: what it gets of the zygote's.
        folder: where it may write; empty where nowhere.
    """

    act: Callable[..., NoReturn]
    descriptors: tuple[int, ...]
    folder: str = ""


def _fork_locked(
    settings: Settings, paths: list[int], folder: str, timeout_s: float, roles: tuple[Role, ...], started: int
) -> list[int]:
    """Fork the processes that lock themselves up and play the roles.

    Returns: their numbers as the zygote sees them; none where their namespaces could not be made.
    """

    def fork_roles() -> list[int]:
        return [_fork(partial(_lock_up, settings, paths, timeout_s, role, started), started) for role in roles]

    if NAMESPACES not in settings.layers:
        return fork_roles()
    numbers, numbers_end = os.pipe()

    def make_namespaces() -> None:
        _enter_namespaces(folder)
        os.write(numbers_end, json.dumps(fork_roles()).encode())
        os._exit(0)

    maker = _fork(make_namespaces, started)
    os.close(numbers_end)
    with open(numbers, "rb") as file:
        os.waitpid(maker, 0)
        children: list[int] = json.loads(file.read() or b"[]")
    return children


def _fork(act: Callable[[], object], started: int) -> int:
    """A process that acts and never returns; that it cannot is written to `started`."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(started, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(SETUP_FAILED)
    return child


def _enter_namespaces(folder: str) -> None:
    """Make namespaces and enter them, but for that of processes: it is for the children, and ends with the first one."""
    user, group = os.getuid(), os.getgid()
    flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    kernel.unshare(flags)
    kernel.map_identity(NOBODY, user, group)
    limited = f"size={FOLDER_BYTES},nr_inodes={FOLDER_INODES},mode=0700"
    kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, limited)
    kernel.mount("tmpfs", "/proc", "tmpfs", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, "nr_inodes=2")


def _lock_up(settings: Settings, paths: list[int], timeout_s: float, role: Role, started: int) -> None:
    """Put on every layer, and play a role. Does not return, unless a layer cannot be put on: then it raises."""
    if NAMESPACES not in settings.layers:
        if role.folder:
            os.mkdir(role.folder, 0o700)
        if sys.platform == "linux":
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.chdir(role.folder or "/")
    for standard in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(standard).st_mode):  # not where the outside has given programs' output a file
            _to_nothing(standard)
    # First out of the way, so that none is overwritten by another.
    given = (*role.descriptors, started)
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, PATH_DESCRIPTORS) for descriptor in given]
    *own, started = (os.dup2(descriptor, low, inheritable=False) for low, descriptor in enumerate(kept, 3))
    if sys.platform == "linux":
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no core, not even to a pipe, and nobody may trace it
    if LIMITS in settings.layers:
        _limit(settings, timeout_s)
    if LANDLOCK in settings.layers:
        landlock.restrict(paths, (os.devnull, *filter(None, [role.folder])))
    os.closerange(started + 1, FIRST_DESCRIPTOR)
    os.closerange(FIRST_DESCRIPTOR + len(settings.hidden), LAST_DESCRIPTOR)
    if SECCOMP in settings.layers:
        seccomp.restrict()
    os.write(started, LOCKED)
    os.close(started)
    role.act(*own)


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
