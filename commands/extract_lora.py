"""Make a LoRA adapter of what a fine-tuned model adds to its base.

python extract_lora.py --model ./math --base_model ./base --rank 32 --save_path ./math-lora
python extract_lora.py --model ./math --base_model ./base --energy 0.95 --modules_to_save embed_tokens,norm --save_path ./math-lora
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import ArgumentError
from checkpoints.problems import Problems
from checkpoints.settings import setting, shown
from commands import shell
from commands.command_line import Parser, parse_choice, parse_save_path, positive, show_flag

if TYPE_CHECKING:
    from adapters.extraction import Extraction, ExtractOptions
    from adapters.low_rank import LoraChoice
    from checkpoints.upload import Upload
    from streaming.log import Log

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> Parser:
    """The flags of extract_lora.py."""
    parser = Parser(prog="extract_lora.py", description=__doc__)
    what = parser.add_argument_group("what to extract")
    what.add_argument("--model", required=True, metavar="MODEL", help="the fine-tuned model: a folder, a hub name or NAME@REVISION")  # fmt: skip
    what.add_argument(
        "--base_model", required=True, metavar="MODEL", help="what it was fine-tuned from; the adapter goes on this"
    )
    what.add_argument("--save_path", required=True, metavar="FOLDER", help="the adapter; appears when it is complete")
    what.add_argument("--rank", common=True, type=positive, metavar="N", help="directions kept of each matrix at most (default 16, with --energy none)")  # fmt: skip
    what.add_argument("--energy", common=True, type=float, metavar="E", help="keep as many directions of each matrix as hold this share of the squares of its change, such as 0.95")  # fmt: skip
    what.add_argument("--modules_to_save", common=True, metavar="A,B", help="modules that are stored whole where they changed, by the ends of their names, such as embed_tokens,norm; bias for all biases; all for everything that is no matrix product (default: none; what is lost is reported)")  # fmt: skip
    what.add_argument("--dtype", common=True, default="float32", metavar="DTYPE", help="of the factors: float32 (default), bfloat16 or float16")  # fmt: skip
    what.add_argument(
        "--overwrite",
        common=True,
        action="store_true",
        help="replace SAVE_PATH where it holds an earlier result, and so the repo of --push_to_hub",
    )
    shell.add_hub_flags(what)
    what.add_argument("--no_resume", action="store_true", help="begin anew where an interrupted run left something to go on with")  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", metavar="DEVICE", help="where matrices are taken apart: auto (a GPU where there is one; default), cpu, cuda or cuda:1")  # fmt: skip
    shell.add_running_flags(running)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return shell.run(parser, lambda arguments: run(arguments, shell.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> choice -> matched models -> adapter."""
    with shell.refusals_as_json(arguments):
        from adapters.extraction import prepare

        choice, options, save_path = read_flags(arguments, command)
        upload = shell.read_upload(arguments, [""])
        extraction = prepare(
            arguments.base_model, arguments.model, choice, save_path, options, download=not arguments.dry_run
        )
        carry_out(extraction, upload, arguments)


def carry_out(
    extraction: Extraction, upload: Upload | None, arguments: argparse.Namespace, log: Log | None = None
) -> None:
    """Write an adapter and push it, or print its plan under `--dry_run`. Raises InputError as `Extraction.run`, `Upload.push`."""
    if arguments.dry_run:
        extraction.close()
        if extraction.complete:
            print(extraction.complete)
        elif arguments.json:
            plan = extraction.as_json() | ({"push_to_hub": upload.as_json(extraction.inputs)} if upload else {})
            print(json.dumps(shown(plan, show_flag), indent=2, ensure_ascii=False))
        else:
            print(extraction.as_text(show_flag))
            if upload:
                print(upload.as_text(extraction.inputs))
        return
    console = shell.speaker(quiet=arguments.quiet, log=log)
    if log is not None and not extraction.complete:
        log("plan", **shown(extraction.as_json(), console.show))
    extracted = extraction.run(console)
    for warning in extracted.warnings:
        console.warn(warning)
    if extracted.was_complete:
        print(extracted.message)
    else:
        console.say(
            f"{extracted.save_path}: written. It goes on the base as {extraction.base.label}+{extracted.save_path}"
        )
    shell.push(upload, extracted.save_path, console, quiet=arguments.quiet, log=log)


def read_flags(arguments: argparse.Namespace, command: list[str]) -> tuple[LoraChoice, ExtractOptions, Path]:
    """Everything the flags say. Raises Refusals: every flag that is wrong."""
    from adapters.extraction import ExtractOptions

    problems = Problems()
    device = problems.attempt(lambda: shell.parse_device(arguments.device)) or shell.gpu_or_cpu()
    save_path = problems.attempt(lambda: parse_save_path(arguments.save_path))
    problems.attempt(lambda: shell.check_public(arguments))
    choice = problems.attempt(lambda: read_choice(arguments))
    problems.raise_if_any()
    assert choice is not None
    assert save_path is not None
    options = ExtractOptions(
        device=device,
        overwrite=arguments.overwrite,
        resume=not arguments.no_resume,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        command=command,
    )
    return choice, options, save_path


def read_choice(arguments: argparse.Namespace) -> LoraChoice:
    """Ranks, what is stored whole, dtype. Raises ArgumentError where a flag is wrong."""
    from adapters.low_rank import LoraChoice
    from checkpoints.source import FLOAT_DTYPES

    names = [] if arguments.modules_to_save is None else [part.strip() for part in arguments.modules_to_save.split(",")]
    if not all(names):
        raise ArgumentError(
            f"{setting('modules_to_save')}: expected names separated by commas, got {arguments.modules_to_save!r}."
        )
    dtype = FLOAT_DTYPES[parse_choice("out_dtype", arguments.dtype, DTYPES)]
    return LoraChoice(arguments.rank, arguments.energy, tuple(names), dtype)
