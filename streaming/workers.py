"""Threads that share the blocks of the tensors at work, and the buffers each of them reuses."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from checkpoints.process import keep_freed_memory
from streaming.twins import use_compiled

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cancelled(Exception):
    """Raised in the other threads once one has failed, so that all of them end."""


def _prepare_thread(compiled: bool) -> None:
    torch.get_num_threads()  # takes the process's number as this thread's own, which later changes of that leave alone
    torch.set_num_threads(1)
    use_compiled(compiled)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of threads for blocks. torch lets go of the interpreter while it computes, so threads scale, in one memory.

    Args:
        count: number of threads; None for one per core that this process may use.
        compiled: whether they may use compiled loops (`streaming.twins`).
    """

    def __init__(self, count: int | None = None, *, compiled: bool = False):
        self.count = count or available_cores()
        self._threads = torch.get_num_threads()
        keep_freed_memory()
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(
            self.count, thread_name_prefix="block", initializer=_prepare_thread, initargs=(compiled,)
        )
        self._tensors = ThreadPoolExecutor(self.count + 1, thread_name_prefix="tensor")

    def map_ordered(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`work` of each item, several at a time, in the order of the items; few results wait at any time."""
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(self._checked, work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _checked(self, work: Callable[[Item], Result], item: Item) -> Result:
        if self._cancelled.is_set():
            raise Cancelled
        return work(item)

    def run_tensors(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Run `work` for each item, a few at once, so that the end of one tensor overlaps the start of the next.

        `work` may wait for `map_ordered`: it runs in threads of its own. The first failure ends all and is raised.
        """
        todo = iter(items)
        lock = threading.Lock()

        def drain() -> None:
            try:
                while not self._cancelled.is_set():
                    with lock:
                        item = next(todo, None)
                    if item is None:
                        return
                    work(item)
            except BaseException:
                self._cancelled.set()
                raise

        futures = [self._tensors.submit(drain) for _ in range(self.count + 1)]
        try:
            errors = [error for error in (future.exception() for future in futures) if error is not None]
        except BaseException:
            self._cancelled.set()
            raise
        for error in errors:
            if not isinstance(error, Cancelled):
                raise error

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._tensors.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # which the threads of the pool set for every new thread of the process
