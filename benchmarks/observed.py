"""Run one of the commands and look at it from inside: when it reads its first weight, where its threads spend their time, or
how much memory of a GPU it takes.

    python benchmarks/observed.py first_byte 0 merge.py --method linear ...
    python benchmarks/observed.py profile 0 merge.py --method ties ...
    python benchmarks/observed.py gpu_memory 0 merge.py --method ties --device cuda ...

The second argument is the moment on the monotonic clock from which seconds count: the caller's, from before this process
was started. Prints JSON as its last line. The command is stopped at its first weight where that is all that is asked; it
cleans up behind itself.
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_EVERY_S = 0.002
IDLE = "waiting"


def watch_first_read(origin: float) -> Callable[[], dict[str, float]]:
    """Note when the first bytes of a weight are asked for, by Python or by a compiled loop, and fail that read. Returns what gives `{"seconds"}`."""
    sys.path.insert(0, str(ROOT))
    from streaming import machine_code
    from streaming.trace import NOT_READ

    moments: list[float] = []
    get = machine_code.Compiler.get

    def preadv(*_: Any) -> int:
        moments.append(time.monotonic())
        raise OSError(errno.ECANCELED, "the benchmark has seen what it came for")

    def loop(*_: Any) -> int:
        moments.append(time.monotonic())
        return NOT_READ  # after which torch reads, and fails

    def get_watched(self: machine_code.Compiler, *arguments: Any) -> machine_code.Loop | None:
        return loop if get(self, *arguments) else None

    os.preadv = preadv
    machine_code.Compiler.get = get_watched  # type: ignore[method-assign]
    return lambda: {"seconds": min(moments) - origin}


def watch_threads() -> Callable[[], dict[str, Any]]:
    """Look every 2 ms at what the threads that share the blocks are doing. Returns what gives the share of each function.

    A thread counts where the innermost frame of our own is: a call into torch or the system counts for the function
    that makes it. Threads without work are `waiting`.
    """
    found: Counter[str] = Counter()
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            blocks = {thread.ident for thread in threading.enumerate() if thread.name.startswith("block")}
            found.update(place_of(frame) for ident, frame in sys._current_frames().items() if ident in blocks)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()

    def result() -> dict[str, Any]:
        ended.set()
        thread.join()
        total = sum(found.values())
        return {"samples": total, "shares": {place: count / total for place, count in found.most_common()}}

    return result


def watch_gpu_memory() -> Callable[[], dict[str, float]]:
    """Returns what gives the most that torch had on the first GPU: `{"gpu_peak_bytes"}`, 0 where it never used one."""

    def result() -> dict[str, float]:
        torch = sys.modules.get("torch")
        used = torch is not None and torch.cuda.is_initialized()
        return {"gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch is not None and used else 0}

    return result


def place_of(frame: FrameType | None) -> str:
    """The innermost function of this repository that a frame is in: `merging/methods/trim.py keep_above_`."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return IDLE


def main() -> None:
    """Watch, run the command, print JSON."""
    what, origin, command = sys.argv[1], float(sys.argv[2]), ROOT / sys.argv[3]
    watches = {"first_byte": lambda: watch_first_read(origin), "profile": watch_threads, "gpu_memory": watch_gpu_memory}
    result: Callable[[], dict[str, Any]] = watches[what]()
    sys.argv = [str(command), *sys.argv[4:]]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(str(command), run_name="__main__")
    finally:
        print(json.dumps(result()), flush=True)


if __name__ == "__main__":
    main()
