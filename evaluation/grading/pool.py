"""Worker processes for graders that may hang or run out of memory: an item that overruns costs its worker, not the run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

START_S = 120.0
"""What a worker may take to import its function, on a machine that is busy."""
ITEMS_PER_START = 16
"""Fewer items than this are not worth another process, which takes a second to start."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of one item: `done` with its result, or why not."""

    status: Literal["done", "timeout", "error"]
    result: Any = None
    detail: str = ""


class WorkerPool:
    """Processes that all run one function, an item at a time. Use it as a context manager.

    Args:
        target: `module:function`; arguments and result are JSON values.
        workers: number of processes, started as they are needed.
        timeout_s: how long one item may take, in seconds; its worker is killed then and replaced. Should nobody be left to
            do that, it ends by itself: with the thread that started it, or when the item has used that much processor time.
        environment: variables for the workers besides our own.
    """

    def __init__(self, target: str, *, workers: int, timeout_s: float, environment: dict[str, str] | None = None):
        self.target = target
        self.timeout_s = timeout_s
        self._size = max(1, workers)
        self._environment = environment or {}
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def map(
        self, items: Sequence[Sequence[Any]], advance: Callable[[int], object] = lambda count: None
    ) -> list[Outcome]:
        """Run the function on every item.

        Args:
            items: argument lists.
            advance: called with 1 for each item done.

        Returns: outcomes, aligned with `items`.
        """
        outcomes: list[Outcome | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        enough = min(self._size, -(-len(items) // ITEMS_PER_START))
        self._workers += [self._start() for _ in range(enough - len(self._workers))]
        with selectors.DefaultSelector() as selector:
            idle = list(self._workers)
            busy: set[_Worker] = set()
            while waiting or busy:
                while idle and waiting:
                    worker = idle.pop()
                    worker.give(waiting.popleft(), items)
                    selector.register(worker.answers, selectors.EVENT_READ, worker)
                    busy.add(worker)
                first = min(worker.deadline(self.timeout_s) for worker in busy)
                ready = selector.select(max(0.0, first - time.monotonic()) + 0.01)
                finished: dict[_Worker, Outcome | None] = {key.data: key.data.take() for key, _ in ready}
                for worker in busy.difference(finished):
                    if time.monotonic() > worker.deadline(self.timeout_s):
                        finished[worker] = Outcome("timeout", detail=f"over {self.timeout_s:g} s")
                for worker, outcome in finished.items():
                    if outcome is None:
                        continue
                    selector.unregister(worker.answers)
                    busy.discard(worker)
                    outcomes[worker.index] = outcome
                    idle.append(self._replace(worker) if worker.dead or outcome.status == "timeout" else worker)
                    advance(1)
        return [outcome for outcome in outcomes if outcome is not None]

    def _start(self) -> _Worker:
        return _Worker(self.target, self.timeout_s, self._environment)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.stop()
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        return fresh


class _Worker:
    """One process and the item it works on."""

    def __init__(self, target: str, timeout_s: float, environment: dict[str, str]):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.grading.worker", target, str(timeout_s), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self.answers: IO[bytes] = self._process.stdout
        self.index = -1
        self.dead = False
        self._ready = False
        self._read = b""
        self._clock = time.monotonic()

    def deadline(self, timeout_s: float) -> float:
        """When it should have answered; until it has imported its function, a generous moment."""
        return self._clock + (timeout_s if self._ready else START_S)

    def give(self, index: int, items: Sequence[Sequence[Any]]) -> None:
        """Send one item. That a worker is dead is noticed when its answer is read."""
        self.index, self._clock = index, time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(list(items[index])).encode() + b"\n")
            self._requests.flush()

    def take(self) -> Outcome | None:
        """Read what has come; None where the answer is not complete yet."""
        chunk = os.read(self.answers.fileno(), 1 << 16)
        if not chunk:
            self.dead = True
            return Outcome("error", detail="the grader's process died")
        *lines, self._read = (self._read + chunk).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "ready" in reply:
                self._ready, self._clock = True, time.monotonic()
            elif "error" in reply:
                return Outcome("error", detail=reply["error"])
            else:
                return Outcome("done", reply["result"])
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self.answers.close()
