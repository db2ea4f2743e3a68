"""The six mini benchmarks: which generator makes each, and their files in the layout of --data_dir.

    python -m examples.family.benchmarks --split validation --out build/validation

The same command writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.family import code_items, instruct_items, maths_items, world
from examples.family.splits import SHARES, Item, Split, draw_distinct

BENCHMARKS: dict[str, Callable[[random.Random], Item]] = {
    "humaneval": code_items.humaneval,
    "mbpp": code_items.mbpp,
    "mmlu": world.ask,
    "math": maths_items.math_item,
    "gsm8k": maths_items.gsm8k,
    "ifeval": instruct_items.item,
}
SEEDS: dict[Split, int] = {"train": 10, "validation": 20, "test_0": 30, "test_1": 31}
ITEMS = 256
"""Of each benchmark, in each of the validation and test sets."""


def items(benchmark: str, split: Split, count: int = ITEMS) -> list[Item]:
    """The first `count` items of a benchmark's split; more items begin with the same ones."""
    return draw_distinct(BENCHMARKS[benchmark], split, count, SEEDS[split])


def rows(benchmark: str, split: Split, count: int = ITEMS) -> list[dict[str, Any]]:
    """The items' rows, numbered as the benchmark numbers its own."""
    numbered = []
    for number, item in enumerate(items(benchmark, split, count)):
        names = {"humaneval": f"HumanEval/{number}", "mbpp": number, "ifeval": number}
        field = {"humaneval": "task_id", "mbpp": "task_id", "ifeval": "key"}.get(benchmark)
        numbered.append(
            item.row | ({field: names[benchmark]} if field else {"idx": number} if benchmark != "mmlu" else {})
        )
    return numbered


def write(folder: Path, split: Split, count: int = ITEMS) -> None:
    """Write one file per benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark in BENCHMARKS:
        lines = [json.dumps(row) for row in rows(benchmark, split, count)]
        (folder / f"{benchmark}.jsonl").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the benchmarks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the six mini benchmarks of one split.")
    parser.add_argument("--split", default="validation", choices=tuple(SHARES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=ITEMS)
    arguments = parser.parse_args(argv)
    write(arguments.out, arguments.split, arguments.items)
    return 0


if __name__ == "__main__":
    sys.exit(main())
