"""The final answer in a mathematical response, as text. Whether it is right is decided in `maths`.

Rules in the order of the paper's program (ZubinGou/math-evaluation-harness), with the additions marked +:

1. `final answer is $...$. I hope`, the form of the Minerva prompt
2. the last `\\boxed{...}` or `\\fbox{...}`
3. + the last `#### N` (GSM8K's own form) or `# Answer` heading
4. what follows the last "he answer is", + to the end of its sentence
5. what follows the last "final answer is", + or "answer:" at the start of a line
6. numbers: the last number; + MATH: the last expression that math-verify finds in the text
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Style = Literal["math", "number"]

# Where nothing announces an answer, expressions are looked for in the end of the text only.
TAIL_CHARS = 1500
_BOXED = re.compile(r"(?:\\(?:boxed|fbox)(?![A-Za-z])|\bboxed(?=\{))\s*")
_HEADING = re.compile(r"(?:^|\n)\s*(?:####|#+\s*(?:final\s+)?answer\s*:?\s*\n)\s*", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"final answer is\s*:?|(?:^|\n)\W*answer\s*:\W*?(?=\S)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
# Three words in a row are prose, not an expression; read as LaTeX they would be a product of their letters.
_WORDS = re.compile(r"(?:(?<![\\\w])[A-Za-z]{2,}[\s,]+){2}[A-Za-z]{2,}")
_DISPLAY = {"\\[": "\\]", "$$": "$$", "\\(": "\\)"}


@dataclass(frozen=True)
class Answer:
    """An answer found in a response.

    Attributes:
        text: as written, for people; None where there is none.
        forms: what math-verify is given in turn; one that equals the reference is enough.
    """

    text: str | None
    forms: tuple[str, ...] = ()


def extract_answer(response: str, style: Style) -> Answer:
    """Find the final answer of a response by the rules above.

    Args:
        response: what the model wrote.
        style: `number` where answers are single numbers (GSM8K), `math` where they are any expression.
    """
    minerva = re.search(r"final answer is \$(.*?)\$\. I hope", response, re.DOTALL)
    boxed = minerva[1] if minerva else last_boxed(response)
    if boxed is not None:
        return _from_latex(boxed.strip(), style)
    for announced in (_after_heading(response), _after_announcement(response)):
        if announced:
            return _from_text(announced, style)
    if style == "number":
        number = last_number(response)
        return Answer(number, (number,)) if number else Answer(None)
    tail = response[-TAIL_CHARS:].strip()
    return Answer(tail[-200:], (tail,)) if tail else Answer(None)


def last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{...}`, braces balanced; to the end where it is cut off. None without one."""
    matches = list(_BOXED.finditer(text))
    if not matches:
        return None
    start = matches[-1].end()
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip()
    depth = 0
    for position in range(start, len(text)):
        if text[position - 1] == "\\" and text[position - 2 : position - 1] != "\\":
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    return text[start + 1 :]


def last_number(text: str) -> str | None:
    """The last number, without thousands separators; a minus only where no digit precedes it (`16-3` ends in 3)."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _after_heading(response: str) -> str:
    matches = list(_HEADING.finditer(response))
    return response[matches[-1].end() :].strip().split("\n", 1)[0].strip() if matches else ""


def _after_announcement(response: str) -> str:
    _, announcement, rest = response.rpartition("he answer is")
    if not announcement:
        matches = list(_ANSWER_LINE.finditer(response))
        if not matches:
            return ""
        rest = response[matches[-1].end() :]
    rest = rest.lstrip(" \t\n:*")
    for opening, closing in _DISPLAY.items():
        if rest.startswith(opening):
            inside, closed, _ = rest[len(opening) :].partition(closing)
            return f"${inside.strip()}$" if closed else inside.split("\n", 1)[0]
    line = rest.split("\n", 1)[0]
    return re.split(r"\.(?=\s|\**$)", line, maxsplit=1)[0].strip().strip("*").strip()


def _from_latex(inside: str, style: Style) -> Answer:
    """An answer that is LaTeX without its dollars."""
    bare = re.sub(r"(?<!\\)\$", "", inside).strip()
    if not bare:
        return Answer(None)
    return Answer(inside, _with_number((f"${bare}$",), bare, style))


def _from_text(text: str, style: Style) -> Answer:
    """An answer that may be words, plain numbers, LaTeX, or LaTeX in dollars."""
    if re.search(r"(?<!\\)\$.*(?<!\\)\$|\\\(|\\\[", text) or _WORDS.search(text):
        forms: tuple[str, ...] = (text,)
    else:
        bare = re.sub(r"(?<!\\)\$", "", text)
        forms = (f"${bare}$", text)
    return Answer(text, _with_number(forms, text, style))


def _with_number(forms: tuple[str, ...], text: str, style: Style) -> tuple[str, ...]:
    """Where a number is asked for, an answer without digits has no form, and one with a single number (`18 eggs`) one more."""
    if style == "math":
        return forms
    numbers = _NUMBER.findall(text)
    return (*forms, numbers[0].replace(",", "")) if len(numbers) == 1 else forms if numbers else ()
