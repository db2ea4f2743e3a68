"""Evaluate a checkpoint on the AIM paper's six benchmarks, or grade answers that are there already.

    python evaluate_model.py --model ./DARE_TIES_AIM_InstructMathCode --profile paper --save_path results/merged.json
    python evaluate_model.py --model ./merged --benchmarks gsm8k,humaneval --limit 50 --backend hf --data_dir ./benchmarks

Programs that the model wrote run only in a sandbox. docs/evaluation.md says how each benchmark is run and what is comparable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoints.errors import ArgumentError
from checkpoints.screen import say
from checkpoints.settings import shown
from commands import shell
from commands.command_line import Parser, show_flag
from evaluation.benchmarks import MATHS, PAPER


def build_parser() -> Parser:
    """The flags of evaluate_model.py."""
    parser = Parser(prog="evaluate_model.py", description=__doc__)
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--model", common=True, metavar="MODEL", help="a folder, a hub name or NAME@REVISION")
    what.add_argument(
        "--benchmarks", common=True, metavar="A,B,C", help=f"any of {', '.join(PAPER)} (default: all six)"
    )
    what.add_argument("--math_benchmarks", metavar="A,B", help=f"which of {' and '.join(MATHS)} run, whatever --benchmarks says; empty for none")  # fmt: skip
    what.add_argument("--mmlu_pro", action="store_true", help="MMLU-Pro too, which is no column of the paper's table")
    what.add_argument("--tasks_file", metavar="FILE", help="names of more lm_eval tasks, one on each line")
    what.add_argument("--limit", common=True, type=int, metavar="N", help="only N rows of each benchmark; the results say that they are partial")  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", common=True, metavar="FOLDER", help="local copies of the data, which need no network: files such as gsm8k.jsonl, or the hub's layout (default: the hub and its cache)")  # fmt: skip
    data.add_argument("--fetch_data", common=True, action="store_true", help="download the data of the benchmarks, into --data_dir where it is given, and stop")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--profile", common=True, default="fixed", metavar="NAME", help="fixed (default: BOS as the tokenizer says, 512 tokens for MBPP) or paper (the paper's settings to the letter)")  # fmt: skip
    how.add_argument("--apply_chat_template", common=True, action="store_true", help="wrap prompts in the tokenizer's chat template; math and gsm8k never are")  # fmt: skip
    how.add_argument("--math_prompt_type", default="wcot", metavar="NAME", help="prompt of math and gsm8k (default wcot, the paper's; docs/evaluation.md lists the others)")  # fmt: skip
    how.add_argument("--math_max_tokens", type=int, default=1024, metavar="N", help="new tokens for math and gsm8k (default 1024)")  # fmt: skip
    how.add_argument("--think_end", metavar="MARK", help="grade what follows the last MARK of a response, such as '</think>'; without it the answer is empty (default: grade whole responses)")  # fmt: skip
    how.add_argument("--seed", type=int, default=1234, metavar="N", help="of the backend; decoding is greedy (default 1234)")  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument("--backend", common=True, default="auto", metavar="NAME", help="auto (vllm where there is a GPU and it is installed, else hf; default), vllm or hf")  # fmt: skip
    running.add_argument("--n_gpu", common=True, type=int, metavar="N", help="GPUs to spread the model over; 0 for the CPU (default: all that divide its heads)")  # fmt: skip
    running.add_argument("--dtype", common=True, default="bfloat16", metavar="DTYPE", help="bfloat16 (default, the paper's), float16, float32 or auto (the checkpoint's)")  # fmt: skip
    running.add_argument("--max_model_len", type=int, default=4096, metavar="N", help="the window in tokens, where the model's own is not smaller (default 4096, the paper's)")  # fmt: skip
    running.add_argument("--batch_size", default="auto", metavar="N", help="prompts at once (default auto)")
    running.add_argument("--trust_remote_code", action="store_true", help="let Python code that comes with a model run (default: off)")  # fmt: skip
    running.add_argument("--unsafe_code_execution", action="store_true", help="run what the model wrote WITHOUT a sandbox where none works here; recorded in the results")  # fmt: skip
    running.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    stages = parser.add_argument_group("stages")
    stages.add_argument("--stage", default="all", metavar="WHAT", help="all (default), generate (answers only) or score (grade --responses without a model)")  # fmt: skip
    stages.add_argument("--responses", metavar="FILE", help='JSON Lines of {"benchmark", "index", "response"}: read by --stage score, written by --stage generate')  # fmt: skip
    stages.add_argument("--resume", common=True, action="store_true", help="go on with what --save_path holds")
    output = parser.add_argument_group("output")
    output.add_argument("--save_path", common=True, metavar="FILE.json", help="results (default results/MODEL_TIMESTAMP.json); responses and samples are written beside it")  # fmt: skip
    output.add_argument("--log_samples", action=argparse.BooleanOptionalAction, default=True, help="write every prompt, response and grade to FILE.samples.jsonl")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return shell.run(parser, lambda arguments: run(arguments, shell.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> request -> results, or -> data."""
    if arguments.fetch_data:
        fetch(arguments)
        return
    from evaluation.prepare import prepare
    from evaluation.request import make_request
    from evaluation.run import run as run_prepared
    from evaluation.table import format_table

    flags = {key: value for key, value in vars(arguments).items() if key != "fetch_data"}
    prepared = prepare(make_request(**flags, command=command))
    if not arguments.quiet:
        for note in prepared.notes:
            say(f"note: {shown(note, show_flag)}")
    outcome = run_prepared(prepared)
    if not arguments.quiet:
        print(format_table(outcome.results))
        print(f"{outcome.save_path}: results written.")


def fetch(arguments: argparse.Namespace) -> None:
    """Download the data of the benchmarks."""
    from evaluation.benchmarks import get_benchmark
    from evaluation.fetch import fetch_data
    from evaluation.request import choose_benchmarks

    if arguments.model is not None:
        raise ArgumentError("--fetch_data: fetches data and stops. Leave --model out.")
    names = choose_benchmarks(arguments.benchmarks, arguments.math_benchmarks, arguments.mmlu_pro)
    folder = Path(arguments.data_dir).expanduser() if arguments.data_dir else None
    for line in fetch_data([get_benchmark(name) for name in names], folder, quiet=arguments.quiet):
        print(line)
