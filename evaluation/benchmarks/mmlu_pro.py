"""MMLU-Pro: up to ten choices, five worked examples of the same category, the letter read from the response.

Optional: it is no column of the paper's table. Source: TIGER-AI-Lab/MMLU-Pro, whose script the paper's program carries (its call
of it cannot run). As there, examples are left out from the end until the prompt stays under 2048 tokens, the letter is read in
three steps, and where none can be read one is guessed (12345 seeds every guess). Guesses are counted as `guessed`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
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
    list_field,
    spread,
    text_field,
)
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.tools import Tools

LETTERS = "ABCDEFGHIJ"
MAX_PROMPT_TOKENS = 2048
GUESS_SEED = 12345
THINK = "Let's think step by step."


class MmluPro(Benchmark):
    name = "mmlu_pro"
    dataset = HubDataset(
        "TIGER-Lab/MMLU-Pro", {"test": "data/test-*.parquet", "validation": "data/validation-*.parquet"}
    )
    files = ("mmlu_pro.jsonl",)
    fewshot_file = "mmlu_pro_validation.jsonl"
    size = 12032
    shots = 5
    harness = False
    grader = "letter in the response"

    def read_row(self, row: Row) -> dict[str, Any]:
        options = [option for option in list_field(row, "options", str) if option != "N/A"]
        answer = text_field(row, "answer").strip()
        if answer not in LETTERS[: len(options)]:
            raise BadRow(f"expected one of {LETTERS[: len(options)]} in 'answer', got {answer!r:.60}")
        return {
            "question": text_field(row, "question"),
            "options": options,
            "answer": answer,
            "category": text_field(row, "category"),
            "cot_content": text_field(row, "cot_content", empty=True) if row.get("cot_content") else "",
        }

    def tasks(
        self, rows: Sequence[tuple[int, Row]], settings: Settings, fewshots: Sequence[Row] = ()
    ) -> list[TaskRows]:
        config = {"task": self.name, "doc_to_text": "prompt", "doc_to_target": "", "num_fewshot": 0}
        ladders = [
            (index, {"prompt": ladder(row, fewshots)[0], "ladder": ladder(row, fewshots)}) for index, row in rows
        ]
        return [TaskRows(config, ladders)]

    def generation(self, settings: Settings) -> Generation:
        return Generation(2048, ("Question:",))

    def reference(self, row: Row, settings: Settings) -> str:
        return f" The answer is ({row['answer']})."

    def uses_chat_template(self, settings: Settings) -> bool:
        return False

    def first(self, rows: Sequence[Row], limit: int) -> list[int]:
        return spread([row["category"] for row in rows], limit)

    def grade(self, rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance) -> list[Grade]:
        grades = []
        for row, response in zip(rows, responses, strict=True):
            letter = read_choice(response.text)
            guess = random.Random(GUESS_SEED).randint(0, len(row["options"]) - 1)
            right = (letter or LETTERS[guess]) == row["answer"]
            extra = {} if letter else {"guessed": True}
            grades.append(Grade(float(right), "right" if right else "wrong", letter, extra=extra))
            advance(1)
        return grades


def ladder(row: Row, examples: Sequence[Row]) -> list[str]:
    """The prompt with five examples of the row's category, then with four, down to none."""
    subject = row["category"]
    start = (
        f"You are an expert in {subject}. Below is a series of example questions (with answers) about {subject} for "
        "demonstration. You will be given a question at the end, after the examples, for you to answer. First give "
        "step-by-step reasoning about how to solve the question. Then output the answer.\n"
    )
    worked = [_example(example, example["cot_content"]) for example in examples if example["category"] == subject][:5]
    return [start + "".join(worked[:count]) + _example(row, "") for count in range(len(worked), -1, -1)]


def fitting(prompts: Sequence[str], count_tokens: Callable[[str], int]) -> str:
    """The first prompt of a ladder under MAX_PROMPT_TOKENS; the last one where none is."""
    return next((prompt for prompt in prompts if count_tokens(prompt) < MAX_PROMPT_TOKENS), prompts[-1])


def read_choice(text: str) -> str | None:
    """A letter by the script's three rules: `answer is (X)`, `Answer: X`, the last capital from A to J anywhere."""
    for rule in (r"answer is \(?([A-J])\)?", r".*[aA]nswer:\s*([A-J])", r"([A-J])(?=[^A-J]*$)"):
        match = re.search(rule, text)
        if match:
            return match[1]
    return None


def _example(row: Row, worked: str) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, row["options"], strict=False))
    question = f"Question:\n{row['question']}\nOptions:\n{options}"
    if not worked:
        return f"{question}Answer: {THINK}"
    return question + worked.replace(f"A: {THINK}", f"Answer: {THINK}") + "\n\n"
