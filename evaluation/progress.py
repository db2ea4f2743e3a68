"""A bar for each benchmark on standard error: items done, items per second, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def item_bar(title: str, items: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar while something works through items; silent without a terminal. Yields what advances it.

    Args:
        title: in front of the bar, such as `gsm8k: generating`.
        items: how many there are.
        quiet: show nothing.
    """
    from tqdm import tqdm

    disable = True if quiet else None
    with tqdm(total=items, desc=title, unit=" items", disable=disable, mininterval=0.2, smoothing=0.1) as bar:
        yield bar.update
