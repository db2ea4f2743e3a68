"""Find the merge that is best for some texts: method, weights, lambda, density and AIM, without a checkpoint per candidate.

    python tune_merge.py --base_model ./base --models_to_merge ./math,./code --texts math=math.jsonl,code=code.jsonl \\
        --trials 60 --study ./study --save_path ./best
    python tune_merge.py --base_model ./base --models_to_merge ./math,./code --benchmarks gsm8k,humaneval --trials 30 --study ./study
    python tune_merge.py --config recipe.yml --texts math.jsonl,code.jsonl --goal loss,worst --minutes 30 --study ./study
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError
from checkpoints.problems import Problems
from checkpoints.settings import setting, shown
from commands import shell
from commands.command_line import Parser, parse_choice, parse_save_path, positive, show_flag, whole

if TYPE_CHECKING:
    from search.request import SearchRequest
    from search.study import Budget

METHODS = "task_arithmetic,ties,dare_ties"


def build_parser() -> Parser:
    """The flags of tune_merge.py."""
    parser = Parser(prog="tune_merge.py", description=__doc__)
    what = parser.add_argument_group("what to search")
    what.add_argument("--config", common=True, metavar="FILE", help="a recipe with free entries, such as lambda: {search: [0.2, 1.2]} or merge_method: {search: [ties, dare_ties]} (docs/tuning.md)")  # fmt: skip
    what.add_argument(
        "--base_model", common=True, metavar="MODEL", help="instead of --config: what the models were fine-tuned from"
    )
    what.add_argument("--models_to_merge", common=True, metavar="A,B,C", help="and the models; folders, hub names, adapters as BASE+ADAPTER")  # fmt: skip
    what.add_argument("--methods", common=True, metavar="M,M", help=f"methods to choose from (default {METHODS}), with weight, lambda and density of each, and of regmean ridge and rest_lambda")  # fmt: skip
    what.add_argument("--calibration_data", common=True, metavar="DATA", help="text for AIM's statistics of the base, as in merge.py: searches omega and protect too")  # fmt: skip
    what.add_argument("--model_data", metavar="A,B,C", help="with methods that run the models (regmean): text of each model's own task, in the order of the models, as in merge.py (default: what is searched with of the task of its name, or in its place)")  # fmt: skip
    goal = parser.add_argument_group("what for")
    goal.add_argument("--texts", common=True, metavar="NAME=FILE,...", help="a file for each task, .jsonl, .json, .txt or .parquet: of texts, or of prompt and answer, of which the answer is scored")  # fmt: skip
    goal.add_argument("--benchmarks", common=True, metavar="A,B", help="tasks that are benchmarks of evaluate_model.py: their items are answered and graded for accuracy, their reference answers have the losses")  # fmt: skip
    goal.add_argument("--data_dir", metavar="FOLDER", help="local copies of the benchmarks' data, as in evaluate_model.py (default: the hub and its cache)")  # fmt: skip
    goal.add_argument("--apply_chat_template", action="store_true", help="wrap prompts of benchmarks in the base's chat template, as in evaluate_model.py")  # fmt: skip
    goal.add_argument("--math_max_tokens", type=positive, default=1024, metavar="N", help="new tokens for the benchmarks math and gsm8k (default 1024)")  # fmt: skip
    goal.add_argument("--goal", common=True, metavar="G", help="loss (mean over tasks; default with --texts), worst (the worst task's loss), hypervolume (gain over the inputs), accuracy (mean over --benchmarks; default without --texts), accuracy:NAME (of one), accuracy_hypervolume; several, such as loss,worst, give a Pareto front")  # fmt: skip
    goal.add_argument("--held_out", type=float, default=0.5, metavar="S", help="share of the texts that nothing is chosen by, split by content (default 0.5)")  # fmt: skip
    goal.add_argument("--documents", type=positive, default=16, metavar="N", help="texts of a task on either side at most (default 16)")  # fmt: skip
    how = parser.add_argument_group("how long, and where to")
    how.add_argument("--trials", common=True, type=positive, metavar="N", help="finished trials, of all processes and runs together")  # fmt: skip
    how.add_argument(
        "--minutes", common=True, type=float, metavar="M", help="of this run; the comparison at the end comes on top"
    )
    how.add_argument("--study", required=True, metavar="FOLDER", help="journal, trials.csv, recipe.yml, report and figures; the same command goes on with it, and several may share it")  # fmt: skip
    how.add_argument("--save_path", common=True, metavar="FOLDER", help="write the best merge as a checkpoint, too")
    how.add_argument("--seed", type=whole, default=0, metavar="N", help="of what is drawn (default 0)")
    how.add_argument("--early_stopping", action=argparse.BooleanOptionalAction, default=None, help="give up candidates that fare badly on a quarter or half of the texts (default: with one goal)")  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", metavar="DEVICE", help="auto (a GPU where there is one; default), cpu, cuda or cuda:1")  # fmt: skip
    running.add_argument("--mode", default="auto", metavar="M", help="whole (the model in memory), layerwise (one layer of it at a time, merged when its turn comes) or auto (what fits; default)")  # fmt: skip
    running.add_argument("--workers", type=positive, metavar="N", help="threads for weights (default: one per core)")  # fmt: skip
    shell.add_running_flags(
        running,
        code=shell.OWN_CODE,
        dry_run="say what will be searched, and how long a trial takes, or every refusal; write nothing",
        plan="what will be searched",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    return shell.run(parser, lambda arguments: run(arguments, shell.command(parser, argv)), argv)


def run(arguments: argparse.Namespace, command: list[str]) -> None:
    """Flags -> request -> search -> report."""
    with shell.refusals_as_json(arguments):
        request = read_flags(arguments, command)
        from search.run import prepare, time_one
        from search.run import run as search

        console = shell.speaker(quiet=arguments.quiet)
        prepared = prepare(request)
        if arguments.dry_run:
            if arguments.json:
                prepared.close()
                print(json.dumps(shown(prepared.as_json(), show_flag), indent=2, ensure_ascii=False))
            else:
                print(prepared.as_text())
                print(time_one(prepared, console))
            return
        console.note(prepared.as_text())
        outcome = search(prepared, console)
        console.say(
            f"{outcome.folder / 'recipe.yml'}: the best recipe; report.md, trials.csv and figures lie beside it"
        )


def read_flags(arguments: argparse.Namespace, command: list[str]) -> SearchRequest:
    """Everything the flags say. Raises Refusals: every flag that is wrong."""
    from evaluation.benchmarks.settings import Settings
    from search.goals import read_goals
    from search.request import SearchRequest
    from search.texts import parse_texts

    problems = Problems()
    device = problems.attempt(lambda: shell.parse_device(arguments.device)) or shell.gpu_or_cpu()
    folder = problems.attempt(lambda: read_folder(arguments.study))
    save_path = problems.attempt(lambda: parse_save_path(arguments.save_path)) if arguments.save_path is not None else None  # fmt: skip
    tree = problems.attempt(lambda: read_tree(arguments))
    texts = problems.attempt(lambda: parse_texts(arguments.texts)) if arguments.texts is not None else {}
    benchmarks = problems.attempt(lambda: read_benchmarks(arguments)) or ()
    goals = problems.attempt(lambda: read_goals(arguments.goal or ("accuracy" if arguments.texts is None else "loss")))
    budget = problems.attempt(lambda: read_budget(arguments))
    if goals and len(goals) > 1 and arguments.early_stopping:
        problems.add(
            ArgumentError(
                f"{setting('early_stopping')}: works with one goal only: of several, there is no one number by which a candidate fares badly. Leave it out."
            )
        )
    mode: Any = problems.attempt(lambda: parse_choice("mode", arguments.mode, ("auto", "whole", "layerwise")))
    problems.raise_if_any()
    assert tree is not None
    assert texts is not None
    assert goals is not None
    assert budget is not None
    assert folder is not None
    return SearchRequest(
        tree=tree,
        texts=texts,
        benchmarks=benchmarks,
        data_dir=Path(arguments.data_dir).expanduser() if arguments.data_dir else None,
        evaluation=Settings(chat=arguments.apply_chat_template, math_max_tokens=arguments.math_max_tokens),
        folder=folder,
        budget=budget,
        goals=goals,
        where=arguments.config or "the flags",
        save_path=save_path,
        held_out=arguments.held_out,
        documents=arguments.documents,
        seed=arguments.seed,
        stops_early=len(goals) == 1 if arguments.early_stopping is None else arguments.early_stopping,
        mode=mode,
        device=device,
        workers=arguments.workers,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        command=command,
    )


def read_benchmarks(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The benchmarks of `--benchmarks`, which the flags of how they are asked need. Raises ArgumentError."""
    from evaluation.request import choose_benchmarks

    if arguments.benchmarks is None:
        given = [name for name in ("data_dir", "apply_chat_template") if vars(arguments)[name]]
        if given:
            raise ArgumentError(f"--{given[0]}: is about {setting('benchmarks')}. Name some, or leave it out.")
        return ()
    data_dir = arguments.data_dir
    if data_dir and not Path(data_dir).expanduser().is_dir():
        raise ArgumentError(f"{setting('data_dir', data_dir)}: no such folder.")
    return choose_benchmarks(arguments.benchmarks, None, False)


def read_folder(text: str) -> Path:
    """The folder of `--study`. Raises ArgumentError: it is empty, or a file."""
    folder = Path(text).expanduser()
    if not text.strip() or (folder.exists() and not folder.is_dir()):
        raise ArgumentError(f"{setting('study')}: expected a folder, got {text!r}. Name one.")
    return folder


def read_budget(arguments: argparse.Namespace) -> Budget:
    """When the search ends. Raises ArgumentError."""
    from search.study import Budget

    return Budget(arguments.trials, arguments.minutes)


def read_tree(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The recipe with its free entries, from a file or from flags. Raises InputError."""
    beside = ("base_model", "models_to_merge", "methods", "calibration_data", "model_data")
    if arguments.config is not None:
        from merging.safe_yaml import read_documents

        for name in beside:
            if vars(arguments)[name] is not None:
                raise ArgumentError(
                    f"--{name}: {setting('config')} says what to search. Write it into the file, or leave one out."
                )
        content, *others = read_documents(Path(arguments.config).expanduser(), arguments.config) or [None]
        if not isinstance(content, dict) or others or "merges" in content:
            got = "several" if others or isinstance(content, dict) else "none"
            raise ArgumentError(
                f"{arguments.config}: expected one recipe with keys such as merge_method, got {got}. Give one."
            )
        return content
    from merging.methods import get_method
    from search.space import space_from_methods

    missing = [f"--{name}" for name in beside[:2] if vars(arguments)[name] is None]
    if missing:
        raise ArgumentError(f"{' and '.join(missing)}: expected {setting('config')}, or both of them. Add them.")
    methods = [part.strip() for part in (arguments.methods or METHODS).split(",")]
    models = [part.strip() for part in arguments.models_to_merge.split(",")]
    if not all(models) or len(set(methods)) < len(methods):
        raise ArgumentError(
            f"{setting('models') if not all(models) else '--methods'}: expected different names separated by commas."
        )
    data = [] if arguments.model_data is None else [part.strip() for part in arguments.model_data.split(",")]
    if data and not any(get_method(method).needs_data for method in methods):
        raise ArgumentError(
            f"{setting('model_data')}: none of {', '.join(methods)} runs the models. Add --methods regmean, or leave it out."
        )
    return space_from_methods(methods, arguments.base_model, models, calibration=arguments.calibration_data, data=data)
