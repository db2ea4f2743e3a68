"""Do what a comparison needs in several processes: training, merging and scoring, each kept in the workspace by whoever did it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from tqdm import tqdm

Job = tuple[Callable[..., object], tuple[Any, ...]]
"""A function that can be pickled, and its arguments."""


class Pool:
    """Processes that do jobs, or this one alone.

    Args:
        processes: how many; 1 starts none.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None

    @property
    def workers(self) -> int:
        """Threads that each process may use."""
        return max(1, (os.cpu_count() or 1) // self._processes)

    @contextmanager
    def running(self) -> Iterator[Pool]:
        """With its processes started."""
        if self._processes == 1:
            yield self
            return
        with ProcessPoolExecutor(
            self._processes, get_context("spawn"), initializer=_begin, initargs=(self.workers,)
        ) as self._executor:
            yield self

    def do(self, jobs: Sequence[Job], label: str) -> None:
        """Do all jobs. One that fails stops none of the others.

        Raises: what the first that failed raised, when all are done.
        """
        failed: list[BaseException] = []
        with tqdm(total=len(jobs), desc=label, unit="job", dynamic_ncols=True) as bar:
            for outcome in self._outcomes(jobs):
                try:
                    outcome()
                except Exception as error:
                    failed.append(error)
                bar.update()
        if failed:
            raise failed[0]

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[Callable[[], object]]:
        if self._executor is None:
            for function, arguments in jobs:
                yield lambda function=function, arguments=arguments: function(*arguments)  # type: ignore[misc]
            return
        futures = [self._executor.submit(function, *arguments) for function, arguments in jobs]
        for future in as_completed(futures):
            yield future.result


def _begin(threads: int) -> None:
    """Set up a process: its share of the cores, no bars of libraries beside ours, and no life of its own."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it cannot tell, and jobs that nobody waits for would go on."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
