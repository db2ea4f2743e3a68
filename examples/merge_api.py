"""The Python API: what `python merge.py` does, from a program of your own.

    PYTHONPATH=. python examples/merge_api.py BASE MODEL
    PYTHONPATH=. python examples/merge_api.py ./base ./fine_tuned --save_path ./halfway

Writes the model halfway between a base model and one fine-tuned from it: task arithmetic with lambda 0.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import InputError
from merging import RunOptions, make_recipe, merge


def merge_halfway(base: str, model: str, save_path: Path) -> float:
    """Merge, and return |merged - base| / |base|.

    Args:
        base, model: a folder or a hub name each, as on the command line.
        save_path: the folder to be.

    Raises: InputError: whatever keeps the merge from working, in one message; nothing is left behind.
    """
    # What decides the output's bytes, and nothing else. Further models go behind a comma; parameters are named as in
    # merge_recipe.json: weight, density, lambda, normalize, widen_ratio, widen_calibration.
    recipe = make_recipe("task_arithmetic", base, model, parameters={"lambda": 0.5}, out_dtype="bfloat16")

    # How it runs: nothing here changes the merged numbers.
    options = RunOptions(report="full", max_shard_bytes=2_000_000_000)

    result = merge(recipe, save_path, options)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    assert result.report is not None  # it is None only with report="none"
    return float(result.report["all"]["merged_relative_norm"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder or hub name of the base model")
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a model fine-tuned from it")
    parser.add_argument("--save_path", type=Path, default=Path("halfway"), help="default: halfway")
    arguments = parser.parse_args(argv)
    try:
        distance = merge_halfway(arguments.base, arguments.model, arguments.save_path)
    except InputError as error:
        print(f"merge_api.py: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.save_path}: |merged - base| / |base| = {distance:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
