"""Compiled twins of the loops of `merging`; what each does is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streaming.elements import FIRST_MULTIPLIER, LOW_32, SECOND_MULTIPLIER, SPREAD
from streaming.kernels import bits_of, compiled, largest_magnitude

BUCKETS = 512
"""Of the magnitudes of a row, largest first: 32 for each power of two, what is smaller than all of them in the last."""
BUCKET_BITS = np.int32(18)
MAGNITUDE = np.int32(0x7FFFFFFF)
NAN_ABOVE = 0x7F800000
TWO_31 = 1 << 31
KEPT, OPEN, DROPPED = 0, 1, 2
GATHER = np.uint64(0x0102040810204080)
"""Brings the lowest bit of each of eight bytes into the highest byte of a product."""


def drop_by_rank_(
    values: torch.Tensor, columns: int, limits: torch.Tensor, keys_of: Callable[[int], tuple[int, int]], start: int
) -> torch.Tensor:
    """See `merging.methods.della.drop_by_rank_`."""
    high = start >> 32
    bits = bits_of(values)
    is_plain = (start + values.numel() - 1) >> 32 == high
    if not (is_plain and largest_magnitude(bits) <= NAN_ABOVE):
        from merging.methods import della

        plain: Callable[..., torch.Tensor] = della.drop_by_rank_.__wrapped__  # type: ignore[attr-defined]
        return plain(values, columns, limits, keys_of, start)
    first, second = (np.uint32(key & LOW_32) for key in keys_of(high))
    kept = np.empty((values.numel() // columns, -(-columns // 8)), dtype=np.uint8)
    _drop_rows(values.numpy(), bits.view(np.int32), columns, limits.numpy(), first, second, start & LOW_32, kept)
    return torch.from_numpy(kept)


def keep_marked_(values: torch.Tensor, columns: int, kept: torch.Tensor) -> None:
    """See `merging.methods.della.keep_marked_`."""
    _keep_rows(values.numpy(), columns, kept.numpy())


# One loop for each step of a row, which the nearest cache holds: side by side in one loop they take three times as long.


@compiled
def _drop_rows(
    values: Any, bits: Any, columns: int, limits: Any, first: Any, second: Any, start: int, kept: Any
) -> None:
    drawn = np.empty(columns, dtype=np.uint32)
    magnitudes = np.empty(columns, dtype=np.int32)
    buckets = np.empty(columns, dtype=np.uint16)
    standing = np.empty(columns, dtype=np.uint8)
    is_kept = np.zeros(8 * kept.shape[1], dtype=np.uint8)
    counts = np.empty(BUCKETS, dtype=np.int32)
    surely, maybe = np.zeros(BUCKETS, dtype=np.int64), np.zeros(BUCKETS, dtype=np.int64)
    for begin in range(0, values.size, columns):
        _draw(drawn, np.uint32(start + begin), first, second)
        _sort_into_buckets(bits[begin : begin + columns], magnitudes, buckets, counts)
        # Ranks of a bucket are those behind all smaller ones: below the limit of its first all its elements are kept, from that of its last on none.
        below = 0
        for bucket in range(BUCKETS - 1, -1, -1):
            if counts[bucket]:
                surely[bucket] = limits[2 * below] + TWO_31
                maybe[bucket] = limits[2 * (below + counts[bucket] - 1)] + TWO_31
            below += counts[bucket]
        if _decide(drawn, buckets, surely, maybe, standing):
            _look_at_the_row(drawn, magnitudes, buckets, limits, standing)
        row = values[begin : begin + columns]
        for i in range(columns):
            is_kept[i] = np.uint8(standing[i] == KEPT) & np.uint8(magnitudes[i] != 0)
        for i in range(columns):
            row[i] = row[i] * np.float32(is_kept[i])
        _pack(is_kept.view(np.uint64), kept[begin // columns])


@compiled
def _draw(drawn: Any, index: Any, first: Any, second: Any) -> None:
    """`streaming.elements.hash_of` of the indices from one on, as unsigned numbers."""
    for i in range(drawn.size):
        x = np.uint32(np.uint32(index + np.uint32(i)) * np.uint32(SPREAD & LOW_32)) ^ first
        x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(FIRST_MULTIPLIER & LOW_32))
        x = x ^ (x >> np.uint32(15)) ^ second
        drawn[i] = np.uint32(x * np.uint32(SECOND_MULTIPLIER & LOW_32))


@compiled
def _sort_into_buckets(bits: Any, magnitudes: Any, buckets: Any, counts: Any) -> None:
    """The magnitude of each element, its bucket, and how many each bucket has."""
    top: Any = np.int32(0)
    for i in range(bits.size):
        magnitudes[i] = bits[i] & MAGNITUDE
        top = max(top, magnitudes[i])
    ceiling = np.int32(top >> BUCKET_BITS)
    for i in range(bits.size):
        buckets[i] = np.uint16(min(np.int32(ceiling - (magnitudes[i] >> BUCKET_BITS)), np.int32(BUCKETS - 1)))
    counts[:] = 0
    for i in range(bits.size):
        counts[buckets[i]] += 1


@compiled
def _decide(drawn: Any, buckets: Any, surely: Any, maybe: Any, standing: Any) -> Any:
    """Which elements are kept, are open, or are not, by what is known of their buckets; whether any is open."""
    for i in range(drawn.size):
        at, number = buckets[i], np.int64(drawn[i])
        standing[i] = np.uint8(number >= surely[at]) + np.uint8(number >= maybe[at])
    any_open = np.uint8(0)
    for i in range(drawn.size):
        any_open = np.uint8(any_open | (standing[i] & OPEN))
    return any_open


@compiled
def _look_at_the_row(drawn: Any, magnitudes: Any, buckets: Any, limits: Any, standing: Any) -> None:
    """Decide what is open: one element in hundreds, and one look for the equal ones of a bucket. Zeros stay zeros, kept or not."""
    known, limit = np.zeros(BUCKETS, dtype=np.int32), np.zeros(BUCKETS, dtype=np.int64)
    for i in range(drawn.size):
        if standing[i] == OPEN and magnitudes[i]:
            magnitude, bucket = magnitudes[i], buckets[i]
            if known[bucket] != magnitude:
                known[bucket], limit[bucket] = magnitude, limits[_twice_the_rank(magnitudes, magnitude)] + TWO_31
            standing[i] = KEPT if np.int64(drawn[i]) < limit[bucket] else DROPPED


@compiled
def _pack(flags: Any, packed: Any) -> None:
    """A bit for each byte that is 1, the lowest first, of eight bytes at a time."""
    for i in range(flags.size):
        packed[i] = np.uint8((flags[i] * GATHER) >> np.uint64(56))


@compiled
def _keep_rows(values: Any, columns: int, kept: Any) -> None:
    for row in range(values.size // columns):
        begin, bits = row * columns, kept[row]
        for i in range(columns):
            values[begin + i] *= np.float32((bits[i >> 3] >> (i & 7)) & 1)


@compiled
def _twice_the_rank(magnitudes: Any, magnitude: Any) -> Any:
    """Twice the mean rank of the elements of one magnitude."""
    both = np.int32(0)  # of the size of a magnitude, so that as many are compared at a time as a register holds
    for i in range(magnitudes.size):
        both = np.int32(both + np.int32(magnitudes[i] < magnitude) + np.int32(magnitudes[i] <= magnitude))
    return np.int64(both) - 1


def _drop_each() -> None:
    values, limits = torch.ones(16), torch.zeros(15, dtype=torch.int64)
    drop_by_rank_(values, 8, limits, lambda high: (1, 2), 0)


def _keep_each() -> None:
    keep_marked_(torch.ones(16), 8, torch.zeros(2, 1, dtype=torch.uint8))


EXAMPLES: dict[str, Callable[[], object]] = {
    "drop_by_rank_": _drop_each,
    "keep_marked_": _keep_each,
}
"""See `streaming.twins`."""
