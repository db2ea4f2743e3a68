"""GSM8K: 1319 word problems with whole-number answers.

Source: openai/grade-school-math, the test set; an answer ends in `#### N`.
"""

from __future__ import annotations

import re
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
    text_field,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.benchmarks.wcot import GRADER_NOTE, grade_answers, wcot_generation, wcot_tasks
from evaluation.grading.tools import Tools


class Gsm8k(Benchmark):
    name = "gsm8k"
    dataset = HubDataset("openai/gsm8k", {"test": "main/test-*.parquet"})
    files = ("gsm8k.jsonl",)
    size = 1319
    harness = False
    grader = "math-verify"
    notes = (GRADER_NOTE,)

    def read_row(self, row: Row) -> dict[str, Any]:
        answer = text_field(row, "answer")
        match = re.search(r"####\s*(-?[\d,]*\.?\d+)\s*$", answer)
        if not match:
            raise BadRow(f"expected 'answer' to end in '#### N', got {answer[-60:]!r}")
        return {"question": text_field(row, "question"), "target": match[1].replace(",", ""), "solution": answer}

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

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        return grade_answers(rows, responses, tools, advance, "number")
