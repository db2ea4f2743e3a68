"""From a response to a program, and from the sandbox's verdict on it to a grade."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.benchmarks.contract import Grade, Status
from evaluation.benchmarks.settings import Advance
from evaluation.grading.tools import Tools

if TYPE_CHECKING:
    from evaluation.sandbox import Program

_FENCE = re.compile(r"```[^\S\n]*[\w+-]*[^\S\n]*\n(.*?)(?:\n[^\S\n]*```|\Z)", re.DOTALL)
_STATUS: dict[str, Status] = {
    "passed": "right",
    "failed": "wrong",
    "timeout": "timeout",
    "forged": "forged",
    "error": "error",
}


def fenced_block(text: str) -> str | None:
    """The inside of the first ``` block, which may lack its closing fence; None without one."""
    match = _FENCE.search(text)
    return match[1] if match else None


def looks_whole(text: str, function: str) -> bool:
    """Whether a text is a program that defines `function` itself: its first line is not indented, as a completion's is."""
    first = next((line for line in text.splitlines() if line.strip()), " ")
    defines = re.search(rf"^(?:async\s+)?def\s+{re.escape(function)}\s*\(", text, re.MULTILINE)
    return not first[0].isspace() and defines is not None


def names_taken(reference: str, test: str) -> tuple[str, ...] | None:
    """The names that a test takes from a program: those that it reads and that the reference solution defines.

    Returns: None, for what the sandbox takes for them, where one of the two is no Python.
    """
    try:
        defined = {
            node.name
            for node in ast.parse(reference).body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        read = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError):
        return None
    return tuple(sorted(defined & read)) or None


def grade_programs(programs: Sequence[Program], tools: Tools, advance: Advance) -> list[Grade]:
    """Run programs against their tests in the sandbox."""
    verdicts = tools.run_programs(programs, advance)
    return [
        Grade(
            score=float(verdict.status == "passed"),
            status=_STATUS[verdict.status],
            detail=verdict.detail,
            extra={"seconds": round(verdict.seconds, 3)},
        )
        for verdict in verdicts
    ]
