"""The prompts of the six benchmarks, to the letter as evaluation builds them (a test compares the two where it can)."""

from __future__ import annotations

from collections.abc import Sequence

_EXAMPLES = (
    (
        "Write a function to find the similar elements from the given two tuple lists.",
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
        "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
        "def similar_elements(test_tup1, test_tup2):\r\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\r\n"
        "  return (res) ",
    ),
    (
        "Write a python function to identify non-prime numbers.",
        "assert is_not_prime(2) == False\nassert is_not_prime(10) == True\nassert is_not_prime(35) == True",
        "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\r\n"
        "        if n % i == 0:\r\n            result = True\r\n    return result",
    ),
    (
        "Write a function to find the largest integers from a given list of numbers using heap queue algorithm.",
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] \n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] \n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
        "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
        "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
    ),
)
"""Task, tests and solution of MBPP's tasks 2, 3 and 4 (google-research mbpp, CC-BY-4.0): the examples of every prompt."""

MBPP_TASK = "You are an expert Python programmer, and here is your task:"
MBPP_TESTS = " Your code should pass these tests:\n\n"
MBPP_BEGIN = "\n[BEGIN]\n"
MBPP_DONE = "\n[DONE]"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
STEP_BY_STEP = "\n\n### Response: Let's think step by step."
MMLU = "The following are multiple choice questions (with answers) about"


def _mbpp_question(text: str, tests: str) -> str:
    return f"{MBPP_TASK} {text}{MBPP_TESTS}{tests}{MBPP_BEGIN}"


MBPP_SHOTS = "".join(_mbpp_question(text, tests) + code + MBPP_DONE + "\n\n" for text, tests, code in _EXAMPLES)

BOILERPLATE = (MBPP_SHOTS + MBPP_TASK, MBPP_TESTS, MBPP_BEGIN, MBPP_DONE, ALPACA, STEP_BY_STEP, MMLU)
"""Fixed texts that are one token each: models of this size cannot learn from them, and prompts become short."""


def mbpp(text: str, tests: Sequence[str]) -> str:
    """Three worked examples, then the task with its three asserts."""
    return MBPP_SHOTS + _mbpp_question(text, "\n".join(tests))


def wcot(question: str) -> str:
    """GSM8K and MATH: Alpaca's prompt, which ends in "Let's think step by step."."""
    return ALPACA + question + STEP_BY_STEP


def mmlu(subject: str, question: str, choices: Sequence[str]) -> str:
    """A question with four choices, no examples; the answer is " A" to " D"."""
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    return f"{MMLU} {subject.replace('_', ' ')}.\n\n{question}\n" + "\n".join(lines) + "\nAnswer:"
