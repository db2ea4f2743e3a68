"""How much of a block's time a worker holds Python's lock, and how much faster two workers are than one.

    python benchmarks/lock_share.py --folder /tmp/merge_speed --methods task_arithmetic,ties
    python benchmarks/lock_share.py --folder /tmp/merge_speed --methods ties --workers 1,2,4 --scale 0.25

Merges the benchmark's random models (benchmarks/merge_speed.py makes them in the same folder) in this process. What a worker computes
outside of the calls that let go of the lock (compiled loops, reading, writing, checksums, digests) is time in which nobody else can run
Python: its processor time, over the time of the worker's blocks by the clock, is the share. Prints JSON, a line for each method and
number of workers: the share, blocks, the mean time of one, seconds of streaming, and how many times faster that is than the first number
of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic import Checkpoints, Shape, add_shape_flags, make_checkpoints, read_shape


class Clock:
    """Processor time of blocks, and of the calls inside them that let go of the lock, over all threads."""

    def __init__(self) -> None:
        self.blocks, self.wall_s, self.cpu_s, self.free_s = 0, 0.0, 0.0, 0.0
        self._lock = threading.Lock()
        self._thread = threading.local()

    def block(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A function that makes a block, timed."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._thread.free_s, self._thread.inside = 0.0, True
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return work(*arguments, **keywords)
            finally:
                wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
                self._thread.inside = False
                with self._lock:
                    self.blocks += 1
                    self.wall_s, self.cpu_s, self.free_s = (
                        self.wall_s + wall,
                        self.cpu_s + cpu,
                        self.free_s + self._thread.free_s,
                    )

        return timed

    def free(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that lets go of the lock, timed where it is called inside of a block."""

        def timed(*arguments: Any) -> Any:
            if not getattr(self._thread, "inside", False):
                return call(*arguments)
            started = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self._thread.free_s += time.thread_time() - started

        return timed

    @property
    def share(self) -> float:
        """Time with the lock over time of blocks."""
        return max(self.cpu_s - self.free_s, 0.0) / self.wall_s if self.wall_s else 0.0


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time what the stream's workers do."""
    import xxhash

    from streaming import machine_code, stream
    from streaming.workers import Workers

    right = machine_code.Compiler.get

    def get(self: machine_code.Compiler, *arguments: Any) -> Any:
        loop = right(self, *arguments)
        return clock.free(loop) if loop else None

    checked = Workers._checked

    def timed(self: Workers, work: Callable[..., Any], item: Any) -> Any:
        return checked(self, clock.block(work), item)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(machine_code.Compiler, "get", get))
        stack.enter_context(mock.patch.object(Workers, "_checked", timed))
        for module, name in ((os, "pwrite"), (os, "preadv"), (xxhash, "xxh3_64_intdigest")):
            stack.enter_context(mock.patch.object(module, name, clock.free(getattr(module, name))))
        for name in ("load", "round_to"):
            stack.enter_context(mock.patch.object(stream, name, clock.free(getattr(stream, name))))
        yield


def measure(made: Checkpoints, method: str, workers: int, out: Path, *, is_watched: bool) -> tuple[Clock, float]:
    """Merge once: what the clock says, and seconds of streaming."""
    from merging.merge_work import merge
    from merging.recipe_flags import make_recipe
    from streaming.output import RunOptions
    from streaming.stream import StreamOptions

    clock = Clock()
    if out.exists():
        shutil.rmtree(out)
    recipe = make_recipe(method, str(made.base), ",".join(map(str, made.fine_tunes)))
    options = RunOptions(stream=StreamOptions(workers=workers, compiled=True), digest="none", report="none", quiet=True)
    try:
        with ExitStack() as stack:
            if is_watched:
                stack.enter_context(watched(clock))
            result = merge(recipe, out, options)
        return clock, result.written.seconds
    finally:
        shutil.rmtree(out, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of benchmarks/merge_speed.py, or an empty one")
    parser.add_argument("--methods", default="task_arithmetic,ties", help="separated by commas")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas (1,2)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the quickest counts (3)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the model's parameters (1)")
    add_shape_flags(parser)
    arguments = parser.parse_args(argv)
    shape = read_shape(arguments, Shape()).scaled(arguments.scale)
    made = make_checkpoints(arguments.folder / "models", shape, 3, say=lambda text: print(text, file=sys.stderr))
    for method in arguments.methods.split(","):
        counts = list(map(int, arguments.workers.split(",")))
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(arguments.repeats):
            for count in counts:
                _, streaming = measure(made, method, count, arguments.folder / "lock", is_watched=False)
                seconds[count].append(streaming)
        for count in counts:
            clock, _ = measure(made, method, count, arguments.folder / "lock", is_watched=True)
            row = {
                "method": method, "workers": count, "share": round(clock.share, 4), "blocks": clock.blocks,
                "block_ms": round(1000 * clock.wall_s / max(clock.blocks, 1), 3), "seconds": round(min(seconds[count]), 3),
                "faster": round(min(seconds[counts[0]]) / min(seconds[count]), 3),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
