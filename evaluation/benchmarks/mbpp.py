"""MBPP: a Python function from a sentence and three asserts, after three worked examples; the asserts decide.

Source: google-research mbpp, the full set's test split; prompt, examples and stop string of lm_eval 0.4.13's `mbpp` (with a
chat template `mbpp_instruct`). Deviation: `test_setup_code` runs before the asserts, without which task 367 cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks.contract import (
    BadRow,
    Benchmark,
    Generation,
    Grade,
    HubDataset,
    Response,
    Row,
    TaskRows,
    list_field,
    text_field,
    until_stop,
)
from evaluation.benchmarks.mbpp_examples import EXAMPLES
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.code import fenced_block, grade_programs, names_taken
from evaluation.grading.tools import Tools

if TYPE_CHECKING:
    from evaluation.sandbox import Program

STOP = ("[DONE]",)


class Mbpp(Benchmark):
    name = "mbpp"
    dataset = HubDataset("google-research-datasets/mbpp", {"test": "full/test-*.parquet"})
    files = ("mbpp.jsonl",)
    size = 500
    shots = 3
    metric = "pass@1"
    runs_code = True
    grader = "sandbox"
    notes = ("test_setup_code runs before the asserts (the paper's program leaves it out: task 367)",)

    def read_row(self, row: Row) -> dict[str, Any]:
        tests = list_field(row, "test_list", str)
        if len(tests) < 3:
            raise BadRow(f"expected at least 3 asserts in 'test_list', got {len(tests)}")
        return {
            "task_id": row.get("task_id"),
            "text": text_field(row, "text"),
            "code": text_field(row, "code"),
            "test_list": tests,
            "test_setup_code": text_field(row, "test_setup_code", empty=True) if "test_setup_code" in row else "",
        }

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        instructed, closing = _instructed(settings), _closing(settings)
        config: dict[str, Any] = {
            "task": self.name,
            "num_fewshot": self.shots,
            "target_delimiter": "",
            "doc_to_text": instruct_question if instructed else question,
            "doc_to_target": lambda row: row["code"] + closing if "is_fewshot" in row else "",
            "fewshot_config": {"sampler": "first_n", "samples": EXAMPLES},
        }
        if instructed:
            config["gen_prefix"] = "\n```python\n"
        return [TaskRows(config, rows)]

    def generation(self, settings: Settings) -> Generation:
        # The paper's program sets no limit, so its backend's 256 tokens applied; longer solutions were cut.
        return Generation(256 if settings.profile == "paper" else 512, () if _instructed(settings) else STOP)

    def reference(self, row: Row, settings: Settings) -> str:
        return str(row["code"]) + _closing(settings)

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        sources = [program(response, tools.settings) for response in responses]
        return grade_programs([judged(row, source) for row, source in zip(rows, sources, strict=True)], tools, advance)


def judged(row: Row, source: str) -> Program:
    """A program with its test."""
    from evaluation.sandbox import Program

    test = "\n".join([row["test_setup_code"], *row["test_list"]]) + "\n"
    return Program(source, test, names=names_taken(row["code"], test), reference=row["code"])


def question(row: Row) -> str:
    """The prompt of one task, in examples and at the end: the sentence and the first three asserts."""
    asserts = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n"
        f"{asserts}\n[BEGIN]\n"
    )


def instruct_question(row: Row) -> str:
    """The same as a message."""
    asserts = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task:\n{row['text']}\n"
        f"Your code should pass these tests:\n{asserts}"
    )


def program(response: Response, settings: Settings) -> str:
    """The program in a response: all of it up to `[DONE]`; with `mbpp_instruct`, and in a given one, the first code block."""
    if response.finish == "given":
        block = fenced_block(response.text)
        text = response.text if block is None else block
        return until_stop(text.partition("[BEGIN]")[2] if text.lstrip().startswith("[BEGIN]") else text, STOP)
    if _instructed(settings):
        return fenced_block("```python\n" + response.text) or ""
    return until_stop(response.text, STOP)


def _instructed(settings: Settings) -> bool:
    return settings.chat and settings.profile == "fixed"


def _closing(settings: Settings) -> str:
    """What stands behind a program, in the examples and in what a model writes."""
    return "\n```" if _instructed(settings) else "\n[DONE]"
