"""MMLU: four choices, no examples; the letter with the highest loglikelihood is the answer.

Source: hendrycks/test, 57 subjects, 14042 questions; prompt and description of lm_eval 0.4.13's `mmlu`, which equals that of
the paper's time but for the data's address. The paper's program ran it without examples. The score is the mean over all
questions, which is lm_eval's mean over subjects weighted by size, and the standard error is lm_eval's pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.benchmarks.contract import (
    BadRow,
    Benchmark,
    Grade,
    HubDataset,
    Metric,
    Response,
    Row,
    Status,
    TaskRows,
    list_field,
    mean,
    spread,
    text_field,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.letters import read_letter
from evaluation.grading.tools import Tools


class Mmlu(Benchmark):
    name = "mmlu"
    dataset = HubDataset("cais/mmlu", {"test": "all/test-*.parquet"})
    files = ("mmlu.jsonl", "mmlu_stem.jsonl")
    size = 14042
    choices = ("A", "B", "C", "D")
    grader = "loglikelihood"

    def read_row(self, row: Row) -> dict[str, Any]:
        answer = row.get("answer")
        if isinstance(answer, str) and answer in self.choices:
            answer = self.choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(self.choices):
            raise BadRow(f"expected 0 to 3 or A to D in 'answer', got {answer!r:.60}")
        return {
            "question": text_field(row, "question"),
            "subject": text_field(row, "subject", "type").strip().replace(" ", "_"),
            "choices": list_field(row, "choices", str, 4),
            "answer": answer,
        }

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        by_subject: dict[str, list[tuple[int, Row]]] = {}
        for index, row in rows:
            by_subject.setdefault(row["subject"], []).append((index, row))
        return [TaskRows(self._config(subject), part) for subject, part in by_subject.items()]

    def _config(self, subject: str) -> dict[str, Any]:
        title = subject.replace("_", " ")
        return {
            "task": f"mmlu_{subject}",
            "output_type": "multiple_choice",
            "description": f"The following are multiple choice questions (with answers) about {title}.\n\n",
            "doc_to_text": question,
            "doc_to_choice": list(self.choices),
            "doc_to_target": "answer",
            "num_fewshot": 0,
        }

    def reference(self, row: Row, settings: Settings) -> str:
        return self.choices[row["answer"]]

    def first(self, rows: Sequence[Row], limit: int) -> list[int]:
        return spread([row["subject"] for row in rows], limit)

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        grades = []
        for row, response in zip(rows, responses, strict=True):
            letter = read_letter(response.text, self.choices)
            right = letter == self.choices[row["answer"]]
            status: Status = "no_answer" if letter is None else "right" if right else "wrong"
            grades.append(Grade(float(right), status, letter, extra={"subject": row["subject"]}))
            advance(1)
        return grades

    def unanswered(self, row: Row) -> Grade:
        return replace(super().unanswered(row), extra={"subject": row["subject"]})

    def metrics(self, grades: Sequence[Grade]) -> dict[str, Metric]:
        """`acc`, and `acc_SUBJECT` of every subject."""
        by_subject: dict[str, list[float]] = {}
        for grade in grades:
            by_subject.setdefault(grade.extra["subject"], []).append(grade.score)
        subjects = {f"acc_{subject}": mean(scores) for subject, scores in sorted(by_subject.items())}
        overall = mean([grade.score for grade in grades])
        return {"acc": Metric(overall.value, pooled_stderr(list(by_subject.values())) or overall.stderr), **subjects}


def question(row: Row) -> str:
    """Question and lettered choices."""
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(Mmlu.choices, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}Answer:"


def pooled_stderr(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean over all groups from the variance inside them, as lm_eval's `pooled_sample_stderr`."""
    count = sum(len(group) for group in groups)
    if count == len(groups):
        return None
    within = math.fsum(
        (value - math.fsum(group) / len(group)) ** 2 for group in groups for value in group if len(group) > 1
    )
    return math.sqrt(within / (count - len(groups)) / count)
