"""Responses of models that think first: what follows the last mark is the answer, and the answer alone is graded.

A response without the mark was cut while the model still thought: its answer is empty, and it is counted. A choice by loglikelihood
holds no text, so there is nothing to split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from evaluation.benchmarks.contract import Generation, Response, until_stop

_BLANK_LINES = re.compile(r"\A\s*\n")


def to_think(generation: Generation | None, mark: str | None) -> Generation | None:
    """How a benchmark's text is generated where a mark is set: a thought may hold stop strings, so none of them ends it."""
    return generation if generation is None or mark is None else replace(generation, stop=())


def answers_of(responses: Sequence[Response], mark: str | None, stop: Sequence[str]) -> list[Response]:
    """The responses as they are graded.

    Args:
        responses: of one benchmark, whole.
        mark: what ends a thought; None where responses are graded whole.
        stop: the benchmark's stop strings. Answers that were generated are cut at the first; given ones the grader cuts, where it does.

    Returns: aligned with `responses`; in `text` what follows the last mark, without the blank lines before it.
    """
    if mark is None:
        return list(responses)
    return [_answer(response, mark, stop) if _holds_text(response) else response for response in responses]


def describe_thinking(responses: Sequence[Response], mark: str | None, stop: Sequence[str]) -> dict[str, Any] | None:
    """What the results say of both parts; None where no response was split."""
    whole = [response for response in responses if _holds_text(response)]
    if mark is None or not whole:
        return None
    thoughts = [response.text.rpartition(mark)[0] if mark in response.text else response.text for response in whole]
    ended = [response for response in whole if mark in response.text]
    answers = [response.text for response in answers_of(ended, mark, stop)]
    return {
        "mark": mark,
        "thought": _lengths(thoughts),
        "answer": _lengths(answers),
        "unfinished": len(whole) - len(ended),
    }


def _answer(response: Response, mark: str, stop: Sequence[str]) -> Response:
    _, found, text = response.text.rpartition(mark)
    if not found:
        return replace(response, text="")
    text = _BLANK_LINES.sub("", text)
    return replace(response, text=text if response.finish == "given" else until_stop(text, stop))


def _holds_text(response: Response) -> bool:
    return response.finish != "no_room" and response.loglikelihoods is None


def _lengths(texts: Sequence[str]) -> dict[str, Any]:
    return {"count": len(texts), "mean_characters": round(fmean(map(len, texts)), 1) if texts else None}
