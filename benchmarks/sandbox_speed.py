"""Sandboxed runs a second, for each level that works on this machine; a program that passes takes two runs.

    python benchmarks/sandbox_speed.py
    python benchmarks/sandbox_speed.py --programs 1000 --workers 2

Next to the rate by the clock stands the processor time of one run, over harness, jail and program, on a machine where
nothing else runs: it is read from the time that all processors were not idle.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.sandbox import LOCKED, Program, Sandbox, available_cores, why_not

PASSES = Program("def f(x): return x + 1", "assert f(1) == 2")
FAILS = Program("def f(x): return x + 1", "assert f(1) == 3")


def busy_s() -> float:
    """Seconds that the machine's processors have worked, for whatever program."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(sandbox: Sandbox, program: Program, count: int) -> str:
    """Run a program `count` times: runs a second, and milliseconds of processor time a run."""
    runs = count * (2 if program is PASSES else 1)
    sandbox.run([program] * 4 * sandbox.workers)
    busy, started = busy_s(), time.monotonic()
    verdicts = sandbox.run([program] * count)
    seconds = time.monotonic() - started
    assert {verdict.status for verdict in verdicts} == {"passed" if program is PASSES else "failed"}
    return f"{runs / seconds:5.0f} runs/s | {1000 * (busy_s() - busy) / runs:4.1f} ms"


def main() -> None:
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
        print(f"| {level.value} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
