"""IFEval: 541 prompts with 834 instructions that a program can verify.

Source: google-research instruction_following_eval; prompts and verifiers of lm_eval 0.4.13's `ifeval`. All four published
metrics are given. The score is the mean of the two strict ones, the usual reading of "the" IFEval number; the paper does not
say which one it prints, and k/541 and k/834 both fit too few of its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.benchmarks.contract import (
    BadRow,
    Benchmark,
    Generation,
    Grade,
    HubDataset,
    Metric,
    Response,
    Row,
    Status,
    TaskRows,
    list_field,
    mean,
    text_field,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.tools import Tools

SCORE = "mean_strict_acc"
INSTRUCTIONS = frozenset(
    f"{group}:{name}"
    for group, names in {
        "change_case": "capital_word_frequency english_capital english_lowercase",
        "combination": "repeat_prompt two_responses",
        "detectable_content": "number_placeholders postscript",
        "detectable_format": "constrained_response json_format multiple_sections number_bullet_lists "
        "number_highlighted_sections title",
        "keywords": "existence forbidden_words frequency letter_frequency",
        "language": "response_language",
        "length_constraints": "nth_paragraph_first_word number_paragraphs number_sentences number_words",
        "punctuation": "no_comma",
        "startend": "end_checker quotation",
    }.items()
    for name in names.split()
)


class IfEval(Benchmark):
    name = "ifeval"
    dataset = HubDataset("google/IFEval", {"test": "ifeval_input_data.jsonl"})
    files = ("ifeval.jsonl",)
    size = 541
    metric = SCORE
    grader = "lm_eval ifeval"
    notes = ("the score is the mean of the two strict accuracies; the paper does not name its IFEval metric",)

    def read_row(self, row: Row) -> dict[str, Any]:
        ids = list_field(row, "instruction_id_list", str)
        kwargs = list_field(row, "kwargs", dict, len(ids))
        unknown = sorted(set(ids) - INSTRUCTIONS)
        if unknown:
            raise BadRow(f"expected known instructions in 'instruction_id_list', got {unknown[0]!r}")
        # Where the data comes from Parquet, every dictionary has all keys, most of them None.
        given = [{key: value for key, value in entry.items() if value is not None} for entry in kwargs]
        return {
            "key": row.get("key"),
            "prompt": text_field(row, "prompt"),
            "instruction_id_list": ids,
            "kwargs": given,
        }

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        return [TaskRows({"task": self.name, "doc_to_text": "prompt", "doc_to_target": "", "num_fewshot": 0}, rows)]

    def generation(self, settings: Settings) -> Generation:
        return Generation(1280, ())

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        items = [(row, response.text) for row, response in zip(rows, responses, strict=True)]
        grades: list[Grade] = []
        for row, outcome in zip(rows, tools.check_instructions(items, advance), strict=True):
            checks = outcome.result if outcome.status == "done" else self.unanswered(row).extra
            strict: list[bool] = checks["strict"]
            followed = all(strict)
            status: Status = "right" if followed else "wrong" if outcome.status == "done" else outcome.status
            share = (float(followed) + sum(strict) / len(strict)) / 2
            grades.append(Grade(share, status, detail=outcome.detail, extra=checks))
        return grades

    def unanswered(self, row: Row) -> Grade:
        nothing = [False] * len(row["instruction_id_list"])
        return replace(super().unanswered(row), extra={"strict": nothing, "loose": nothing})

    def metrics(self, grades: Sequence[Grade]) -> dict[str, Metric]:
        """The mean of the two strict metrics, then the four."""
        checks = [grade.extra for grade in grades]
        four = {
            f"{level}_level_{kind}_acc": (_prompts if level == "prompt" else _instructions)([c[kind] for c in checks])
            for kind in ("strict", "loose")
            for level in ("prompt", "inst")
        }
        return {SCORE: _mean_of_both([c["strict"] for c in checks]), **four}


def _prompts(checks: Sequence[Sequence[bool]]) -> Metric:
    return mean([float(all(followed)) for followed in checks])


def _instructions(checks: Sequence[Sequence[bool]]) -> Metric:
    """The share of instructions followed; prompts are the clusters of its standard error."""
    return _ratio(checks, [0.0] * len(checks), weight=1.0)


def _mean_of_both(checks: Sequence[Sequence[bool]]) -> Metric:
    return _ratio(checks, [float(all(followed)) for followed in checks], weight=0.5)


def _ratio(checks: Sequence[Sequence[bool]], prompts: Sequence[float], weight: float) -> Metric:
    """weight * followed / asked over all instructions, plus (1 - weight) * mean(prompts); both vary by prompt.

    The standard error is that of the mean of each prompt's linear influence on the value (the delta method).
    """
    asked = sum(len(followed) for followed in checks)
    share = sum(sum(followed) for followed in checks) / asked
    average = asked / len(checks)
    influence = [
        (1 - weight) * prompt + weight * (share + (sum(followed) - share * len(followed)) / average)
        for prompt, followed in zip(prompts, checks, strict=True)
    ]
    value = weight * share + (1 - weight) * math.fsum(prompts) / len(prompts)
    return Metric(value, mean(influence).stderr)
