"""Relax a merged checkpoint by the base model's activations (activation-informed merging, AIM).

    python performAIM.py --merged_model ./merged --pretrained_model_name unsloth/llama-2-13b --omega 0.4 \\
        --save_path ./merged_AIM
    python performAIM.py --merged_model ./merged --pretrained_model_name ./base --calibration_data texts.jsonl \\
        --omegas 0,0.2,0.4 --figures ./figures --save_path ./sweep
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing

import command_line
from aim.flags import add_aim_flags
from checkpoints.errors import ArgumentError


def build_parser() -> command_line.Parser:
    """The flags of performAIM.py."""
    parser = command_line.Parser(prog="performAIM.py", description=__doc__)
    what = parser.add_argument_group("what to relax")
    what.add_argument("--merged_model", required=True, metavar="MODEL", help="the merge, however it was made: a folder, a hub name or NAME@REVISION; gives names, tokenizer and side files")  # fmt: skip
    what.add_argument(
        "--pretrained_model_name", required=True, metavar="MODEL", help="the base model that it was merged from"
    )
    what.add_argument(
        "--save_path", required=True, metavar="FOLDER", help="the relaxed checkpoint; appears when it is complete"
    )
    add_aim_flags(parser, omega_help="0 puts the most active channel back to the base, 1 changes nothing (default 0.4); also by filter, mlp=0.2,self_attn=0.6,0.4: the first that is part of a tensor's name counts, the last number is for the rest")  # fmt: skip
    parser.add_argument("--seed", type=command_line.whole, metavar="N", help="of --control permuted (default 0)")
    command_line.add_output_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return command_line.run(parser, lambda arguments: run(arguments, command_line.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> request -> matched models -> statistics -> relaxed checkpoints."""
    if arguments.seed is not None and arguments.control != "permuted":
        raise ArgumentError("--seed: nothing is drawn but by --control permuted. Leave it out.")
    with command_line.refusals_as_json(arguments):
        from aim.console import AimRequest, format_check
        from aim.run import open_job

        device = command_line.parse_device(arguments.device)
        request = AimRequest(arguments, device)
        options = command_line.run_options(arguments, device, command)
        save_path = command_line.parse_save_path(arguments.save_path)
        names = (arguments.pretrained_model_name, arguments.merged_model)
        job = open_job(
            *names, save_path, request.how, options, out_dtype=arguments.dtype, download=not arguments.dry_run
        )
        with closing(job):
            checked = request.check(job.base)
            if arguments.dry_run:
                plan = {"aim": checked, **job.as_json()}
                print(
                    json.dumps(plan, indent=2, ensure_ascii=False)
                    if arguments.json
                    else f"{format_check(checked)}\n{job.as_text()}"
                )
                return
            console = command_line.console(options.quiet)
            for note in job.notes:
                console.note(f"note: {note}")
            relaxations = request.relaxations(job.base, console)
            moved = job.bytes_to_read + job.bytes_to_write * len(relaxations.variants)
            with command_line.progress_bar("relaxing", moved, quiet=options.quiet) as advance:
                written = job.run(relaxations, advance)
            console.say(relaxations.summary())
            console.say(command_line.summary(save_path, written))


if __name__ == "__main__":
    sys.exit(main())
