"""The AIM paper's experiment in miniature: `make demo`. About six minutes on two cores; interrupted, it goes on where it was.

    PYTHONPATH=. python examples/demo.py
    PYTHONPATH=. python examples/demo.py --folder /tmp/demo --fresh

On the tiny family: five methods, each merging four combinations of three fine-tunes, without and with AIM (omega 0.4); these
40 merges and the four single models are evaluated on six mini benchmarks. Prints the paper's table and draws its figures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.miniature import PAPER, Workspace, evaluate_all, guarded
from reports import compare, draw, load_results

SPLIT = "test_0"
ITEMS = 64


def run(folder: Path) -> None:
    """Merge and evaluate what is missing, then print the table and draw the figures."""
    started = time.monotonic()
    workspace = Workspace(folder, SPLIT, ITEMS)
    done = sum(map(workspace.is_done, PAPER))
    earlier = f" {done} are there from an earlier run (--fresh begins again)." if done else ""
    print(f"{len(PAPER)} models, {ITEMS} items of each of six benchmarks.{earlier}", flush=True)
    (results,) = evaluate_all([workspace], PAPER)
    table = compare(load_results(results))
    table.write(folder / "table.md")
    print(table.to_markdown())
    drawn = draw(table, folder / "figures")
    print(
        f"{folder / 'table.md'} and {len(drawn.paths)} figures in {folder / 'figures'}, in {time.monotonic() - started:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="for merges and results (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left there, and begin again")
    arguments = parser.parse_args(argv)
    if arguments.fresh and Workspace.is_ours(arguments.folder):
        shutil.rmtree(arguments.folder)
    return guarded("demo.py", lambda: run(arguments.folder))


if __name__ == "__main__":
    sys.exit(main())
