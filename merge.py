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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import command_line
from aim.flags import add_aim_flags, given_aim_flags
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting
from merging.methods import METHODS, get_method

if TYPE_CHECKING:
    import torch

    from aim.console import AimRequest
    from merging.recipe import Recipe
    from merging.run import Job
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
        "--seed",
        type=command_line.whole,
        metavar="N",
        help="dare_linear, dare_ties, --control permuted: seed of what is drawn (default 0)",
    )
    how.add_argument("--exclude", metavar="REGEX", help="tensors in whose name this is found are taken from the base")
    add_aim_flags(
        parser,
        omega_help="relax the merge by the base's activations before it is written: 0 puts the most active channel back to the base, 1 changes nothing; also by filter, mlp=0.2,self_attn=0.6,0.4",
    )
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
    """Flags -> recipe and options -> plan -> merge, relaxed by AIM where asked."""
    with command_line.refusals_as_json(arguments):
        from merging.run import prepare

        recipe, options, save_path, request = read_flags(arguments, command)
        count = len(request.how.omegas) if request else 1
        check = request.check if request else None
        download = not arguments.dry_run
        with closing(prepare(recipe, save_path, options, variants=count, check=check, download=download)) as job:
            if arguments.dry_run:
                show_plan(job, request, as_json=arguments.json)
            else:
                merge(job, request)


def read_flags(arguments: argparse.Namespace, command: list[str]) -> tuple[Recipe, RunOptions, Path, AimRequest | None]:
    """What to merge, how to run, where to, and AIM's part where it has one. Raises Refusals: every flag that is wrong."""
    device = command_line.parse_device("cpu")
    found: list[Any] = []
    problems: list[str | InputError] = []
    with collecting(problems):
        device = command_line.parse_device(arguments.device)
    for read in (
        lambda: read_recipe(arguments),
        lambda: replace(command_line.run_options(arguments, device, command), report=read_report(arguments)),
        lambda: command_line.parse_save_path(arguments.save_path),
        lambda: read_aim(arguments, device),
    ):
        with collecting(problems):
            found.append(read())
    if problems:
        raise Refusals(problems)
    recipe, options, save_path, request = found
    return recipe, options, save_path, request


def read_aim(arguments: argparse.Namespace, device: torch.device) -> AimRequest | None:
    """AIM as the flags ask for it, None where they do not. Raises InputError where a flag is wrong or stands alone."""
    if arguments.omega is None and arguments.omegas is None:
        if given_aim_flags(arguments):
            raise ArgumentError(
                f"{given_aim_flags(arguments)[0]}: belongs to AIM. Add --omega, such as --omega 0.4, or leave it out."
            )
        return None
    from aim.console import AimRequest

    return AimRequest(arguments, device)


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """What to merge. Raises InputError where a flag is wrong."""
    from merging.recipe import make_recipe

    seed_is_aims = arguments.control == "permuted" and not get_method(arguments.method).draws
    return make_recipe(
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
        seed=None if seed_is_aims else arguments.seed,
        out_dtype=arguments.dtype,
        exclude=arguments.exclude,
    )


def read_report(arguments: argparse.Namespace) -> Literal["none", "sample", "full"]:
    """How much the merge report looks at. Raises ArgumentError."""
    return command_line.parse_choice("--report", arguments.report, ("none", "sample", "full"))  # type: ignore[return-value]


def show_plan(job: Job, request: AimRequest | None, *, as_json: bool) -> None:
    """Print the plan, and AIM's where it takes part."""
    described = request.describe(job.base, job.plan.tensors) if request else None
    if as_json:
        plan = job.plan.as_json() if described is None else {**job.plan.as_json(), "aim": described}
        print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    if described is not None:
        from aim.console import format_check

        print(format_check(described))
    print(job.plan.as_text())


def merge(job: Job, request: AimRequest | None) -> None:
    """Merge, and say what came of it."""
    from merging.report import format_report
    from streaming.output import Variant, bytes_read

    quiet = job.options.quiet
    if not quiet:
        for note in job.plan.notes:
            print(f"note: {note}", file=sys.stderr)
    console = command_line.console(quiet)
    relaxations = request.relaxations(job.base, job.plan.tensors, console) if request else None
    variants = relaxations.variants if relaxations else [Variant()]
    read = bytes_read(job.plan.tensors, [variant.transform for variant in variants])
    moved = read + job.plan.bytes_to_write * len(variants)
    with command_line.progress_bar("merging", moved, quiet=quiet) as advance:
        result = job.run(advance, variants)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if quiet:
        return
    if result.report:
        print(format_report(result.report) + "\n")
    if relaxations:
        print(relaxations.summary())
    print(command_line.summary(job.save_path, result.written))


if __name__ == "__main__":
    command_line.end(main())
