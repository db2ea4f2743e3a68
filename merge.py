"""Merge fine-tuned language models into one checkpoint.

    python merge.py --method dare_ties --base_model unsloth/llama-2-13b \\
        --models_to_merge WizardLMTeam/WizardLM-13B-V1.2,vanillaOVO/WizardMath-13B-V1.0 --save_path ./merged
    python merge.py --method ties --base_model ./base --models_to_merge ./math:0.6,./code:0.4 --density 0.3 \\
        --save_path ./merged --dry_run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import command_line
from checkpoints.errors import ArgumentError, InputError, Refusals
from merging.methods import METHODS

if TYPE_CHECKING:
    from merging.recipe import Recipe
    from streaming.output import RunOptions


def build_parser() -> command_line.Parser:
    """The flags of merge.py."""
    parser = command_line.Parser(prog="merge.py", description=__doc__)
    what = parser.add_argument_group("what to merge")
    what.add_argument("--method", required=True, metavar="METHOD", help=", ".join(METHODS) + " (in any case)")
    what.add_argument("--base_model", required=True, metavar="MODEL", help="what the models were fine-tuned from: a folder, a hub name or NAME@REVISION; gives config, tokenizer and vocabulary")  # fmt: skip
    what.add_argument("--models_to_merge", required=True, metavar="A,B,C", help="folders, hub names or NAME@REVISION; with weights A:0.5,B:0.3")  # fmt: skip
    what.add_argument(
        "--save_path", required=True, metavar="FOLDER", help="the merged checkpoint; appears when it is complete"
    )
    how = parser.add_argument_group("how (a flag that the method does not use is an error)")
    how.add_argument(
        "--weights", metavar="W", help="one number, or one for each model: 0.5,0.3,0.2 (default 1.0; not widen)"
    )
    how.add_argument("--density", metavar="D", help="ties, dare_linear, dare_ties: share of each task vector that is kept, likewise (default 0.5, the WIDEN authors' setting for the models of the AIM paper; the AIM authors' program passes none, which means 1.0: no trimming and no dropping)")  # fmt: skip
    how.add_argument("--lambda", dest="lambda_", metavar="L", help="task_arithmetic, ties, dare: what the merged task vector is multiplied with (default 1.0)")  # fmt: skip
    how.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide by the sum of weights, of the agreeing models where signs are elected (default: yes for linear and ties, no for task_arithmetic and dare; not widen)")  # fmt: skip
    how.add_argument(
        "--widen_ratio",
        metavar="R",
        help="widen: ranks above this multiple of the mean count as important (default 1.0)",
    )
    how.add_argument("--widen_calibration", metavar="C", help="widen: score of the important ones (default 1.0)")
    how.add_argument(
        "--seed", type=int, metavar="N", help="dare_linear, dare_ties: seed of the random masks (default 0)"
    )
    how.add_argument("--exclude", metavar="REGEX", help="tensors in whose name this is found are taken from the base")
    command_line.add_output_flags(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report", default="sample", metavar="WHAT", help="sample (one block in 16; default), full or none"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return command_line.run(parser, lambda arguments: run(arguments, command_line.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> recipe and options -> plan -> merge."""
    if arguments.json and not arguments.dry_run:
        raise ArgumentError("--json: works with --dry_run only. Add that, or leave --json out.")
    try:
        recipe, options = read_flags(arguments, command)
        save_path = command_line.parse_save_path(arguments.save_path)
        if arguments.dry_run:
            show_plan(recipe, save_path, options, as_json=arguments.json)
        else:
            merge(recipe, save_path, options)
    except InputError as error:
        if arguments.json:
            problems = error.problems if isinstance(error, Refusals) else [error]
            print(json.dumps({"refusals": [str(problem) for problem in problems]}, indent=2, ensure_ascii=False))
        raise


def read_flags(arguments: argparse.Namespace, command: list[str]) -> tuple[Recipe, RunOptions]:
    """What to merge, and how to run it. Raises InputError where a flag is wrong."""
    from merging.recipe import make_recipe
    from streaming.output import RunOptions
    from streaming.stream import StreamOptions

    recipe = make_recipe(
        arguments.method,
        arguments.base_model,
        arguments.models_to_merge,
        parameters={
            "weight": arguments.weights,
            "density": arguments.density,
            "lambda": arguments.lambda_,
            "normalize": arguments.normalize,
            "widen_ratio": arguments.widen_ratio,
            "widen_calibration": arguments.widen_calibration,
        },
        seed=arguments.seed,
        out_dtype=arguments.dtype,
        exclude=arguments.exclude,
    )
    options = RunOptions(
        stream=StreamOptions(device=command_line.parse_device(arguments.device), workers=arguments.workers),
        max_shard_bytes=command_line.parse_size("--max_shard_size", arguments.max_shard_size),
        digest=command_line.parse_choice("--digest", arguments.digest, ("none", "outputs", "full")),  # type: ignore[arg-type]
        report=command_line.parse_choice("--report", arguments.report, ("none", "sample", "full")),  # type: ignore[arg-type]
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        command=command,
    )
    return recipe, options


def show_plan(recipe: Recipe, save_path: Path, options: RunOptions, *, as_json: bool) -> None:
    """Print the plan."""
    from merging.run import prepare

    with closing(prepare(recipe, save_path, options, download=False)) as job:
        plan = job.plan
        print(json.dumps(plan.as_json(), indent=2, ensure_ascii=False) if as_json else plan.as_text())


def merge(recipe: Recipe, save_path: Path, options: RunOptions) -> None:
    """Merge, and say what came of it."""
    from merging.report import format_report
    from merging.run import prepare

    job = prepare(recipe, save_path, options)
    if not options.quiet:
        for note in job.plan.notes:
            print(f"note: {note}", file=sys.stderr)
    with command_line.progress_bar(
        "merging", job.plan.bytes_to_read + job.plan.bytes_to_write, quiet=options.quiet
    ) as advance:
        result = job.run(advance)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.quiet:
        return
    if result.report:
        print(format_report(result.report) + "\n")
    print(command_line.summary(save_path, result.written))


if __name__ == "__main__":
    sys.exit(main())
