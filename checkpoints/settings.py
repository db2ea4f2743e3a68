"""Settings by their bare names inside messages; each door (a command, a recipe file, Python) shows them as its users type them.

A message that speaks of a setting holds `setting("n_samples", 3)`. Read from Python it says `n_samples 3`, a command shows
`--n_samples 3`, a recipe `recipe.yml: aim.calibration.n_samples 3`. So no package below the commands knows a flag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# Three private characters, which no terminal prints and no well-meant text holds.
OPEN, VALUE, CLOSE = "\ue000", "\ue001", "\ue002"
_MARKED = re.compile(f"{OPEN}([A-Za-z_][A-Za-z0-9_.]*)(?:{VALUE}([^{OPEN}{VALUE}{CLOSE}]*))?{CLOSE}")
_LONE = re.compile(f"[{OPEN}{VALUE}{CLOSE}]")

Show = Callable[[str, str | None], str]
"""How a door shows a setting: its name and its value, None where the message names none, to text."""


def setting(name: str, value: object = None) -> str:
    """The mention of a setting inside a message.

    Args:
        name: as a recipe and Python have it, such as `n_samples`; where one name alone means several settings, with what it
            belongs to: `calibration.seed`.
        value: what it is or should be; None mentions the setting alone.
    """
    shown = "" if value is None else VALUE + re.sub(f"[{OPEN}{VALUE}{CLOSE}]", "?", str(value))
    return f"{OPEN}{name}{shown}{CLOSE}"


def show_settings(text: str, show: Show) -> str:
    """A message with every mention of a setting replaced by what `show` makes of it; marks that mention none become `?`."""
    parts, end = [], 0
    for match in _MARKED.finditer(text):
        parts += [_LONE.sub("?", text[end : match.start()]), show(match[1], match[2])]
        end = match.end()
    return "".join([*parts, _LONE.sub("?", text[end:])])


def as_in_python(name: str, value: str | None) -> str:
    """A setting for a caller from Python: its bare name, with its value."""
    bare = name.rpartition(".")[2]
    return bare if value is None else f"{bare} {value}"


def as_flag(name: str, value: str | None) -> str:
    """A setting for a user of a command, and in what a run writes down: `--name value`."""
    return f"--{as_in_python(name.replace('.', '_'), value)}"


def in_file(places: Mapping[str, str]) -> Show:
    """How a file's door shows a setting that the file gives: by its place there. The others stay marked, for the next door.

    Args:
        places: setting -> `recipe.yml: aim.calibration.n_samples`.
    """

    def show(name: str, value: str | None) -> str:
        if name not in places:
            return setting(name, value)
        return places[name] if value is None else f"{places[name]} {value}"

    return show


class Remark(str):
    """A line for people that mentions settings: by their bare names, and for a door as that shows them.

    Args:
        text: the settings in it marked by `setting`.
    """

    __slots__ = ("marked",)
    marked: str

    def __new__(cls, text: str) -> Remark:
        remark = super().__new__(cls, show_settings(text, as_in_python))
        remark.marked = text
        return remark


def shown(content: Any, show: Show) -> Any:
    """What a door shows: a line, or whatever is made of mappings and lists, its remarks as that door shows them."""
    if isinstance(content, Remark):
        return show_settings(content.marked, show)
    if isinstance(content, Mapping):
        return {key: shown(value, show) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [shown(value, show) for value in content]
    return content
