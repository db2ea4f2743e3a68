"""Merge fine-tuned language models into one checkpoint.

    python merge.py --method dare_ties --base_model unsloth/llama-2-13b \\
        --models_to_merge WizardLMTeam/WizardLM-13B-V1.2,vanillaOVO/WizardMath-13B-V1.0 --save_path ./merged
    python merge.py --method ties --base_model ./base --models_to_merge ./math:0.6,./code:0.4 --density 0.3 \\
        --save_path ./merged --dry_run
    python merge.py --config recipe.yml --save_path ./merged
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
from aim.block import add_block, block_of
from aim.flags import add_aim_flags, given_aim_flags, read_calibration, read_relaxing
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting
from merging.methods import METHODS, get_method
from merging.parameters import PARAMETERS, Parameter

if TYPE_CHECKING:
    import torch

    from aim.console import AimRequest
    from alignment.layout import Layout
    from checkpoints.upload import Upload
    from merging.recipe import Recipe
    from merging.run import Job
    from streaming.output import RunOptions


def build_parser() -> command_line.Parser:
    """The flags of merge.py."""
    parser = command_line.Parser(prog="merge.py", description=__doc__)
    what = parser.add_argument_group("what to merge")
    what.add_argument("--method", metavar="METHOD", help=", ".join(METHODS) + " (in any case)")
    what.add_argument("--base_model", metavar="MODEL", help="what the models were fine-tuned from: a folder, a hub name or NAME@REVISION; gives config, tokenizer and vocabulary")  # fmt: skip
    what.add_argument("--models_to_merge", metavar="A,B,C", help="folders, hub names or NAME@REVISION; LoRA adapters too, by themselves or as BASE+ADAPTER; with weights A:0.5,B:0.3")  # fmt: skip
    what.add_argument("--config", metavar="FILE", help="instead of the three above: a recipe, in mergekit's YAML or the merge_recipe.json of another merge (docs/from-mergekit.md)")  # fmt: skip
    what.add_argument("--write_config", metavar="FILE", help="write what the flags say as such a recipe, and do nothing else")  # fmt: skip
    what.add_argument("--save_path", metavar="FOLDER", help="the merged checkpoint; appears when it is complete")
    what.add_argument("--verify", metavar="FOLDER", help="merge nothing: check that a result is what its run wrote (sizes, digests), that every number is finite, and shapes")  # fmt: skip
    how = parser.add_argument_group("how (a flag that the method does not use is an error)")
    for parameter in PARAMETERS.values():
        add_parameter(how, parameter)
    how.add_argument(
        "--seed",
        type=command_line.whole,
        metavar="N",
        help="dare, della, --control permuted: seed of what is drawn (default 0)",
    )
    how.add_argument("--exclude", metavar="REGEX", help="tensors in whose name this is found are taken from the base")
    layout = parser.add_argument_group("vocabulary and head of the output")
    layout.add_argument("--tokenizer_source", metavar="S", help="whose tokenizer and vocabulary: base, union (the base's and the tokens that models add) or one of the models (default: union where a model adds tokens, else base)")  # fmt: skip
    layout.add_argument("--pad_to_multiple_of", type=command_line.positive, metavar="N", help="rows of embedding and head are a multiple of this")  # fmt: skip
    command_line.add_layout_flags(layout)
    how.add_argument("--only", metavar="REGEX", help="tensors in whose name this is not found are taken from the base, such as the vision tower's with --only language_model")  # fmt: skip
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


def add_parameter(group: argparse._ArgumentGroup, parameter: Parameter) -> None:
    """Add the flag of a method's parameter; its help says which methods have it, and what they do without."""
    users: dict[Any, list[str]] = {}
    for name, entry in METHODS.items():
        if parameter.key in entry.defaults:
            users.setdefault(entry.defaults[parameter.key], []).append(name)
    words = {True: "yes", False: "no", None: "as the method does"}
    defaults = "; ".join(
        f"{', '.join(names)} (default {words[default] if parameter.is_switch else default})"
        for default, names in users.items()
    )
    form: dict[str, Any] = {"metavar": "V"} if not parameter.is_switch else {"action": argparse.BooleanOptionalAction}
    group.add_argument(parameter.flag, help=f"{parameter.help}: {defaults}", **form)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()

    def body(arguments: argparse.Namespace) -> None:
        check_complete(parser, arguments)
        run(arguments, command_line.command(parser, argv))

    return command_line.run(parser, body, argv)


def check_complete(parser: command_line.Parser, arguments: argparse.Namespace) -> None:
    """Exit with a message where flags are missing without which nothing is said, before anything heavy is imported."""
    if arguments.verify is not None:
        return
    needed = [] if arguments.config is not None else ["--method", "--base_model", "--models_to_merge"]
    needed += [] if arguments.write_config is not None else ["--save_path"]
    missing = [flag for flag in needed if vars(arguments)[flag.removeprefix("--")] is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> recipe and options -> plan -> merge, relaxed by AIM where asked."""
    if arguments.verify is not None:
        verify(arguments)
        return
    if arguments.write_config is not None:
        write_config(arguments)
        return
    with command_line.refusals_as_json(arguments), command_line.run_log(arguments.log_file, command) as log:
        from merging.run import prepare

        recipe, options, save_path, request = read_flags(arguments, command)
        options = replace(options, log=log)
        upload = command_line.read_upload(arguments, request.how.folders if request else [""])
        aim: dict[str, Any] = {}
        if request:
            aim = {"folders": request.how.folders, "aim": request.identity(), "check": request.check}
        with (
            command_line.pushing(None if arguments.dry_run else upload, save_path, options),
            closing(prepare(recipe, save_path, options, download=not arguments.dry_run, **aim)) as job,
        ):
            if request:
                check_relaxable(job)
            if arguments.dry_run:
                show_plan(job, request, upload, as_json=arguments.json)
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
        lambda: read_recipe(arguments),  # first: a file may hold AIM's flags too
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
    """What to merge, from flags or a file, whose block on AIM is added to the flags. Raises InputError where one is wrong."""
    if arguments.config is not None:
        return read_config(arguments)
    from alignment.layout import Layout
    from merging.recipe_flags import make_recipe

    seed_is_aims = arguments.control == "permuted" and not get_method(arguments.method).draws
    layout: Layout | None = None
    recipe: Recipe | None = None
    problems: list[str | InputError] = []
    with collecting(problems):
        layout = Layout(**given_layout(arguments))
    with collecting(problems):
        recipe = make_recipe(
            arguments.method,
            arguments.base_model,
            arguments.models_to_merge,
            parameters={key: vars(arguments)[one.flag.removeprefix("--")] for key, one in PARAMETERS.items()},
            seed=None if seed_is_aims else arguments.seed,
            out_dtype=arguments.dtype,
            exclude=arguments.exclude,
            only=arguments.only,
            layout=layout,
        )
    if problems or recipe is None:
        raise Refusals(problems)
    return recipe


def given_layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """What flags say of the output's vocabulary and head, by recipe key. Raises ArgumentError where one is wrong."""
    keys = ("tokenizer_source", "new_token_rows", "pad_to_multiple_of", "chat_template", "copy_tokenizer_from")
    given = {key: vars(arguments)[key] for key in keys}
    given["tie_word_embeddings"] = command_line.parse_yes_or_no("--tie_word_embeddings", arguments.tie_word_embeddings)
    return {key: value for key, value in given.items() if value is not None}


def read_config(arguments: argparse.Namespace) -> Recipe:
    """What the file of --config says to merge; what flags say besides must not contradict it. Raises Refusals."""
    from merging.recipe_file import read_recipe_file

    problems: list[str | InputError] = []
    for flag in ("--method", "--base_model", "--models_to_merge", *(one.flag for one in PARAMETERS.values())):
        if vars(arguments)[flag.removeprefix("--")] is not None:
            problems.append(
                ArgumentError(f"{flag}: --config says what to merge. Write it into the file, or leave one out.")
            )
    recipe: Recipe | None = None
    with collecting(problems):
        recipe = read_recipe_file(
            arguments.config,
            seed=None if arguments.control == "permuted" else arguments.seed,
            out_dtype=None if arguments.dtype == "auto" else arguments.dtype,
            exclude=arguments.exclude,
            only=arguments.only,
            layout=given_layout(arguments),
        )
    if recipe is not None and recipe.aim is not None:
        with collecting(problems):
            add_block(recipe.aim, arguments, arguments.config)
    if recipe is not None and recipe.base_model is None and (arguments.omega or arguments.omegas) is not None:
        problems.append(ArgumentError(f"{arguments.config}: base_model: AIM needs one. Name it, or leave AIM out."))
    if problems or recipe is None:
        raise Refusals(problems)
    return recipe


def write_config(arguments: argparse.Namespace) -> None:
    """Write the recipe that the flags make as a file. Raises InputError where a flag is wrong, or the file is there."""
    path = Path(arguments.write_config).expanduser()
    problems: list[str | InputError] = []
    recipe: Recipe | None = None
    with collecting(problems):
        recipe = read_recipe(arguments)
    with collecting(problems):
        if arguments.omega is None and arguments.omegas is None and given_aim_flags(arguments):
            raise ArgumentError(f"{given_aim_flags(arguments)[0]}: belongs to AIM. Add --omega, such as --omega 0.4.")
    with collecting(problems):
        read_relaxing(arguments)
    with collecting(problems):
        read_calibration(arguments, None)
    if path.exists() and not arguments.overwrite:
        problems.append(
            ArgumentError(f"--write_config {path}: is there already. Name another file, or add --overwrite.")
        )
    elif not path.parent.is_dir() or path.is_dir():
        problems.append(ArgumentError(f"--write_config {path}: expected a file in a folder that exists. Name one."))
    if problems or recipe is None:
        raise Refusals(problems)
    from merging.recipe_file import write_recipe_file

    write_recipe_file(recipe, path, block_of(arguments))
    if not arguments.quiet:
        print(f"{path}: written. Merge with: python merge.py --config {path} --save_path FOLDER")


def verify(arguments: argparse.Namespace) -> None:
    """Check the results of an earlier run. Raises InputError: everything that is wrong with them."""
    from streaming.verify import bytes_in, results_in, verify

    folder = command_line.parse_save_path(arguments.verify)
    for result in results_in(folder):
        with command_line.progress_bar("verifying", bytes_in(result), quiet=arguments.quiet) as advance:
            found = verify(result, trust_remote_code=arguments.trust_remote_code, progress=advance)
        for note in found.notes:
            print(f"note: {result}: {note}", file=sys.stderr)
        if found.undigested:
            print(f"note: {result}: the run took no digests, so that only sizes were compared.", file=sys.stderr)
        if not arguments.quiet:
            size = command_line.gigabytes(found.bytes)
            print(f"{result}: as written: {found.files} weight file(s), {found.tensors} tensors, {size}, all finite.")


def check_relaxable(job: Job) -> None:
    """Raise ArgumentError where AIM has no base to relax to: the output's layers are not the base's."""
    if job.plan.is_stacked:
        raise ArgumentError(
            "--omega: the recipe stacks layers, so that the base has none to match. Merge whole models, or leave AIM out."
        )


def read_report(arguments: argparse.Namespace) -> Literal["none", "sample", "full"]:
    """How much the merge report looks at. Raises ArgumentError."""
    return command_line.parse_choice("--report", arguments.report, ("none", "sample", "full"))  # type: ignore[return-value]


def show_plan(job: Job, request: AimRequest | None, upload: Upload | None, *, as_json: bool) -> None:
    """Print the plan, AIM's where it takes part, and what would be pushed."""
    described = request.describe(job.base, job.plan.tensors) if request else None
    if as_json:
        more = {"aim": described, "push_to_hub": upload and upload.as_json()}
        plan = job.plan.as_json() | {key: value for key, value in more.items() if value is not None}
        print(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    if described is not None:
        from aim.console import format_check

        print(format_check(described))
    print(job.plan.as_text())
    if upload:
        print(upload.as_text())


def merge(job: Job, request: AimRequest | None) -> None:
    """Merge, and say what came of it."""
    from merging.report import format_report
    from streaming.output import Variant, bytes_written, unfinished
    from streaming.stream import bytes_read

    quiet = job.options.quiet
    console = command_line.console(job.options)
    job.options.log("plan", **job.plan.as_json())
    for note in job.plan.notes:
        console.note(f"note: {note}")
    for warning in job.plan.warnings:
        console.note(f"warning: {warning}")
    with job.staged() as stage:
        relaxations = request.relaxations(job.base, job.plan.tensors, console, stage) if request else None
        variants = relaxations.variants if relaxations else [Variant()]
        todo = unfinished(job.plan.tensors, stage)
        command_line.note_finished(console, todo, job.plan.tensors)
        read = bytes_read(todo, [variant.transform for variant in variants])
        with command_line.progress_bar("merging", read + bytes_written(todo) * len(variants), quiet=quiet) as advance:
            result = job.run(stage, advance, variants)
    for warning in result.warnings:
        console.note(f"warning: {warning}")
    if result.report:
        console.say(format_report(result.report) + "\n")
    if relaxations:
        console.say(relaxations.summary())
    console.say(command_line.summary(job.save_path, result.written))


if __name__ == "__main__":
    command_line.end(main())
