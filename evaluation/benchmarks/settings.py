"""What benchmarks and their graders are told of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Profile = Literal["paper", "fixed"]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    """What prompts and limits depend on; the same settings and the same rows give the same prompts.

    Attributes:
        profile: `paper`, the AIM paper's program to the letter, or `fixed`, without its slips (docs/evaluation.md).
        chat: wrap prompts in the tokenizer's chat template; MATH and GSM8K never are.
        math_prompt_type: a key of `wcot.PROMPTS`.
        math_max_tokens: new tokens for MATH and GSM8K.
        think_end: the mark after whose last occurrence the answer begins, see `thinking`; None grades responses whole.
    """

    profile: Profile = "fixed"
    chat: bool = False
    math_prompt_type: str = "wcot"
    math_max_tokens: int = 1024
    think_end: str | None = None
