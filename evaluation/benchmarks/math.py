"""MATH: 5000 competition problems; the last boxed expression of a response against that of the published solution.

Source: hendrycks/math, all of the test set (not MATH-500: the paper's numbers fit 5000 only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.benchmarks.contract import (
    BadRow,
    Benchmark,
    Generation,
    Grade,
    HubDataset,
    Response,
    Row,
    TaskRows,
    spread,
    text_field,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.benchmarks.wcot import GRADER_NOTE, grade_answers, wcot_generation, wcot_tasks
from evaluation.grading.answers import last_boxed
from evaluation.grading.tools import Tools


class Math(Benchmark):
    name = "math"
    dataset = HubDataset("EleutherAI/hendrycks_math", {"test": "*/test-*.parquet"})
    files = ("math.jsonl",)
    size = 5000
    harness = False
    grader = "math-verify"
    notes = (GRADER_NOTE,)

    def read_row(self, row: Row) -> dict[str, Any]:
        solution = text_field(row, "solution")
        answer = last_boxed(solution)
        if not answer:
            raise BadRow(f"expected an answer in \\boxed{{}} in 'solution', got {solution[-60:]!r}")
        return {
            "question": text_field(row, "problem"),
            "target": answer,
            "solution": solution,
            "subject": text_field(row, "type") if "type" in row else "",
        }

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        return wcot_tasks(self.name, rows, settings)

    def generation(self, settings: Settings) -> Generation:
        return wcot_generation(settings)

    def reference(self, row: Row, settings: Settings) -> str:
        return f" {row['solution']}"

    def uses_chat_template(self, settings: Settings) -> bool:
        return False

    def first(self, rows: Sequence[Row], limit: int) -> list[int]:
        return spread([row["subject"] for row in rows], limit)

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        return grade_answers(rows, responses, tools, advance, "math")
