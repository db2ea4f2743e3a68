"""How a run speaks to whoever started it: lines, notes, warnings, progress bars, and how settings are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from checkpoints.settings import Show, as_in_python

Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], object]]]
"""Makes a progress bar from a title, a total and its unit; yields what advances it."""


@contextmanager
def no_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show no progress."""
    yield lambda count: None


def bar_of(progress: Callable[[int], object]) -> Bar:
    """A bar that passes on the bytes that are read and written."""
    return lambda title, total, unit: nullcontext(progress) if unit == "B" else no_bar(title, total, unit)


def say_nothing(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Console:
    """How a run speaks to the user; by default not at all.

    Attributes:
        say: prints a line of the result.
        note: prints a remark beside it.
        warn: prints what the user should look at.
        bar: makes a progress bar.
        show: how settings are named.
    """

    say: Callable[[str], object] = say_nothing
    note: Callable[[str], object] = say_nothing
    warn: Callable[[str], object] = say_nothing
    bar: Bar = no_bar
    show: Show = as_in_python
