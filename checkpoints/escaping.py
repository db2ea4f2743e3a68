"""Text of strangers on its way into other formats: names, settings and messages, escaped at the door of every writer.

A model may be called anything, and a results file or a recipe may say anything. Each function takes a text and gives one that the format
shows and does not obey, in one line: what ends a line, and what no reader shows, appears as an escape such as `\\n` (see `visible`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a cell begins with that a spreadsheet computes, in both widths; tabs and line ends are no part of a cell here."""
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': "{''}", "-": "-{}", "`": r"\textasciigrave{}",
}  # fmt: skip
_LATEX_SIGN = re.compile(r'-(?=-)|[&%$#_{}\\~^<>|\[\]*"`]')
# What means something anywhere in a line; an underscore inside a word does not, a colon only in an address.
_MARKDOWN_SIGN = re.compile(r"[\\`*\[\]<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|:(?=//)|(?<=[Ww]{3})\.")
# What means something where a block begins: headings, lists, quotes, rules.
_MARKDOWN_BEGIN = re.compile(r"[#>+\-=:]|\d{1,9}(?=[.)](?:\s|$))")


def visible(text: str) -> str:
    """One line that no terminal obeys: what cannot be printed, marks that turn the direction of text among it, becomes an escape."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def terminal(text: str) -> str:
    """Lines for a terminal: each as `visible`."""
    return "\n".join(map(visible, text.split("\n")))


# ----------------------------------------------------------------------------------------------------------------- CSV


def csv_cell(value: Any) -> str:
    """A cell that a spreadsheet shows and does not compute; the csv module quotes it. Numbers stay numbers, negative ones too.

    A text that begins like a formula gets a `'` before it, as people do; `csv_text` takes it away again.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = visible(value)
    return f"'{text}" if _is_guarded(text) else text


def csv_text(cell: str) -> str:
    """The text that `csv_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and _is_guarded(cell[1:]) else cell


def _is_guarded(text: str) -> bool:
    return text.lstrip().startswith((*FORMULA, "'")) and _NUMBER.fullmatch(text) is None


# --------------------------------------------------------------------------------------------------------------- LaTeX


def latex(text: str) -> str:
    """Text in a paragraph or a cell: no command, no comment, no alignment, no optional argument of the line before."""
    return _LATEX_SIGN.sub(lambda match: _LATEX.get(match[0], "\\" + match[0]), visible(text))


def latex_comment(text: str) -> str:
    """A comment, which one line end would end."""
    return f"% {visible(text)}"


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(text: str) -> str:
    """Text at the beginning of a block, inside of one, or in a table's cell: no markup, HTML, link or mathematics."""
    line = visible(text).strip()
    begin = _MARKDOWN_BEGIN.match(line)
    if begin and begin[0].isdigit():
        return begin[0] + "\\" + line[begin.end()] + _inline(line[begin.end() + 1 :])
    return "\\" + line[0] + _inline(line[1:]) if begin else _inline(line)


def markdown_inside(text: str) -> str:
    """Text where something stands before it in the same line or cell."""
    return _inline(visible(text))


def _inline(line: str) -> str:
    return _MARKDOWN_SIGN.sub(lambda match: "\\" + match[0], line)


def markdown_code(text: str) -> str:
    """A code span, between backticks that the text does not hold; outside of tables."""
    line = visible(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or (line[0] == line[-1] == " " and line.strip()) else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def markdown_code_cell(text: str) -> str:
    """A code span in a table's cell; plain text where the text holds what divides cells."""
    return markdown(text) if "|" in text or not text.strip() else markdown_code(text)


def yaml_text(text: str) -> str:
    """A scalar of YAML, between quotes."""
    return json.dumps(visible(text), ensure_ascii=False)


def shell(command: Sequence[str]) -> str:
    """A command in one line, to be copied into a shell: what is not printable as an escape between `$'` and `'`."""
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_quoted(word)}'" for word in command)


def _quoted(word: str) -> str:
    signs = []
    for character in word:
        code = ord(character)
        if character in "\\'":
            signs.append("\\" + character)
        elif character.isprintable():
            signs.append(character)
        elif 0xDC80 <= code <= 0xDCFF:  # a byte of a path that is no text
            signs.append(f"\\x{code - 0xDC00:02x}")
        else:
            signs.append(f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}")
    return "".join(signs)
