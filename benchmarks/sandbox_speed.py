"""Sandboxed runs a second, for each level that works on this machine; a program that passes takes three runs.

    python benchmarks/sandbox_speed.py
    python benchmarks/sandbox_speed.py --programs 1000 --workers 2

Next to the rate by the clock stands the processor time of one run, harness, jail and program together: on a machine
that is busy with something else, two cores divided by it are nearer to what they can do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.sandbox import IMPOSSIBLE_DRAWS, LOCKED, Program, Sandbox, available_cores, why_not

PASSES = Program("def f(x): return x + 1", "assert f(1) == 2")
FAILS = Program("def f(x): return x + 1", "assert f(1) == 3")


def processor_s(process: int) -> float:
    """Processor time of a process, of all that it has waited for, and of its living children and theirs."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # one that has just ended
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                used[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    todo, total = [process], 0.0
    while todo:
        total += used.get(todo[-1], 0.0)
        todo += children.get(todo.pop(), [])
    return total


def measure(sandbox: Sandbox, program: Program, count: int) -> tuple[float, float]:
    """Run a program `count` times: (runs a second by the clock, seconds of processor time a run, the harness's too)."""
    runs = count * (1 + IMPOSSIBLE_DRAWS if program is PASSES else 1)
    sandbox.run([program] * 4 * sandbox.workers)
    used_s, started = processor_s(os.getpid()), time.monotonic()
    verdicts = sandbox.run([program] * count)
    clock_s = time.monotonic() - started
    assert {verdict.status for verdict in verdicts} == {"passed" if program is PASSES else "failed"}
    return runs / clock_s, (processor_s(os.getpid()) - used_s) / runs


def main() -> None:
    """Measure each level and print a row of the table for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=500, help="how many programs a measurement runs")
    parser.add_argument("--workers", type=int, default=available_cores(), help="how many run at once")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, Linux {platform.release()}, {available_cores()} cores, load {load:.1f} at the start")
    print("| level | passes | processor time | fails | processor time |\n|---|---|---|---|---|")
    for level in LOCKED:
        problem = why_not(level)
        if problem is not None:
            print(f"| {level.value} | not here: {problem} |")
            continue
        with Sandbox(level, workers=arguments.workers) as sandbox:
            cells = [measure(sandbox, program, arguments.programs) for program in (PASSES, FAILS)]
        text = " | ".join(f"{rate:.0f} runs/s | {1000 * used_s:.1f} ms" for rate, used_s in cells)
        print(f"| {level.value} | {text} |", flush=True)


if __name__ == "__main__":
    main()
