"""Relax a merged checkpoint by the base model's activations (activation-informed merging, AIM).

    python performAIM.py --merged_model ./merged --pretrained_model_name unsloth/llama-2-13b --omega 0.4 \\
        --save_path ./merged_AIM
    python performAIM.py --merged_model ./merged --pretrained_model_name ./base --calibration_data texts.jsonl \\
        --omegas 0,0.2,0.4 --figures ./figures --save_path ./sweep
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import ArgumentError
from checkpoints.problems import Problems
from checkpoints.settings import setting
from commands import aim_flags, shell
from commands.command_line import Parser, parse_yes_or_no, whole

if TYPE_CHECKING:
    from aim.request import AimRequest
    from alignment.layout import Layout
    from streaming.output import RunOptions


def build_parser() -> Parser:
    """The flags of performAIM.py."""
    parser = Parser(prog="performAIM.py", description=__doc__)
    what = parser.add_argument_group("what to relax")
    what.add_argument("--merged_model", required=True, metavar="MODEL", help="the merge, however it was made: a folder, a hub name or NAME@REVISION, or a LoRA adapter; gives names, tokenizer and side files")  # fmt: skip
    what.add_argument(
        "--pretrained_model_name", required=True, metavar="MODEL", help="the base model that it was merged from"
    )
    what.add_argument(
        "--save_path", required=True, metavar="FOLDER", help="the relaxed checkpoint; appears when it is complete"
    )
    how = aim_flags.add_aim_flags(parser, alone=True, omega_help="0 puts the most active channel back to the base, 1 changes nothing (default 0.4); also by filter, mlp=0.2,self_attn=0.6,0.4: the first that is part of a tensor's name counts, the last number is for the rest")  # fmt: skip
    how.add_argument("--seed", type=whole, metavar="N", help="of --control permuted and random (default 0)")
    shell.add_layout_flags(parser.add_argument_group("vocabulary and head of the output"))
    shell.add_output_flags(parser, dtype_of="the merged model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return shell.run(parser, lambda arguments: run(arguments, shell.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> request -> matched models -> statistics -> relaxed checkpoints."""
    with (
        shell.processes("performAIM.py", arguments) as processes,
        shell.refusals_as_json(arguments),
        shell.run_log(arguments.log_file, command) as log,
    ):
        from aim.relax_work import prepare

        asked = read_flags(arguments, command)
        options, how = replace(asked.options, log=log, processes=processes), asked.request.relaxing
        step = asked.request.step(asked.save_path, options, dry_run=arguments.dry_run)
        upload = shell.read_upload(arguments, step.folders)
        job = prepare(
            arguments.pretrained_model_name,
            arguments.merged_model,
            asked.save_path,
            options,
            step,
            how,
            out_dtype=arguments.dtype,
            layout=asked.layout,
            download=not arguments.dry_run,
        )
        shell.carry_out(job, upload, arguments)


@dataclass(frozen=True)
class Asked:
    """What the flags ask for.

    Attributes:
        request: what to relax, and with what statistics.
        options: how to run.
        save_path: where to.
        layout: the output's head and tokenizer files.
    """

    request: AimRequest
    options: RunOptions
    save_path: Path
    layout: Layout


def read_flags(arguments: argparse.Namespace, command: list[str]) -> Asked:
    """Everything the flags say. Raises Refusals: every flag that is wrong."""
    from aim.reading import make_request

    problems = Problems()
    device, options, save_path = shell.read_run(arguments, command, problems)
    if arguments.seed is not None and not aim_flags.draws(arguments):
        drawing = f"{setting('control', 'permuted')} and {setting('control', 'random')}"
        problems.add(ArgumentError(f"{setting('seed')}: nothing is drawn but by {drawing}. Leave it out."))
    given = aim_flags.read_flags(arguments)
    request = problems.attempt(lambda: make_request(given, shell.device_of_models(device)))
    layout = problems.attempt(lambda: read_layout(arguments))
    if request and save_path:
        with problems.collect():
            request.check_kept(save_path)
    problems.raise_if_any()
    assert request is not None
    assert options is not None
    assert save_path is not None
    assert layout is not None
    return Asked(request, options, save_path, layout)


def read_layout(arguments: argparse.Namespace) -> Layout:
    """The output's vocabulary, head and tokenizer files. Raises InputError where a flag is wrong."""
    from aim.relax_work import layout_of

    tie = parse_yes_or_no("tie_word_embeddings", arguments.tie_word_embeddings)
    more = {
        "chat_template": arguments.chat_template,
        "copy_tokenizer_from": arguments.copy_tokenizer_from,
        "allow_config_difference": arguments.allow_config_difference,
    }
    return layout_of(arguments.numerics or "float32", arguments.new_token_rows, tie_word_embeddings=tie, **more)
