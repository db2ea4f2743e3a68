"""Whether two mathematical answers are equal: math-verify 0.9.0, in a worker process (see `pool`).

math-verify interrupts itself by SIGALRM, which needs the main thread of a process and does not reach a computation inside
one C call; the pool kills a worker that overruns.
"""

from __future__ import annotations

import logging
import re

TIMEOUT_S = 3
"""What math-verify allows itself for reading one expression, and for comparing two."""
OVERRUN_S = 30.0
"""When a worker that compares one pair is killed."""


def compare(gold: str, forms: list[str]) -> bool:
    """Whether an answer equals the reference: the same text but for spaces and text commands, or equal by math-verify.

    Args:
        gold: the reference answer, LaTeX without dollars.
        forms: ways to read the response's answer, for math-verify; one that is equal is enough.
    """
    if any(_bare(form) == _bare(gold) for form in forms):
        return True
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    reference = parse(f"${gold}$", parsing_timeout=TIMEOUT_S)
    return any(
        verify(reference, parse(form, parsing_timeout=TIMEOUT_S), timeout_seconds=TIMEOUT_S) for form in forms if form
    )


def _bare(answer: str) -> str:
    """The answer without dollars around it, spaces, and the commands that set text (`\\text{June 20}` is `June20`)."""
    plain = re.sub(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer.strip().strip("$"))
    return re.sub(r"\\[!,;: ]|\s", "", plain)
