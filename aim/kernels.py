"""Compiled twins of the loops of `aim`; what each does is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic, overload

from aim.sums import KEPT, PEAK, PEAK_AT, SUMMED_AT_ONCE, UNKNOWN
from streaming.kernels import compiled
from streaming.sums import lanes_of_rows

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


def take_rows_back(
    base: torch.Tensor, merged: torch.Tensor, u: torch.Tensor, omega: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `aim.directions.take_rows_back`."""
    pulled = torch.empty_like(merged)
    along, squares = (torch.empty(merged.shape[:2], dtype=torch.float64) for _ in range(2))
    lanes = lanes_of_rows(1, merged.shape[-1]).each
    given = (one.numpy() for one in (base, merged, u.contiguous(), pulled, along, squares))
    _take_rows_back(*given, 1.0 - omega, lanes)
    return pulled, along, squares


@compiled
def _take_rows_back(
    base: Any, merged: Any, u: Any, pulled: Any, along: Any, squares: Any, share: Any, lanes: Any
) -> None:
    matrices, rows, columns = merged.shape
    answer, square = np.empty(lanes), np.empty(lanes)
    narrow = np.empty(columns, np.float32)
    for matrix in range(matrices):
        own = u[matrix if u.shape[0] > 1 else 0]
        for i in range(columns):
            narrow[i] = np.float32(own[i])
        for row in range(rows):
            start, end, out = base[matrix, row], merged[matrix, row], pulled[matrix, row]
            answer[:] = 0
            square[:] = 0
            for first in range(0, columns, lanes):
                last = min(first + lanes, columns)
                _add_change(start[first:last], end[first:last], own[first:last], answer, square)
            whole = _fold(answer)
            if not np.isfinite(whole):
                whole = 0.0
            along[matrix, row] = whole
            squares[matrix, row] = _fold(square)
            back = np.float32(-(whole * share))
            for i in range(columns):
                out[i] = _multiply_add(back, narrow[i], end[i])


@intrinsic
def _multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 with one rounding, as torch's `addcmul` has it."""
    return types.float32(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)


@compiled
def _add_change(start: Any, end: Any, u: Any, answer: Any, square: Any) -> None:
    """One turn of the lanes (`streaming.sums.deal`)."""
    for i in range(start.size):
        change = np.float64(end[i] - start[i])
        answer[i] += change * u[i]
        square[i] += change * change


@compiled
def _fold(lanes: Any) -> Any:
    """See `streaming.sums.fold`."""
    count = lanes.size
    while count > 1:
        half = count // 2
        for i in range(half):
            lanes[i] += lanes[count - half + i]
        count -= half
    return lanes[0]


def _take_back_each() -> None:
    rows = torch.ones(2, 3, 4)
    take_rows_back(rows, rows.clone(), torch.ones(1, 4, dtype=torch.float64), 0.5)


def _add_each() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        numbers = torch.zeros(KEPT, 8, dtype=torch.float64)
        add_rows(torch.ones(2, 7, 8, dtype=dtype), 1, numbers, numbers.clone())


EXAMPLES: dict[str, Callable[[], object]] = {
    "add_rows": _add_each,
    "take_rows_back": _take_back_each,
}
"""See `streaming.twins`."""
