"""HumanEval: complete a Python function from its signature and docstring; the tests that came with it decide.

Source: openai/human-eval; prompts and stop strings of lm_eval 0.4.13's `humaneval` (with a chat template
`humaneval_instruct`), verdicts of our sandbox instead of the hub's code_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from evaluation.benchmarks.contract import (
    Benchmark,
    Generation,
    Grade,
    HubDataset,
    Response,
    Row,
    TaskRows,
    text_field,
    until_stop,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.code import fenced_block, grade_programs, looks_whole
from evaluation.grading.tools import Tools

if TYPE_CHECKING:
    from evaluation.sandbox import Program

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class HumanEval(Benchmark):
    name = "humaneval"
    dataset = HubDataset("openai/openai_humaneval", {"test": "openai_humaneval/test-*.parquet"})
    files = ("humaneval.jsonl",)
    size = 164
    metric = "pass@1"
    runs_code = True
    grader = "sandbox"
    fields: ClassVar = ("task_id", "prompt", "entry_point", "canonical_solution", "test")

    def read_row(self, row: Row) -> dict[str, Any]:
        return {name: text_field(row, name) for name in self.fields}

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        config = {"task": self.name, "doc_to_text": "prompt", "doc_to_target": "", "num_fewshot": 0}
        if _instructed(settings):
            config["doc_to_text"] = (
                "Write a solution to the following problem and make sure that it passes the tests:\n"
                "```python\n{{ prompt }}\n```\n"
            )
            config["gen_prefix"] = "Here is the completed function:\n```python\n{{ prompt }}\n"
        return [TaskRows(config, rows)]

    def generation(self, settings: Settings) -> Generation:
        return Generation(1024, STOP)

    def reference(self, row: Row, settings: Settings) -> str:
        return str(row["canonical_solution"])

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        sources = [program(row, response, tools.settings) for row, response in zip(rows, responses, strict=True)]
        return grade_programs([judged(row, source) for row, source in zip(rows, sources, strict=True)], tools, advance)


def judged(row: Row, source: str) -> Program:
    """A program with its test. Functions that the prompt gives, and the test uses, are the test's own."""
    from evaluation.sandbox import Program

    test = f"{preamble(row['prompt'])}\n{row['test']}\ncheck({row['entry_point']})\n"
    reference = str(row["prompt"]) + str(row["canonical_solution"])
    return Program(source, test, names=(row["entry_point"],), reference=reference)


def program(row: Row, response: Response, settings: Settings) -> str:
    """The program that a response makes: the prompt, then the completion up to the first stop string.

    With `humaneval_instruct` up to the closing code fence. A response that was given, and not cut by this program, may be
    a whole program instead, fenced or not: it defines the function itself, and is taken as it is.
    """
    prompt, text = str(row["prompt"]), response.text
    if _instructed(settings) and response.finish != "given":
        return prompt + text.partition("```")[0]
    if response.finish == "given":
        block = fenced_block(text)
        if block is not None:
            if looks_whole(block, row["entry_point"]):
                return preamble(prompt) + block
            if block.strip() and text.lstrip().startswith("```"):
                text = block
        if looks_whole(text, row["entry_point"]):
            return preamble(prompt) + text
    return prompt + until_stop(text, STOP)


def preamble(prompt: str) -> str:
    """What stands before the function in a prompt, which a whole program may rely on: imports and helpers."""
    head, _, _ = prompt.rpartition("\ndef ")
    return head + "\n" if head else ""


def _instructed(settings: Settings) -> bool:
    return settings.chat and settings.profile == "fixed"
