"""Predict time, memory and cost of a merge on any number of nodes from what one machine measured.

    python benchmarks/processes.py --models MODELS --methods dare_ties,ties --json points.json
    python benchmarks/scale_model.py --points points.json --check
    python benchmarks/scale_model.py --points points.json --cores 32 --read_gb_s 2 --write_gb_s 1 --shared_gb_s 20 --price 3

A run is taken apart into what scales in its own way:

    seconds = start + max(processor seconds a byte * bytes / (nodes * cores), bytes read / read rate + bytes written / write rate)

Processor seconds a byte are those of the run in one thread, for each method; the disk's rates those of a node, together no more than the
shared file system gives. Reading counts where inputs are cold. Reading ahead and flushing go on while blocks are merged, so that the slower
of the two sides counts. A tensor that is measured stays whole: no share is smaller than the largest one.
`--check` compares this with every other measured point, with the rates of this machine's disk measured now, and ends with exit code 1
where one is more than 20 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from merging.methods import get_method

PIECE_BYTES = 64 << 20
PROBE_BYTES = 1 << 30
TOLERANCE = 0.2
PROCESS_BYTES = 300_000_000
"""Resident memory of a process before it has a block; `streaming/estimate.py` has the same."""
BLOCK_BYTES = 12 * (1 << 19)
"""Of a thread for each input."""


@dataclass(frozen=True)
class Model:
    """What is merged.

    Attributes:
        parameters: of each model.
        largest: elements of its largest tensor, which some methods keep whole.
    """

    name: str
    parameters: int
    largest: int


MODELS = (
    Model("13B", 13_015_864_320, 5120 * 32000),
    Model("70B", 70_553_706_496, 8192 * 128256),
    Model("405B", 405_853_388_800, 16384 * 128256),
    Model("1T MoE", 1_026_408_232_448, 384 * 7168 * 2048),
)
NODES = (1, 2, 4, 8, 16, 32, 64)
BYTES = 2
"""Of an element, in bfloat16."""


@dataclass(frozen=True)
class Cost:
    """What a method was measured to take.

    Attributes:
        seconds_per_byte: of one thread, for each byte read and written.
        start_s: before the first byte.
        measures: whether it reads every tensor whole before it merges it.
    """

    seconds_per_byte: float
    start_s: float
    measures: bool


@dataclass(frozen=True)
class Rates:
    """Bytes a second: of a node's disk or its way to the shared one, and of that for all nodes together."""

    read: float
    write: float
    shared: float = float("inf")


def predict(
    cost: Cost, rates: Rates, read: float, written: float, processes: int, threads: int, largest: float = 0.0
) -> float:
    """Seconds of a run.

    Args:
        read, written: bytes; `read` of inputs that are cold counts in `rates`.
        processes, threads: of each process.
        largest: share of the work that cannot be cut.
    """
    share = max(1 / processes, largest)
    compute = cost.seconds_per_byte * (read + written) * share / threads
    reading = read / min(processes * rates.read, rates.shared)
    writing = written / min(processes * rates.write, rates.shared)
    return cost.start_s + max(compute, reading + writing)


def costs_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Cost]:
    """What each method took in one process of one thread."""
    costs = {}
    for point in points:
        if (point["processes"], point["threads"]) == (1, 1):
            moved = point["bytes_read"] + point["bytes_written"]
            start = point["seconds"] - point["stream_s"]
            measures = measures_of(point["method"])
            costs[point["method"]] = Cost((point["cpu_s"] - start) / moved, start, measures)
    return costs


def measures_of(method: str) -> bool:
    """Whether a method, with its default parameters, reads a tensor whole before it merges it."""
    from merging.recipe_flags import make_recipe

    models = ["a", "b"][: get_method(method).max_models or 2]
    data = "a.txt,b.txt" if get_method(method).needs_data else None
    recipe = make_recipe(method, "base", ",".join(models), model_data=data)
    return bool(recipe.method("x.weight").measures)


def measure_write_rate(folder: Path) -> float:
    """Bytes a second that a disk takes for good, by writing 1 GiB that is removed."""
    piece = os.urandom(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.monotonic()
        for _ in range(PROBE_BYTES // PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.monotonic() - started)


def check(points: Sequence[Mapping[str, Any]], costs: Mapping[str, Cost], write: float) -> bool:
    """Compare predictions with what was measured, whose inputs were in memory; print a row for each. Returns: whether all fit."""
    print("| method | processes | threads | predicted, s | measured, s | off |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    fits = True
    for point in points:
        cost = costs[point["method"]]
        # One disk, whatever the number of processes.
        rates = Rates(float("inf"), write / point["processes"])
        here = Cost(cost.seconds_per_byte, 0.0, cost.measures)
        predicted = predict(
            here, rates, point["bytes_read"], point["bytes_written"], point["processes"], point["threads"]
        )
        off = predicted / point["stream_s"] - 1
        fits &= abs(off) <= TOLERANCE
        print(
            f"| {point['method']} | {point['processes']} | {point['threads']} | {predicted:.1f} | {point['stream_s']:.1f} | {off:+.0%} |"
        )
    return fits


def main() -> int:
    """Check, or print a table of predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, required=True, help="what benchmarks/processes.py --json wrote")
    parser.add_argument("--check", action="store_true", help="compare with the measured points")
    parser.add_argument("--disk", type=Path, default=Path("/tmp"), help="folder whose disk --check measures")
    parser.add_argument("--models", type=int, default=3, help="fine-tuned models, beside the base")
    parser.add_argument("--cores", type=int, default=32, help="of a node; one process each")
    parser.add_argument("--read_gb_s", type=float, default=2.0, help="of a node")
    parser.add_argument("--write_gb_s", type=float, default=1.0, help="of a node")
    parser.add_argument("--shared_gb_s", type=float, default=20.0, help="of the shared file system, all nodes together")
    parser.add_argument("--price", type=float, default=3.0, help="of a node for an hour")
    arguments = parser.parse_args()
    points = json.loads(arguments.points.read_text())
    costs = costs_of(points)
    if arguments.check:
        write = measure_write_rate(arguments.disk)
        print(f"The disk takes {write / 1e9:.2f} GB/s.\n")
        return 0 if check(points, costs, write) else 1
    rates = Rates(arguments.read_gb_s * 1e9, arguments.write_gb_s * 1e9, arguments.shared_gb_s * 1e9)
    memory = PROCESS_BYTES + arguments.cores * (1 + arguments.models) * BLOCK_BYTES
    print(
        f"{arguments.models} models and their base in bfloat16; a process of {arguments.cores} threads a node, {memory / 1e9:.1f} GB each.\n"
    )
    print(f"| method | model | {' | '.join(f'{nodes} nodes' for nodes in NODES)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in NODES)} |")
    for method, cost in costs.items():
        for model in MODELS:
            read, written = model.parameters * BYTES * (1 + arguments.models), model.parameters * BYTES
            largest = model.largest / model.parameters if cost.measures else 0.0
            cells = []
            for nodes in NODES:
                seconds = predict(cost, rates, read, written, nodes, arguments.cores, largest)
                cells.append(f"{seconds:,.0f} s, {nodes * seconds / 3600 * arguments.price:.2f}")
            print(f"| {method} | {model.name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
