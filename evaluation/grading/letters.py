"""The letter of a multiple choice that a text names."""

from __future__ import annotations

import re
from collections.abc import Sequence


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter a response gives: all of it, its beginning (`B. ...`, `(B)`), or what follows "answer is" or "answer:".

    Args:
        text: a response; `--stage generate` writes the bare letter.
        choices: the letters that count.

    Returns: the letter in upper case, or None.
    """
    letters = "".join(choices)
    stripped = text.strip()
    whole = re.match(rf"\W*([{letters}])(?![\w'])", stripped)
    if whole:
        return whole[1]
    named = re.findall(rf"answer(?:\s+is)?\s*:?\s*\W{{0,3}}([{letters}])(?![\w'])", stripped, re.IGNORECASE)
    return named[-1].upper() if named else None
