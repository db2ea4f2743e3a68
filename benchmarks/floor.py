"""The floor under every merge: read all inputs once and write the output, and nothing else.

    python benchmarks/floor.py --read a.safetensors b.safetensors --write out.bin --size 2200000000

Plain `pread` and `pwrite` into buffers that are reused, reads and writes interleaved, one thread per core, files that are
in the page cache, and one fsync of each output at the end, as merge.py makes it. Prints JSON: bytes, and seconds from the
first byte to the last, `seconds` with the fsync and `unflushed_s` without, both without the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PIECE_BYTES = 1 << 18


def pieces(descriptor: int, size: int) -> list[tuple[int, int, int]]:
    """A file in pieces: (descriptor, offset, bytes)."""
    return [(descriptor, offset, min(PIECE_BYTES, size - offset)) for offset in range(0, size, PIECE_BYTES)]


def move(read: Sequence[Path], write: Sequence[Path], size: int, threads: int) -> dict[str, float]:
    """Read files whole and write others of `size` bytes each; see the module."""
    inputs = [os.open(path, os.O_RDONLY) for path in read]
    outputs = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in write]
    try:
        for descriptor in outputs:
            os.ftruncate(descriptor, size)
        reads = [piece for one in inputs for piece in pieces(one, os.fstat(one).st_size)]
        writes = [piece for one in outputs for piece in pieces(one, size)]
        steps = [(index / len(reads), os.preadv, piece) for index, piece in enumerate(reads)]
        steps += [(index / len(writes), os.pwritev, piece) for index, piece in enumerate(writes)]
        steps.sort(key=lambda step: step[0])
        started = time.perf_counter()
        workers = [threading.Thread(target=_work, args=(steps[number::threads],)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        unflushed = time.perf_counter() - started
        for descriptor in outputs:
            os.fsync(descriptor)
        seconds = time.perf_counter() - started
    finally:
        for descriptor in (*inputs, *outputs):
            os.close(descriptor)
    moved = {"bytes_read": sum(piece[2] for piece in reads), "bytes_written": sum(piece[2] for piece in writes)}
    return {**moved, "seconds": seconds, "unflushed_s": unflushed}


def _work(steps: Sequence[tuple[float, object, tuple[int, int, int]]]) -> None:
    """Do some of the steps with one buffer."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    for _, call, (descriptor, offset, count) in steps:
        done = 0
        while done < count:
            done += call(descriptor, [buffer[done:count]], offset + done)  # type: ignore[operator]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> None:
    """Move the bytes, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, nargs="+", required=True, metavar="FILE", help="files to read whole")
    parser.add_argument("--write", type=Path, nargs="+", required=True, metavar="FILE", help="files to write")
    parser.add_argument("--size", type=int, required=True, metavar="BYTES", help="of each file that is written")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: one per core")
    arguments = parser.parse_args(argv)
    print(json.dumps(move(arguments.read, arguments.write, arguments.size, arguments.threads)))


if __name__ == "__main__":
    main()
