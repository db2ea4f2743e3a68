"""Relax a merged checkpoint by the base model's activations (activation-informed merging, AIM).

    python performAIM.py --merged_model ./merged --pretrained_model_name unsloth/llama-2-13b --omega 0.4 \\
        --save_path ./merged_AIM
    python performAIM.py --merged_model ./merged --pretrained_model_name ./base --calibration_data texts.jsonl \\
        --omegas 0,0.2,0.4 --figures ./figures --save_path ./sweep
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line
from aim.flags import add_aim_flags
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting

if TYPE_CHECKING:
    from aim.console import AimRequest
    from aim.run import AimJob
    from alignment.layout import Layout
    from checkpoints.upload import Upload
    from streaming.output import RunOptions


def build_parser() -> command_line.Parser:
    """The flags of performAIM.py."""
    parser = command_line.Parser(prog="performAIM.py", description=__doc__)
    what = parser.add_argument_group("what to relax")
    what.add_argument("--merged_model", required=True, metavar="MODEL", help="the merge, however it was made: a folder, a hub name or NAME@REVISION, or a LoRA adapter; gives names, tokenizer and side files")  # fmt: skip
    what.add_argument(
        "--pretrained_model_name", required=True, metavar="MODEL", help="the base model that it was merged from"
    )
    what.add_argument(
        "--save_path", required=True, metavar="FOLDER", help="the relaxed checkpoint; appears when it is complete"
    )
    how = add_aim_flags(parser, omega_help="0 puts the most active channel back to the base, 1 changes nothing (default 0.4); also by filter, mlp=0.2,self_attn=0.6,0.4: the first that is part of a tensor's name counts, the last number is for the rest")  # fmt: skip
    how.add_argument("--seed", type=command_line.whole, metavar="N", help="of --control permuted (default 0)")
    command_line.add_layout_flags(parser.add_argument_group("vocabulary and head of the output"))
    command_line.add_output_flags(parser, dtype_of="the merged model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return command_line.run(parser, lambda arguments: run(arguments, command_line.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> request -> matched models -> statistics -> relaxed checkpoints."""
    with command_line.refusals_as_json(arguments), command_line.run_log(arguments.log_file, command) as log:
        from aim.run import open_job

        request, options, save_path, layout = read_flags(arguments, command)
        options = replace(options, log=log)
        upload = command_line.read_upload(arguments, request.how.folders)
        base, merged = arguments.pretrained_model_name, arguments.merged_model
        keywords: dict[str, Any] = {"check": request.check, "download": not arguments.dry_run}
        keywords |= {"out_dtype": arguments.dtype, "layout": layout, "aim": request.identity()}
        with (
            command_line.pushing(None if arguments.dry_run else upload, save_path, options),
            closing(open_job(base, merged, save_path, request.how, options, **keywords)) as job,
        ):
            if arguments.dry_run:
                show_plan(job, request, upload, as_json=arguments.json)
            else:
                relax(job, request)


def read_flags(arguments: argparse.Namespace, command: list[str]) -> tuple[AimRequest, RunOptions, Path, Layout]:
    """What is asked for, how to run and where to. Raises Refusals: every flag that is wrong."""
    from aim.console import AimRequest

    device = command_line.parse_device("cpu")
    found: list[Any] = []
    problems: list[str | InputError] = []
    with collecting(problems):
        device = command_line.parse_device(arguments.device)
    if arguments.seed is not None and arguments.control != "permuted":
        problems.append(ArgumentError("--seed: nothing is drawn but by --control permuted. Leave it out."))
    for read in (
        lambda: AimRequest(arguments, device),
        lambda: command_line.run_options(arguments, device, command),
        lambda: command_line.parse_save_path(arguments.save_path),
        lambda: read_layout(arguments),
    ):
        with collecting(problems):
            found.append(read())
    if problems:
        raise Refusals(problems)
    request, options, save_path, layout = found
    return request, options, save_path, layout


def read_layout(arguments: argparse.Namespace) -> Layout:
    """The output's vocabulary, head and tokenizer files. Raises InputError where a flag is wrong."""
    from aim.run import layout_of

    tie = command_line.parse_yes_or_no("--tie_word_embeddings", arguments.tie_word_embeddings)
    more = {"chat_template": arguments.chat_template, "copy_tokenizer_from": arguments.copy_tokenizer_from}
    return layout_of(arguments.numerics or "float32", arguments.new_token_rows, tie_word_embeddings=tie, **more)


def show_plan(job: AimJob, request: AimRequest, upload: Upload | None, *, as_json: bool) -> None:
    """Print what would be done."""
    from aim.console import format_check

    described = request.describe(job.base, job.tensors)
    if as_json:
        pushed = {"push_to_hub": upload.as_json()} if upload else {}
        print(json.dumps({**job.as_json(), "aim": described, **pushed}, indent=2, ensure_ascii=False))
    else:
        print(f"{format_check(described)}\n{job.as_text()}")
        if upload:
            print(upload.as_text())


def relax(job: AimJob, request: AimRequest) -> None:
    """Calibrate and relax, and say what came of it."""
    from streaming.output import unfinished

    quiet = job.options.quiet
    console = command_line.console(job.options)
    job.options.log("plan", **job.as_json())
    for note in job.notes:
        console.note(f"note: {note}")
    with job.staged() as stage:
        relaxations = request.relaxations(job.base, job.tensors, console, stage)
        command_line.note_finished(console, unfinished(job.tensors, stage), job.tensors)
        with command_line.progress_bar("relaxing", job.bytes_to_move(stage, relaxations), quiet=quiet) as advance:
            written = job.run(stage, relaxations, advance)
    for warning in written.findings.non_finite_warnings():
        console.note(f"warning: {warning}")
    console.say(relaxations.summary())
    console.say(command_line.summary(job.save_path, written))


if __name__ == "__main__":
    command_line.end(main())
