"""What MATH and GSM8K share: prompts, stop strings, extraction and grading.

Source: the paper's program follows ZubinGou/math-evaluation-harness: one prompt without examples, the answer taken from the
last \\boxed{}, else from what follows "he answer is", else the last number. Deviations: math-verify decides whether two
answers are equal, and Python that a response ends in is never executed (the paper's program runs it, unprotected, and lets the
model go on); such responses are counted as `would_have_executed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.benchmarks.contract import Generation, Grade, Response, Row, Status, TaskRows, until_stop
from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.answers import Style, extract_answer
from evaluation.grading.tools import Tools

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
# `{question}` is replaced; names as in the harness. All are prompts without examples.
PROMPTS = {
    "wcot": _ALPACA + " Let's think step by step.",
    "alpaca": _ALPACA,
    "direct": "Question: {question}\nAnswer:",
    "self-instruct": "<|user|>\n{question}\n<|assistant|>\n",
    "self-instruct-boxed": "<|user|>\n{question}\nEnclose the final answer using \\boxed{}.\n<|assistant|>\n",
    "deepseek-math": (
        "User: {question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:"
    ),
    "kpmath": (
        'User: Please reason step by step and put your final answer at the end with "The answer is: ".\n\n'
        "{question}\n\nAssistant:"
    ),
}
STOP = ("</s>", "<|im_end|>", "<|endoftext|>", "\n\nQuestion:")
GRADER_NOTE = "equality by math-verify: stricter than the paper's checker, which takes [0,1] for [0,1), 0.5 for 50 and 3.4641 for 2√3"


def wcot_tasks(name: str, rows: Sequence[tuple[int, Row]], settings: Settings) -> list[TaskRows]:
    """One task whose prompt is the one of `settings`; `question` and `target` are fields of every row."""
    template = PROMPTS[settings.math_prompt_type]

    def prompt(row: Row) -> str:
        return template.replace("{question}", question(row))

    config: dict[str, Any] = {"task": name, "doc_to_text": prompt, "doc_to_target": "", "num_fewshot": 0}
    return [TaskRows(config, rows)]


def question(row: Row) -> str:
    """The question; where the answer is one of two words, both are offered, as the harness does."""
    text = str(row["question"]).strip()
    for pair in (("True", "False"), ("Yes", "No")):
        if row["target"].replace("\\text", "").strip("{} ").lower() in (word.lower() for word in pair):
            text += f" ({pair[0]} or {pair[1]})"
    return text


def wcot_generation(settings: Settings) -> Generation:
    """1024 new tokens in the paper's program."""
    return Generation(settings.math_max_tokens, STOP)


def grade_answers(
    rows: Sequence[Row], responses: Sequence[Response], tools: Tools, advance: Advance, style: Style
) -> list[Grade]:
    """Extract an answer from each response and compare it with the row's `target`."""
    answers = [extract_answer(until_stop(response.text, STOP), style) for response in responses]
    pairs = [(row["target"], answer) for row, answer in zip(rows, answers, strict=True)]
    verdicts = tools.compare_answers(pairs, advance)
    grades = []
    for response, answer, verdict in zip(responses, answers, verdicts, strict=True):
        executed = "boxed" not in response.text and response.text.rstrip().endswith("```")
        extra = {"would_have_executed": True} if executed else {}
        status: Status = "no_answer" if not answer.text and verdict == "wrong" else verdict
        grades.append(Grade(float(verdict == "right"), status, answer.text, extra=extra))
    return grades
