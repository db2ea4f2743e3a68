"""What changes the whole process: one place for all of it, and off unless a command says that the process is its own.

A call from a notebook or a server changes nothing that outlasts it or that other threads can see; a command, which nobody
shares its process with, starts faster, keeps the memory of freed blocks, bounds what a stranger's config can allocate, and ends
as a user expects.

    with own_process():     # commands/shell.py, nobody else
        merge(recipe, "out")
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from checkpoints.early import SIGNALS
from checkpoints.errors import InputError

SWITCH_S = 0.0002
"""Seconds between turns of Python's threads while something is compiled."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 16 << 20
LARGE_BYTES = 1 << 20
LARGEST_BYTES = 8 << 20
"""Wider models compute so much with each number that a page fault for a thousand of them is no part of it."""
HEADER_BYTES = 4096
"""More than a block has beside its contents, and for its alignment."""
FREE_AT_THE_END = 8
"""Blocks of the largest kept size that may be free at the heap's end before they are handed back."""
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Threads that have nothing to do sleep. By default they spin, and where other programs want the same cores a forward pass of
two threads, which wait for each other thousands of times, becomes slower than that of one."""
GUESSES = "transformers.generation.candidate_generator"

_owners = 0


@dataclass(frozen=True)
class Launch:
    """Which of several processes this is that were started together, as torchrun and its like say it in the environment.

    Attributes:
        rank, size: from 0 on, of how many.
        local_rank, local_size: the same of those on this machine.
        address, port: where the first, or who started it, is to be met.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """How this process was started together with others; None where it is alone. Raises InputError: half of it is said, or nonsense."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    # Who starts one process on each machine may leave the two of the machine out.
    given = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **environment}
    for name in (*names, "MASTER_ADDR"):
        value = given.get(name, "")
        if not (value if name == "MASTER_ADDR" else re.fullmatch(r"\d{1,6}", value)):
            raise InputError(
                f"{name}: expected what torchrun sets beside WORLD_SIZE={environment['WORLD_SIZE']}, got {value!r}. Start the processes with torchrun or "
                "accelerate launch, set all of MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK, or none of them."
            )
    rank, size, local_rank, local_size, port = (int(given[name]) for name in names)
    if not 0 <= rank < size:
        raise InputError(
            f"RANK: expected a number below WORLD_SIZE={size}, got {rank}. Start the processes with torchrun."
        )
    return Launch(rank, size, local_rank, max(1, local_size), given["MASTER_ADDR"], port)


@contextmanager
def own_process() -> Iterator[None]:
    """Switch everything here on for the length of the block; a polite kill and a closed terminal end it as Ctrl-C does."""
    global _owners
    _owners += 1
    if "torch" not in sys.modules:  # it reads them once
        wait_passively(os.environ)
    try:
        with _kills_as_interrupts():
            yield
    finally:
        _owners -= 1


def is_ours() -> bool:
    """Whether a command runs, and nobody shares the process with it."""
    return _owners > 0


@contextmanager
def _kills_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, so that a run cleans up; `nohup` stays in force."""

    asked: list[int] = []

    def interrupt(number: int, frame: Any) -> NoReturn:
        asked.append(number)
        raise KeyboardInterrupt

    # Python lets the main thread alone set handlers; in another one, kills are the caller's affair.
    ours = threading.current_thread() is threading.main_thread()
    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in caught if ours}
    try:
        yield
    except Exception as error:
        if asked and not isinstance(error, InputError):  # such as what an import that was broken off raises
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Make OpenMP's threads sleep while they wait, unless the user has said how they wait."""
    if not WAITING.keys() & environment.keys():
        environment.update(WAITING)


def end(code: int) -> NoReturn:
    """End the process. Without a last search for garbage in all that the libraries made, which takes the interpreter half a
    second after torch, and more than one after transformers."""
    gc.freeze()
    sys.exit(code)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed blocks: handing it back costs a page fault for each page of the next one."""
    _set_malloc(KEPT_BYTES, KEPT_BYTES)


def give_back_freed_memory(above: int) -> None:
    """Make glibc hand blocks of more bytes than this back as soon as they are freed, and keep smaller ones. Left to itself it keeps
    blocks of up to 32 MB, among which there is no room for the next large one: a layer's weights and activations took half as much
    again as they are.

    Args:
        above: at least what is allocated and freed all the time: a page fault for each page of it takes longer than arithmetic on it.
    """
    size = min(max(above + HEADER_BYTES, LARGE_BYTES), LARGEST_BYTES)
    _set_malloc(size, FREE_AT_THE_END * size)


def _set_malloc(mapped_from: int, kept: int) -> None:
    """Have blocks from a size on mapped one by one, and as much free memory kept at the heap's end."""
    if not is_ours():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, which has its own ways
        return
    mallopt(M_MMAP_THRESHOLD, mapped_from)
    mallopt(M_TRIM_THRESHOLD, kept)


@contextmanager
def short_turns() -> Iterator[None]:
    """Shorten the turns of Python's threads: importing numba is half a second of Python, in which every other thread would wait 5 ms
    for each of its turns."""
    if not is_ours():
        yield
        return
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def without(module: str) -> Iterator[None]:
    """Hide a module that is not imported yet from imports inside the block: a library that can do without it starts in less
    time. Everybody may import it afterwards."""
    if not is_ours() or module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # to Python: there is none
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def quick_start() -> Iterator[None]:
    """Import transformers in two thirds of the time that it takes by itself, which is most of a command's start.

    Without scikit-learn: transformers asks whether it is installed, and uses it only to tune how assisted generation
    guesses, which then goes untuned in this process. Without garbage collection, which would look again and again through
    what stays.
    """
    if not is_ours():
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        if GUESSES not in sys.modules:
            with without("sklearn"):
                importlib.import_module(GUESSES)
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Let no more than this be allocated on top of what is in use, on Linux. Raises MemoryError from inside the block."""
    if not is_ours():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError, IndexError):  # only Linux says how much is in use
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = [limit for limit in (in_use + more_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
