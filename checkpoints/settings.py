"""Settings by their bare names inside messages; each door (a command, a recipe file, Python) shows them as its users type them.

A message that speaks of a setting holds `setting("n_samples", 3)`. Read from Python it says `n_samples 3`, a command shows
`--n_samples 3`, a recipe `recipe.yml: aim.calibration.n_samples 3`. So no package below the commands knows a flag.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Three private characters, which no terminal prints and no well-meant text holds.
OPEN, VALUE, CLOSE = "\ue000", "\ue001", "\ue002"
_MARKED = re.compile(f"{OPEN}([A-Za-z_][A-Za-z0-9_.]*)(?:{VALUE}([^{OPEN}{VALUE}{CLOSE}]*))?{CLOSE}")

Show = Callable[[str, str | None], str]
"""How a door shows a setting: its name and its value, None where the message names none, to text."""


def setting(name: str, value: object = None) -> str:
    """The mention of a setting inside a message.

    Args:
        name: as a recipe and Python have it, such as `n_samples`.
        value: what it is or should be; None mentions the setting alone.
    """
    shown = "" if value is None else VALUE + re.sub(f"[{OPEN}{VALUE}{CLOSE}]", "?", str(value))
    return f"{OPEN}{name}{shown}{CLOSE}"


def show_settings(text: str, show: Show) -> str:
    """A message with every mention of a setting replaced by what `show` makes of it; marks that mention none become `?`."""
    return re.sub(f"[{OPEN}{VALUE}{CLOSE}]", "?", _MARKED.sub(lambda match: show(match[1], match[2]), text))


def as_in_python(name: str, value: str | None) -> str:
    """A setting for a caller from Python: its bare name, with its value."""
    return name if value is None else f"{name} {value}"


def as_flag(name: str, value: str | None) -> str:
    """A setting for a user of a command: `--name value`."""
    return f"--{as_in_python(name, value)}"
