"""Sums over a fixed sample of each tensor's elements, the same in whatever order its blocks stream by."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from checkpoints.tensor_names import kind_of
from streaming.blocks import GRID_ELEMENTS, Region

SAMPLE_EVERY = 16
Rows = list[list[float]]
"""Place and numbers of each row that was added, in the order of the places."""


def sample_of(region: Region, every: int = SAMPLE_EVERY) -> list[slice]:
    """The parts of a region, as slices of its elements, that lie in every 16th grid cell of the tensor, the first among them."""
    first = -(-(region.start // GRID_ELEMENTS) // every) * every
    begins = range(first * GRID_ELEMENTS, region.stop, every * GRID_ELEMENTS)
    return [
        slice(max(begin, region.start) - region.start, min(begin + GRID_ELEMENTS, region.stop) - region.start)
        for begin in begins
    ]


class Tally:
    """Rows of numbers, added up per tensor and per kind of layer.

    The sums of a tensor that is complete can be kept for a later run: they are plain numbers (`close`, `restore`).

    Args:
        width: how many numbers a row has.
        describe: what a tensor's sums mean, as JSON, for logs.
        places: rows that `add` may get for each element: those of the element `e` have the places `e * places` and so on.
    """

    def __init__(self, width: int, describe: Callable[[Sequence[float]], dict[str, Any]], *, places: int = 1) -> None:
        self._width = width
        self._places = places
        self._describe = describe
        self._open: dict[str, dict[int, Sequence[float]]] = {}
        self._closed: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def add(self, tensor: str, start: int, numbers: Sequence[float]) -> None:
        """Add what was seen in a part of a tensor that begins at the element `start`; from any thread, in any order."""
        with self._lock:
            self._open.setdefault(tensor, {})[start] = numbers

    def close(self, tensor: str) -> list[float] | None:
        """The sums of a tensor, of which nothing more will be added; None where nothing was."""
        parts = self._open.pop(tensor, None)
        if parts is None:
            return None
        self._closed[tensor] = _add_up(numbers for _, numbers in sorted(parts.items()))
        return self._closed[tensor]

    def take(self, tensor: str, part: tuple[int, int]) -> Rows:
        """What was seen in a part of a tensor, of which nothing more will be added; `put` gives it to the tally that closes the tensor.

        Args:
            part: first element, and the one after the last.
        """
        with self._lock:
            rows = self._open.get(tensor, {})
            # A place below 0 is that of a second kind of rows, counted backwards.
            inside = [at for at in sorted(rows) if part[0] <= (at if at >= 0 else -1 - at) // self._places < part[1]]
            return [[at, *rows.pop(at)] for at in inside]

    def put(self, tensor: str, rows: Rows) -> None:
        """Add what another tally, or an earlier run's, saw in a part of a tensor: the sums are those of one tally that saw all."""
        for at, *numbers in rows:
            self.add(tensor, int(at), numbers)

    def accepts(self, numbers: Any) -> bool:
        """Whether `close` of such a tally can have given this, which was read from a file."""
        return numbers is None or self._is_row(numbers, self._width)

    def accepts_rows(self, rows: Any) -> bool:
        """Whether `take` of such a tally can have given this, which was read from a file."""
        return isinstance(rows, list) and all(
            self._is_row(row, 1 + self._width) and type(row[0]) is int for row in rows
        )

    @staticmethod
    def _is_row(numbers: Any, width: int) -> bool:
        is_row = isinstance(numbers, list) and len(numbers) == width
        return is_row and all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in numbers)

    def restore(self, tensor: str, numbers: Sequence[float] | None) -> None:
        """Take the sums of a tensor from an earlier run's `close`."""
        if numbers is not None:
            self._closed[tensor] = list(numbers)

    def describe(self, numbers: Sequence[float] | None) -> dict[str, Any]:
        """What the sums that `close` gave mean."""
        return {} if numbers is None else self._describe(numbers)

    def by_tensor(self) -> dict[str, list[float]]:
        """Tensor -> its sums, for those that are closed and of which anything was seen, in the order of their names."""
        return dict(sorted(self._closed.items()))

    def by_kind(self) -> dict[str, list[float]]:
        """Kind of layer -> the sums over its closed tensors, in the order of their names."""
        kinds: dict[str, list[Sequence[float]]] = {}
        for tensor, numbers in sorted(self._closed.items()):
            kinds.setdefault(kind_of(tensor), []).append(numbers)
        return {kind: _add_up(rows) for kind, rows in sorted(kinds.items())}


def _add_up(rows: Iterable[Sequence[float]]) -> list[float]:
    """Column by column, in the order given."""
    return [sum(column) for column in zip(*rows, strict=True)]
