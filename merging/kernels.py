"""Compiled twins of the loops of `merging`; what each does is said there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streaming.kernels import MAGNITUDE_32, bits_of, compiled

PIECE = 4096
"""Elements of each vector that are worked on together."""
COLUMNS = 64
"""Columns that are summed together."""
COUNTED = 64
"""Elements that are looked at together for one that lies in a bracket."""

_scratch = threading.local()


def count_against(values: torch.Tensor, low: int, high: int) -> tuple[int, int, int, Any]:
    """See `merging.methods.trim.count_against`."""
    inside = _room(values.numel() + 1)
    above, at_high, at_low, inside_count = _count(bits_of(values), np.uint32(low), np.uint32(high), inside)
    return above, at_high, at_low if low < high else 0, inside[:inside_count].view(np.int32).copy()


def sum_products(left: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """See `merging.methods.widen.sum_products`."""
    matrices, rows, columns = left.shape
    sums = torch.empty((matrices, columns if dim == -2 else rows), dtype=torch.float64)
    fold = _fold_rows if dim == -2 else _fold_columns
    fold(left.numpy(), other.numpy(), sums.numpy())
    return sums


def count_signs(vectors: torch.Tensor) -> tuple[int, int]:
    """See `merging.report.count_signs`."""
    changed, contested = _count_signs(vectors.numpy())
    return int(changed), int(contested)


def _room(count: int) -> Any:
    """An array of this thread's own, `[count]` uint32, with any content: a new one for each block would be page faults."""
    if not hasattr(_scratch, "room") or _scratch.room.size < count:
        _scratch.room = np.empty(count, dtype=np.uint32)
    return _scratch.room[:count]


@compiled
def _count(bits: Any, low: Any, high: Any, inside: Any) -> Any:
    """How many magnitudes are above a bracket, at its ends, and strictly inside; the last are put into `inside`."""
    above: Any = 0
    at_high: Any = 0
    at_low: Any = 0
    count: Any = 0
    width = high - low - np.uint32(1) if high > low else np.uint32(0)
    for start in range(0, bits.size, COUNTED):
        part = bits[start : start + COUNTED]
        larger, equal, smaller, within = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(part.size):
            magnitude = part[i] & MAGNITUDE_32
            larger += np.uint32(magnitude > high)
            equal += np.uint32(magnitude == high)
            smaller += np.uint32(magnitude == low)
            within |= np.uint32(np.uint32(magnitude - low - np.uint32(1)) < width)
        above, at_high, at_low = above + larger, at_high + equal, at_low + smaller
        if within:
            for i in range(part.size):
                magnitude = part[i] & MAGNITUDE_32
                inside[count] = magnitude  # without a branch, which would be mispredicted
                count += np.uint32(magnitude - low - np.uint32(1)) < width
    return above, at_high, at_low, count


@compiled
def _fold_rows(left: Any, other: Any, sums: Any) -> None:
    """Some columns at a time, whose products the nearest cache holds."""
    matrices, rows, columns = left.shape
    products = np.empty((rows, COLUMNS))
    for matrix in range(matrices):
        for start in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - start)
            for row in range(rows):
                first, second = left[matrix, row, start : start + width], other[matrix, row, start : start + width]
                line = products[row]
                for i in range(first.size):
                    line[i] = np.float64(first[i]) * np.float64(second[i])
            count = rows
            while count > 1:
                half = count // 2
                for row in range(half):
                    lower, upper = products[row], products[count - half + row]
                    for i in range(COLUMNS):
                        lower[i] = lower[i] + upper[i]
                count -= half
            out, line = sums[matrix, start : start + width], products[0]
            for i in range(out.size):
                out[i] = line[i]


@compiled
def _fold_columns(left: Any, other: Any, sums: Any) -> None:
    matrices, rows, columns = left.shape
    products = np.empty(columns)
    for matrix in range(matrices):
        for row in range(rows):
            first, second = left[matrix, row], other[matrix, row]
            for i in range(first.size):
                products[i] = np.float64(first[i]) * np.float64(second[i])
            count = columns
            while count > 1:
                half = count // 2
                lower, upper = products[:half], products[count - half : count]
                for i in range(lower.size):
                    lower[i] = lower[i] + upper[i]
                count -= half
            sums[matrix, row] = products[0]


@compiled
def _count_signs(vectors: Any) -> Any:
    """A piece of all vectors at a time: 1 where one is positive, 2 negative, 4 no number, which counts as neither."""
    flags_room = np.empty(PIECE, np.uint8)
    changed, contested = 0, 0
    for start in range(0, vectors.shape[1], PIECE):
        flags = flags_room[: min(PIECE, vectors.shape[1] - start)]
        for i in range(flags.size):
            flags[i] = np.uint8(0)
        for model in range(vectors.shape[0]):
            values = vectors[model, start : start + PIECE]
            for i in range(flags.size):
                positive, negative = values[i] > np.float32(0.0), values[i] < np.float32(0.0)
                flags[i] |= np.uint8(positive) | (np.uint8(negative) << 1) | (np.uint8(values[i] != values[i]) << 2)
        for i in range(flags.size):
            changed += (flags[i] > 0) & (flags[i] < 4)
            contested += flags[i] == 3
    return changed, contested


def _sum_each() -> None:
    matrix = torch.ones(1, 8, 8)
    for dim in (-2, -1):
        sum_products(matrix, matrix, dim)


EXAMPLES: dict[str, Callable[[], object]] = {
    "count_against": lambda: count_against(torch.ones(64), 1, 2),
    "sum_products": _sum_each,
    "count_signs": lambda: count_signs(torch.ones(2, 64)),
}
"""See `streaming.twins`."""
