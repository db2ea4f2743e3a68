"""Run all tiny models, or some, each in a process of its own; and write the table of docs/architectures.md.

    python -m tests.architectures.sweep [--only NAME ...] [--kinds causal,image] [--results FILE] [--table docs/architectures.md]

NAME is a class or a model type. What is in FILE already is not run again. Ends with 1 where a class is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.architectures.one_class import Outcome, look_at
from tests.architectures.tiny import KINDS, Tiny, tiny_models

LIMIT_S = 300
"""Seconds for one class."""


def run(tiny: Tiny) -> Outcome:
    """`look_at` in a child process, which may do what it likes to its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(LIMIT_S)
        try:
            with tempfile.TemporaryDirectory(prefix="architecture_") as folder:
                outcome = look_at(tiny, Path(folder))
        except BaseException:  # a traceback of ours, which is what the sweep looks for
            outcome = Outcome(tiny.kind, tiny.model_type, tiny.name, merged=f"failed: {traceback.format_exc()[-1500:]}")
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump(outcome.as_json(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return Outcome(tiny.kind, tiny.model_type, tiny.name, merged=f"failed: the process ended with {status}")
    return Outcome(**json.loads(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args(argv)
    _quieten()
    warm_up()
    known = read_results(arguments.results)
    outcomes: list[Outcome] = []
    for tiny in tiny_models():
        if tiny.kind not in arguments.kinds.split(","):
            continue
        if arguments.only and not {tiny.name, tiny.model_type} & set(arguments.only):
            continue
        outcome = known.get((tiny.kind, tiny.model_type, tiny.name)) or run(tiny)
        outcomes.append(outcome)
        print(line_of(outcome), flush=True)
        if arguments.results and (outcome.kind, outcome.model_type, outcome.name) not in known:
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome.as_json()) + "\n")
    built = [outcome for outcome in outcomes if not outcome.built]
    right = sum(outcome.right for outcome in built)
    print(f"{right} right of {len(built)}, {len(outcomes) - len(built)} not built")
    if (
        arguments.table and not arguments.only and arguments.kinds == ",".join(KINDS)
    ):  # a page of some would hide the others
        arguments.table.write_text(page(outcomes), encoding="utf-8")
    return int(right < len(built))


def _quieten() -> None:
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def warm_up() -> None:
    """Load in this process, once, what every class needs."""
    with tempfile.TemporaryDirectory(prefix="architecture_") as folder:
        look_at(next(tiny for tiny in tiny_models() if tiny.model_type == "llama"), Path(folder))


def read_results(path: Path | None) -> dict[tuple[str, str, str], Outcome]:
    """What an earlier run left."""
    if path is None or not path.exists():
        return {}
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["kind"], row["model_type"], row["name"]): Outcome(**row) for row in rows}


def line_of(outcome: Outcome) -> str:
    """One line for people."""
    if outcome.built:
        return f"not built {outcome.kind:7} {outcome.model_type:26} {outcome.name:42} {outcome.built}"
    words = [outcome.merged] if outcome.merged else []
    words += [f"refused: {outcome.refusal}"] if outcome.refusal else [f"{outcome.relaxed} relaxed"]
    words += [f"{len(some)} {what}: {some[0]}" for what, some in (("wrong", outcome.wrong), ("left", outcome.left)) if some]  # fmt: skip
    words += [] if outcome.runs == "yes" or outcome.refusal else [f"runs: {outcome.runs}"]
    verdict = "right" if outcome.right else "WRONG"
    return f"{verdict} {outcome.kind:7} {outcome.model_type:26} {outcome.name:42} {outcome.seconds:5.1f} s  {'; '.join(words)[:400]}"


def page(outcomes: Iterable[Outcome]) -> str:
    """docs/architectures.md."""
    from importlib import metadata

    outcomes = list(outcomes)
    absent = [outcome for outcome in outcomes if outcome.built]
    outcomes = [outcome for outcome in outcomes if not outcome.built]
    lines = [
        "# Architectures",
        "",
        "```sh slow",
        'make architectures ARCHITECTURES_ARGS="--only zamba2"',
        "```",
        "",
        "does for one class what this page says of all.",
        "",
        f"`make architectures` builds a tiny model of each class that transformers {metadata.version('transformers')} has for text (its causal, image-and-text,",
        "encoder-decoder and masked classes), merges two fine-tunes of it, runs it, and relaxes the merge. What is relaxed is held against a",
        "measurement that knows no names and no modules: all numbers of a tiny model differ, so that every operand of a matrix product says by",
        "its numbers which elements of which parameter it has. *Merged* means equal to the formula, tensor by tensor. *Relaxed* means that every tensor of which",
        "a product of the forward pass has a part is relaxed by the mean |x| that was measured; the number is that of such tensors.",
        "*Refused* means one message that says why, and a merge without AIM. Left out are classes that join any two models (EncoderDecoderModel,",
        "VisionEncoderDecoderModel), NeoMMEForMaskedLM, and those at the end of this page. This page is written by `make architectures`.",
        "",
        "| classes | all | merged | run on plain text | relaxed | refused by AIM |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, label in KINDS.items():
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = [
            len(some),
            sum(not outcome.merged for outcome in some),
            sum(outcome.runs == "yes" for outcome in some),
            sum(not outcome.refusal and outcome.right for outcome in some),
            sum(bool(outcome.refusal) for outcome in some),
        ]
        lines.append(f"| {label} | {' | '.join(map(str, counts))} |")
    wrong = [outcome for outcome in outcomes if not outcome.right]
    lines += ["", f"{len(outcomes) - len(wrong)} of {len(outcomes)} are right.", ""]
    if wrong:
        lines += ["Not right:", "", *(f"- `{one.name}`: {(one.merged or one.refusal or (one.wrong + one.left)[0]).splitlines()[-1]}" for one in wrong), ""]  # fmt: skip
    for kind, label in KINDS.items():
        lines += [f"## {label[0].upper()}{label[1:]}", "", "| model type | class | AIM |", "|---|---|---|"]
        lines += [f"| {one.model_type} | {one.name} | {_cell(one)} |" for one in outcomes if one.kind == kind]
        lines.append("")
    if absent:
        lines += ["## Not built", ""]
        lines += [f"- {one.name} ({one.model_type}): {one.built.splitlines()[0]}" for one in absent] + [""]
    return "\n".join(lines[:-1]) + "\n"


def _cell(outcome: Outcome) -> str:
    if outcome.merged:
        return "not merged"
    if not outcome.refusal:
        return f"{outcome.relaxed} tensors relaxed" if outcome.right else "relaxed in part"
    _, _, reason = outcome.refusal.partition("/base: ")
    reason = reason.replace("|", "\\|").replace("\n", " ")
    if reason.startswith("expected a causal language model"):
        return "refused: no language model that reads plain text from left to right"
    error = reason.partition(f"a {outcome.name} cannot be run on plain text: ")[2] or reason
    return f"refused, as it does not run on plain text: {error.partition(' Merge without AIM')[0]}"


if __name__ == "__main__":
    sys.exit(main())
