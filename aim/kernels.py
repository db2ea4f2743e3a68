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
    stored = x.contiguous().view(torch.uint16) if x.dtype == torch.bfloat16 else x.float().contiguous()
    _add_rows(stored.numpy(), first, before.numpy(), after.numpy())


@compiled
def _add_rows(stored: Any, first: Any, before: Any, after: Any) -> None:
    blocks, rows, width = stored.shape
    absolute, squared, own = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    top, highest = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    found = np.empty(COLUMNS, np.int32)  # the group of rows that the highest is in, by its first row, of all blocks
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        count = end - start
        for kept in range(KEPT):
            for i in range(start, end):
                after[kept, i] = before[kept, i]
        for i in range(count):
            highest[i] = after[PEAK, start + i]
            found[i] = -1
        for block in range(blocks):
            row = 0
            while row < rows:
                begin = row
                part = 0 if row < first else 3
                stop = min(row + SUMMED_AT_ONCE, rows if part else first)
                absolute[:count] = 0
                squared[:count] = 0
                own[:count] = 0
                top[:count] = 0
                while row + 8 <= stop:  # fewer loads and stores than row by row, in the same order
                    _add_eight(
                        stored[block, row, start:end],
                        stored[block, row + 1, start:end],
                        stored[block, row + 2, start:end],
                        stored[block, row + 3, start:end],
                        stored[block, row + 4, start:end],
                        stored[block, row + 5, start:end],
                        stored[block, row + 6, start:end],
                        stored[block, row + 7, start:end],
                        absolute, squared, own, top,
                    )  # fmt: skip
                    row += 8
                while row < stop:
                    _add_one(stored[block, row, start:end], absolute, squared, own, top)
                    row += 1
                for i in range(count):
                    after[part, start + i] += absolute[i]
                    after[part + 1, start + i] += squared[i]
                    after[part + 2, start + i] += own[i]
                here = np.int32(block * rows + begin)
                for i in range(count):
                    if top[i] > highest[i]:
                        highest[i] = top[i]
                        found[i] = here
        for i in range(count):
            if found[i] >= 0:
                block, row = found[i] // rows, found[i] % rows
                while abs(_value(stored[block, row], start + i)) != highest[i]:
                    row += 1
                after[PEAK, start + i] = highest[i]
                after[PEAK_AT, start + i] = row // first if first else UNKNOWN


def _value(stored: Any, i: Any) -> Any:
    """An element as float32, of float32 or the bits of bfloat16; inside compiled loops, where the dtype says which."""
    raise NotImplementedError(stored.dtype)


@overload(_value, inline="always")
def _value_by_dtype(stored, i):  # type: ignore[no-untyped-def]  # as its two forms, which have no types
    if stored.dtype.bitwidth == 16:
        return lambda stored, i: np.uint32(np.uint32(stored[i]) << np.uint32(16)).view(np.float32)
    return lambda stored, i: stored[i]


@compiled
def _add_one(stored: Any, absolute: Any, squared: Any, own: Any, top: Any) -> None:
    for i in range(stored.size):
        value = _value(stored, i)
        absolute[i] += abs(value)
        squared[i] += value * value
        own[i] += value
        top[i] = max(top[i], abs(value))


@compiled
def _add_eight(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, absolute: Any, squared: Any, own: Any, top: Any
) -> None:
    for i in range(a.size):
        p, q, r, s = _value(a, i), _value(b, i), _value(c, i), _value(d, i)
        t, u, v, w = _value(e, i), _value(f, i), _value(g, i), _value(h, i)
        absolute[i] = absolute[i] + abs(p) + abs(q) + abs(r) + abs(s) + abs(t) + abs(u) + abs(v) + abs(w)
        squared[i] = squared[i] + p * p + q * q + r * r + s * s + t * t + u * u + v * v + w * w
        own[i] = own[i] + p + q + r + s + t + u + v + w
        low = max(max(abs(p), abs(q)), max(abs(r), abs(s)))
        high = max(max(abs(t), abs(u)), max(abs(v), abs(w)))
        top[i] = max(top[i], max(low, high))


def _add_each() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        numbers = torch.zeros(KEPT, 8, dtype=torch.float64)
        add_rows(torch.ones(2, 7, 8, dtype=dtype), 1, numbers, numbers.clone())


EXAMPLES: dict[str, Callable[[], object]] = {"add_rows": _add_each}
"""See `streaming.twins`."""
