"""Compiled twins of the loops of `aim`; what each does is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.extending import overload

from aim.sums import KEPT, PEAK, PEAK_AT, SUMMED_AT_ONCE, UNKNOWN
from streaming.kernels import compiled

COLUMNS = 1024
"""Channels that are summed together: their sums stay in a core's nearest cache."""


def add_rows(x: torch.Tensor, first: int, before: torch.Tensor, after: torch.Tensor) -> None:
    """See `aim.sums.add_rows`."""
    if x.dtype == torch.bfloat16:
        stored = x.contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        stored = x.float().contiguous().numpy()
    _add_rows(stored, first, before.numpy(), after.numpy())


@compiled
def _add_rows(stored: Any, first: Any, before: Any, after: Any) -> None:
    blocks, rows, width = stored.shape
    absolute, squared, own = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    highest, at = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.int32)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        count = end - start
        for kept in range(KEPT):
            for i in range(start, end):
                after[kept, i] = before[kept, i]
        for i in range(count):
            highest[i] = after[PEAK, start + i]
            at[i] = -1
        for block in range(blocks):
            row = 0
            while row < rows:
                part = 0 if row < first else 3
                stop = min(row + SUMMED_AT_ONCE, rows if part else first)
                absolute[:] = 0
                squared[:] = 0
                own[:] = 0
                while row + 4 <= stop:  # fewer loads and stores than row by row, in the same order
                    _add_four(
                        stored[block, row, start:end],
                        stored[block, row + 1, start:end],
                        stored[block, row + 2, start:end],
                        stored[block, row + 3, start:end],
                        row, absolute, squared, own, highest, at,
                    )  # fmt: skip
                    row += 4
                while row < stop:
                    _add_one(stored[block, row, start:end], row, absolute, squared, own, highest, at)
                    row += 1
                for i in range(count):
                    after[part, start + i] += absolute[i]
                    after[part + 1, start + i] += squared[i]
                    after[part + 2, start + i] += own[i]
        for i in range(count):
            if at[i] >= 0:
                after[PEAK, start + i] = highest[i]
                after[PEAK_AT, start + i] = at[i] // first if first else UNKNOWN


def _value(stored: Any, i: Any) -> Any:
    """An element as float32, of float32 or the bits of bfloat16; inside compiled loops, where the dtype says which."""
    raise NotImplementedError(stored.dtype)


@overload(_value, inline="always")
def _value_by_dtype(stored, i):  # type: ignore[no-untyped-def]  # as its two forms, which have no types
    if stored.dtype.bitwidth == 16:
        return lambda stored, i: np.uint32(np.uint32(stored[i]) << np.uint32(16)).view(np.float32)
    return lambda stored, i: stored[i]


@compiled
def _add_one(stored: Any, row: Any, absolute: Any, squared: Any, own: Any, highest: Any, at: Any) -> None:
    here = np.int32(row)
    for i in range(stored.size):
        value = _value(stored, i)
        magnitude = abs(value)
        absolute[i] += magnitude
        squared[i] += value * value
        own[i] += value
        if magnitude > highest[i]:
            highest[i] = magnitude
            at[i] = here


@compiled
def _add_four(
    a: Any, b: Any, c: Any, d: Any, row: Any, absolute: Any, squared: Any, own: Any, highest: Any, at: Any
) -> None:
    here = np.int32(row)
    for i in range(a.size):
        first = _value(a, i)
        second = _value(b, i)
        third = _value(c, i)
        fourth = _value(d, i)
        absolute[i] = absolute[i] + abs(first) + abs(second) + abs(third) + abs(fourth)
        squared[i] = squared[i] + first * first + second * second + third * third + fourth * fourth
        own[i] = own[i] + first + second + third + fourth
        largest, place = highest[i], at[i]
        if abs(first) > largest:
            largest, place = abs(first), here
        if abs(second) > largest:
            largest, place = abs(second), here + np.int32(1)
        if abs(third) > largest:
            largest, place = abs(third), here + np.int32(2)
        if abs(fourth) > largest:
            largest, place = abs(fourth), here + np.int32(3)
        highest[i], at[i] = largest, place


def _add_each() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        numbers = torch.zeros(KEPT, 8, dtype=torch.float64)
        add_rows(torch.ones(2, 7, 8, dtype=dtype), 1, numbers, numbers.clone())


EXAMPLES: dict[str, Callable[[], object]] = {"add_rows": _add_each}
"""See `streaming.twins`."""
