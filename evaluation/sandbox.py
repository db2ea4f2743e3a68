"""Run programs that a model wrote, locked up, and say which of them pass their tests.

    with Sandbox() as sandbox:
        verdicts = sandbox.run([Program("def f(x): return x + 1", "assert f(1) == 2")])

Each program runs as an unprivileged user in a process of its own, without network, home, environment, other processes
or a terminal, in a fresh folder, under limits of memory, time, files and output; nothing of it is alive when the next
one starts. Its test runs in another process, locked up likewise: it calls the program's functions through a narrow channel
of plain values, and compares what it gets by tools that the program cannot reach. How both are held depends on the machine; the first level that a trial run proves is taken:

    BUBBLEWRAP       bubblewrap's view of the file system, which holds the system's libraries, Python and numpy, all
                     read-only; for each run new namespaces and a small file system of its own; Landlock where the
                     kernel has it; a seccomp filter; resource limits.
    USERNS_LANDLOCK  the same without bubblewrap: the view is made by namespaces of our own, and Landlock is required.
    LANDLOCK         no namespaces: Landlock, the filter and the limits. Names, sizes and times of files outside can be
                     asked for (not their contents), and only time bounds how many files a run makes in its folder.
    UNSAFE           limits and a clock. Only when asked for: a program can read, change and send what its user can.

No level stops a bug in the kernel. A pass is never an exit code: the test's process sends a one-time token back, and for the
same test with an impossible end (`assert False`), run twice and in random order with the real one, it must not; a program
for which it does is `forged`. docs/evaluation.md says what a test cannot do through the channel, and what stays possible.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Literal

from checkpoints.errors import InputError
from checkpoints.settings import setting
from evaluation.jail import landlock, seccomp, trial, view
from evaluation.jail.host import Jail, JailError
from evaluation.jail.kernel import MACHINE
from evaluation.jail.settings import LANDLOCK, LAYERS, LIMITS, SECCOMP
from evaluation.jail.zygote import remove_tree

MEMORY_BYTES = 1 << 30
PATIENCE = 5.0
REFERENCE_S = 30.0
"""For an item's own solution, whose time the limit is measured against."""
REFERENCE_ROOM = 2.0
"""Times what the own solution takes is how long every other program may take at least."""
IMPOSSIBLE_DRAWS = 2
HOW_TO = (
    "Install bubblewrap (apt install bubblewrap), or allow user namespaces (user.max_user_namespaces above 0, on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0), or use a kernel with Landlock (5.13 or newer)."
)
Progress = Callable[[int, int], object]


class Level(Enum):
    """How programs are held, from the strongest to none."""

    BUBBLEWRAP = "bubblewrap"
    USERNS_LANDLOCK = "userns_landlock"
    LANDLOCK = "landlock"
    UNSAFE = "unsafe"


LOCKED = (Level.BUBBLEWRAP, Level.USERNS_LANDLOCK, Level.LANDLOCK)
WARNINGS = {
    Level.LANDLOCK: "sandbox: only Landlock works here. Programs cannot read or change files, reach the network or "
    f"other processes, but see names and sizes of files, and only time bounds how much disk a run fills. {HOW_TO}",
    Level.UNSAFE: "sandbox: programs that a model wrote run WITHOUT a lock; they can read, change and send whatever "
    "this user can.",
}


@dataclass(frozen=True)
class Program:
    """A program and what it has to hold against.

    Attributes:
        source: the completed program.
        test: its assertions, run in a process of their own.
        timeout_s: wall clock for both together.
        names: what the test takes from the program; None: all names that it reads and that are not built in.
        reference: a program that is right. Where a slow machine takes more than half of `timeout_s` for it, a program may take
            twice as long as it does.
    """

    source: str
    test: str
    timeout_s: float = 3.0
    names: tuple[str, ...] | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        status: `error` says that the jail failed, not the program.
        detail: a short reason; it comes from the program and is never to be trusted.
        seconds: wall clock of the run that decided.
    """

    status: Literal["passed", "failed", "timeout", "forged", "error"]
    detail: str
    seconds: float


def probe(*, unsafe: bool = False, memory_bytes: int = MEMORY_BYTES) -> Level:
    """The strongest level that works here, each tried with a real run; warns about the weak ones.

    Args:
        unsafe: take UNSAFE where no level works.
        memory_bytes: the limit to try with.
    Raises: InputError: none works, and `unsafe` is not set; says what to install or enable.
    """
    problems = []
    for level in LOCKED:
        problem = why_not(level, memory_bytes)
        if problem is None:
            _warn(level)
            return level
        problems.append(f"{level.value}: {problem}")
    if unsafe:
        _warn(Level.UNSAFE)
        return Level.UNSAFE
    raise InputError(
        f"sandbox: expected a way to lock programs up, got none ({'; '.join(problems)}). {HOW_TO} "
        f"{setting('unsafe_code_execution')} runs what a model wrote without a lock."
    )


def why_not(level: Level, memory_bytes: int = MEMORY_BYTES) -> str | None:
    """Why a level cannot be used here, found by a harmless trial; None if it can, and always for UNSAFE."""
    if level is Level.UNSAFE:
        return None
    if sys.platform != "linux":
        return "needs Linux"
    if not seccomp.supported():
        return f"no table of system calls for {MACHINE}"
    if level is Level.BUBBLEWRAP and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if level is not Level.BUBBLEWRAP and landlock.abi() == 0:
        return "the kernel has no Landlock"
    scratch = _make_scratch()
    try:
        return trial.problem(lambda: start_jail(level, scratch, memory_bytes), memory_bytes)
    finally:
        remove_tree(scratch)


class Sandbox:
    """Runs programs in parallel, each locked up by itself; a context manager.

    Attributes:
        level: how programs are held; belongs in the results.
        workers: how many run at once.
        idle: the jails that wait for a program; None where one is not started yet.
    """

    def __init__(
        self,
        level: Level | None = None,
        *,
        workers: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        unsafe: bool = False,
    ):
        """Prove a level with a trial run.

        Args:
            level: exactly this one; by default the strongest that works.
            workers: by default one for each core this process may use.
            memory_bytes: address space of a program.
            unsafe: allow UNSAFE, where no level works or it is asked for by name.
        Raises: InputError: the level, or every level, does not work here, or UNSAFE was not allowed.
        """
        if level is None:
            level = probe(unsafe=unsafe, memory_bytes=memory_bytes)
        else:
            problem = why_not(level, memory_bytes)
            if level is Level.UNSAFE and not unsafe:
                problem = f"runs programs without a lock, which {setting('unsafe_code_execution')} has to allow"
            if problem is not None:
                raise InputError(f"sandbox: expected level {level.value} to work here, got: {problem}. {HOW_TO}")
            _warn(level)
        self.level = level
        self.workers = workers or available_cores()
        self._memory_bytes = memory_bytes
        self._scratch = _make_scratch()
        self._clean_up = weakref.finalize(self, remove_tree, self._scratch)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        # A jail is started by the pool's threads when first used: it dies with the thread that started it.
        self.idle: queue.LifoQueue[Jail | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self.idle.put(None)

    def run(self, programs: Sequence[Program], progress: Progress | None = None) -> list[Verdict]:
        """Run programs, as many at once as there are workers; those that ran out of time once more, each alone.

        The second time the limit is one of processor time, and the clock allows PATIENCE times as much: a machine that
        is busy with something else fails no program. (One that sleeps or waits thereby gets longer than its limit.) Nor does
        a slow machine: the item's own solution is timed then, see `Program.reference`.

        Args:
            programs: in any number.
            progress: called with (programs done, all programs) after each, in the caller's thread.
        Returns: one verdict for each program, in their order.
        """
        futures = {self._pool.submit(self._judge, program): index for index, program in enumerate(programs)}
        verdicts: dict[int, Verdict] = {}
        try:
            for future in as_completed(futures):
                verdicts[futures[future]] = future.result()
                if progress is not None:
                    progress(len(verdicts), len(programs))
        finally:
            for future in futures:
                future.cancel()
        for index in sorted(verdicts):
            if verdicts[index].status == "timeout":
                verdicts[index] = self._pool.submit(self._judge_patiently, programs[index]).result()
        return [verdicts[index] for index in range(len(programs))]

    def close(self) -> None:
        """End all jails; nothing of them stays."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while not self.idle.empty():
            jail = self.idle.get()
            if jail is not None:
                jail.close()
        self._clean_up()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge_patiently(self, program: Program) -> Verdict:
        """The verdict on a program that ran out of time, with as much of it as the machine needs."""
        if program.reference is not None:
            own = self._judge(replace(program, source=program.reference, timeout_s=REFERENCE_S), PATIENCE)
            if own.status == "passed":
                program = replace(program, timeout_s=max(program.timeout_s, REFERENCE_ROOM * own.seconds))
        return self._judge(program, PATIENCE)

    def _judge(self, program: Program, patience: float = 1.0) -> Verdict:
        """The verdict on one program; where a jail breaks, a new one gets a second try."""
        jail = self.idle.get()
        try:
            for _ in range(2):
                try:
                    jail = jail or start_jail(self.level, self._scratch, self._memory_bytes)
                    return judge(jail, program, patience)
                except JailError as error:
                    problem = str(error)
                    if jail is not None:
                        jail.close()
                    jail = None
            return Verdict("error", problem, 0.0)
        finally:
            self.idle.put(jail)


def judge(jail: Jail, program: Program, patience: float = 1.0) -> Verdict:
    """Run a program against its test and, in random order, against tests that cannot pass, until one run decides.

    No run differs for the program from another: it has to hold in each, and may pass where it can only.

    Args:
        patience: as Jail.attempt has it, for every run.
    Raises: JailError: the jail failed.
    """
    draws = [False] + [True] * IMPOSSIBLE_DRAWS
    secrets.SystemRandom().shuffle(draws)
    seconds = 0.0
    for impossible in draws:
        outcome = jail.attempt(
            program.source,
            program.test,
            program.timeout_s,
            names=program.names,
            impossible=impossible,
            patience=patience,
        )
        seconds = seconds or outcome.seconds
        if outcome.timed_out:
            return Verdict("timeout", outcome.detail, outcome.seconds)
        if impossible and outcome.passed:
            return Verdict("forged", "passed a test that cannot pass", outcome.seconds)
        if not (outcome.held if impossible else outcome.passed):
            return Verdict("failed", outcome.detail, outcome.seconds)
    return Verdict("passed", "", seconds)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_jail(level: Level, scratch: str, memory_bytes: int) -> Jail:
    """A new jail of a level. Raises: JailError: it does not start."""
    if level is Level.BUBBLEWRAP:
        layers = LAYERS if landlock.abi() else tuple(layer for layer in LAYERS if layer != LANDLOCK)
        room, settings = view.bubblewrap(shutil.which("bwrap") or "bwrap", layers, memory_bytes)
        return Jail(view.python(), settings, room)
    if level is Level.USERNS_LANDLOCK:
        return Jail(view.python(), view.own_room(scratch, LAYERS, memory_bytes))
    layers = (LANDLOCK, SECCOMP, LIMITS) if level is Level.LANDLOCK else (LIMITS,)
    return Jail(view.python(), view.no_room(scratch, layers, memory_bytes))


def _make_scratch() -> str:
    """A temporary folder that other users can enter, but not list or write."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(folder, 0o711)
    return folder


def _warn(level: Level) -> None:
    if level in WARNINGS:
        warnings.warn(WARNINGS[level], stacklevel=3)
