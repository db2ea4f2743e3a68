"""Compiled twins of the loops of `merging`; what each does is said there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from merging.randomness import FIRST_MULTIPLIER, SECOND_MULTIPLIER, SPREAD
from streaming.kernels import MAGNITUDE_32, bits_of, compiled

LOW_32 = 0xFFFFFFFF
PIECE = 4096
"""Elements of each vector that are worked on together."""
COLUMNS = 64
"""Columns that are summed together."""
COUNTED = 64
"""Elements that are looked at together for one that lies in a bracket."""
MULTIPLIERS = tuple(np.uint32(one & LOW_32) for one in (SPREAD, FIRST_MULTIPLIER, SECOND_MULTIPLIER))

_scratch = threading.local()


def weighted_sum(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """See `merging.methods.linear.weighted_sum`."""
    total = vectors[0].numpy()
    _scale(total, np.float32(weights[0]))
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        _add_scaled(total, vector.numpy(), np.float32(weight))
    return vectors[0]


def add_to_base(base: torch.Tensor, delta: torch.Tensor, lambda_: float) -> torch.Tensor:
    """See `merging.methods.task_arithmetic.add_to_base`."""
    _scale_and_add(delta.numpy(), base.numpy(), np.float32(lambda_))
    return delta


def elect_and_sum(vectors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """See `merging.methods.signs.elect_and_sum`. Compiled anew for each number of models."""
    agreed = torch.empty(vectors[0].shape)
    _elect(tuple(vector.numpy() for vector in vectors), np.array(weights, np.float32), normalize, agreed.numpy())
    return agreed


def keep_above_(values: torch.Tensor, bits: int) -> None:
    """See `merging.methods.trim.keep_above_`."""
    _keep_above(bits_of(values), np.uint32(bits))


def count_against(values: torch.Tensor, low: int, high: int) -> tuple[int, int, int, Any]:
    """See `merging.methods.trim.count_against`."""
    inside = _room(values.numel() + 1)
    above, at_high, at_low, inside_count = _count(bits_of(values), np.uint32(low), np.uint32(high), inside)
    return above, at_high, at_low if low < high else 0, inside[:inside_count].view(np.int32).copy()


def keep_below_(values: torch.Tensor, start: int, key: tuple[int, int], threshold: int, divisor: float | None) -> None:
    """See `merging.randomness.keep_below_`."""
    if threshold < 1 << 32:
        keys = (np.uint32(half & LOW_32) for half in key)
        _keep_below(bits_of(values), np.uint32(start & LOW_32), *keys, np.uint32(threshold), *MULTIPLIERS)
    if divisor is not None:
        _divide_by(values.numpy(), np.float32(divisor))


def sum_products(left: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """See `merging.methods.widen.sum_products`."""
    matrices, rows, columns = left.shape
    sums = torch.empty((matrices, columns if dim == -2 else rows), dtype=torch.float64)
    fold = _fold_rows if dim == -2 else _fold_columns
    fold(left.numpy(), other.numpy(), sums.numpy())
    return sums


def add_weighed(
    base: torch.Tensor, task_vectors: Sequence[torch.Tensor], scores: Sequence[torch.Tensor]
) -> torch.Tensor:
    """See `merging.methods.widen.add_weighed`."""
    total = torch.zeros_like(base)
    for values, score in zip(task_vectors, scores, strict=True):
        _add_weighed(total.view(values.shape).numpy(), values.numpy(), score.expand(values.shape).numpy())
    _add(total.numpy(), base.numpy())
    return total


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
def _scale(values: Any, factor: Any) -> None:
    for i in range(values.size):
        values[i] = values[i] * factor


@compiled
def _add_scaled(total: Any, values: Any, factor: Any) -> None:
    for i in range(total.size):
        total[i] = total[i] + values[i] * factor


@compiled
def _scale_and_add(values: Any, base: Any, factor: Any) -> None:
    for i in range(values.size):
        values[i] = values[i] * factor + base[i]


@compiled
def _divide_by(values: Any, divisor: Any) -> None:
    for i in range(values.size):
        values[i] = values[i] / divisor


@compiled
def _elect(vectors: Any, weights: Any, normalize: bool, agreed: Any) -> None:
    """A piece of all vectors at a time, which the nearest cache holds."""
    total_room = np.empty(PIECE, np.float32)
    divisor_room = np.empty(PIECE, np.float32)
    for start in range(0, agreed.size, PIECE):
        out = agreed[start : start + PIECE]
        total, divisor = total_room[: out.size], divisor_room[: out.size]
        for i in range(out.size):
            total[i], divisor[i], out[i] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for model in range(len(vectors)):
            values, weight = vectors[model][start : start + PIECE], weights[model]
            for i in range(out.size):
                values[i] = values[i] * weight
                total[i] = total[i] + values[i]
        for i in range(out.size):
            total[i] = np.float32(1.0) if total[i] >= np.float32(0.0) else np.float32(-1.0)
        for model in range(len(vectors)):
            values, weight = vectors[model][start : start + PIECE], weights[model]
            for i in range(out.size):
                turned = values[i] * total[i]
                out[i] = out[i] + (np.float32(0.0) if turned < np.float32(0.0) else turned)
                divisor[i] = divisor[i] + (weight if turned > np.float32(0.0) else np.float32(0.0))
        for i in range(out.size):
            out[i] = out[i] * total[i]
        if normalize:
            for i in range(out.size):
                out[i] = out[i] / (np.float32(1.0) if divisor[i] == np.float32(0.0) else divisor[i])


@compiled
def _keep_above(bits: Any, least: Any) -> None:
    for i in range(bits.size):
        bits[i] = bits[i] if (bits[i] & MAGNITUDE_32) > least else np.uint32(0)


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
def _keep_below(
    bits: Any, start: Any, first_key: Any, second_key: Any, threshold: Any, spread: Any, first: Any, second: Any
) -> None:
    """`merging.randomness.hash_indices`, and what it decides."""
    for i in range(bits.size):
        x = np.uint32((start + np.uint32(i)) * spread) ^ first_key
        x ^= x >> np.uint32(16)
        x = np.uint32(x * first)
        x ^= x >> np.uint32(15)
        x = np.uint32((x ^ second_key) * second)
        bits[i] = bits[i] if x < threshold else np.uint32(0)


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
def _add_weighed(total: Any, values: Any, scores: Any) -> None:
    matrices, rows, _ = total.shape
    for matrix in range(matrices):
        for row in range(rows):
            out, added, factors = total[matrix, row], values[matrix, row], scores[matrix, row]
            for i in range(out.size):
                out[i] = out[i] + added[i] * factors[i]


@compiled
def _add(total: Any, values: Any) -> None:
    for i in range(total.size):
        total[i] = total[i] + values[i]


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


def _elect_each() -> None:
    for count in (2, 3):
        elect_and_sum([torch.ones(64) for _ in range(count)], [1.0] * count, normalize=True)


def _sum_each() -> None:
    matrix = torch.ones(1, 8, 8)
    for dim in (-2, -1):
        sum_products(matrix, matrix, dim)


def _weigh_each() -> None:
    matrix = torch.ones(1, 8, 8)
    for score in (torch.ones(1, 1, 8), torch.ones(1, 8, 1), matrix):
        add_weighed(matrix.view(-1), [matrix], [score])


EXAMPLES: dict[str, Callable[[], object]] = {
    "weighted_sum": lambda: weighted_sum([torch.ones(64), torch.ones(64)], [1.0, 1.0]),
    "add_to_base": lambda: add_to_base(torch.ones(64), torch.ones(64), 1.0),
    "elect_and_sum": _elect_each,
    "keep_above_": lambda: keep_above_(torch.ones(64), 1),
    "count_against": lambda: count_against(torch.ones(64), 1, 2),
    "keep_below_": lambda: keep_below_(torch.ones(64), 0, (1, 2), 3, 0.5),
    "sum_products": _sum_each,
    "add_weighed": _weigh_each,
    "count_signs": lambda: count_signs(torch.ones(2, 64)),
}
"""See `streaming.twins`."""
