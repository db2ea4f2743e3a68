"""Exact trimming: which elements of a task vector are the k largest in magnitude, found by streaming."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from streaming.blocks import GRID_ELEMENTS, Block, Region, Scan, TensorSpec, tile

MAGNITUDE_BITS = 0x7FFFFFFF
ABOVE_ALL = 0x7F800001  # one more than the bits of infinity
SAMPLED_PER_BLOCK = 4096
SIGMAS = 6.0


@dataclass(frozen=True, slots=True)
class Trim:
    """Keeps every magnitude above a threshold, and at the threshold those up to an index: exactly k elements.

    threshold: the k-th largest |d|, as the integer that its float32 bits spell (order is the same).
    last_kept: flat index, in the tensor, of the last element kept among those equal to the threshold.
    """

    threshold: int
    last_kept: int

    def apply_(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Set to zero what is not kept, in place.

        Args:
            values: `[n]` float32, the elements `start` to `start + n` of the task vector.
            start: flat index of the first.
        """
        keeps_equal = min(max(self.last_kept + 1 - start, 0), values.numel())
        head, tail = values[:keeps_equal], values[keeps_equal:]
        head.masked_fill_(magnitude_bits(head) < self.threshold, 0.0)
        tail.masked_fill_(magnitude_bits(tail) <= self.threshold, 0.0)
        return values


KEEP_ALL = Trim(threshold=0, last_kept=1 << 62)
KEEP_NONE = Trim(threshold=MAGNITUDE_BITS, last_kept=-1)


def magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    """|values| as integers in the same order: the bits of a float32 without its sign. `[n]` float32 -> `[n]` int32."""
    return values.view(torch.int32) & MAGNITUDE_BITS


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Magnitudes between which the threshold is looked for, `low` <= threshold <= `high`, as bits."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class _Count:
    """One block of one task vector against a bracket."""

    above: int
    at_high: int
    inside: torch.Tensor  # `[few]` int32, bits strictly inside the bracket, in order of their index
    at_low: int

    def equal_to(self, bits: int, bracket: _Bracket) -> int:
        if bits == bracket.high:
            return self.at_high
        return self.at_low if bits == bracket.low else int((self.inside == bits).sum())


def measure_trims(tensor: TensorSpec, scan: Scan, densities: Sequence[float]) -> tuple[Trim, ...]:
    """Find, for each task vector, the trim that keeps its int(density * numel) largest magnitudes.

    Of equal magnitudes the lower index is kept. Two readings and a little: a sample (4096 elements of each block)
    brackets the threshold, one full reading counts what lies above the bracket and collects what lies in it; where
    equal magnitudes straddle the threshold, the one block in which they are cut off is read again. A bracket that
    misses (an unlucky sample) is widened and counted again: the result is exact in any case.

    Args:
        tensor: the tensor to be trimmed.
        scan: reads its blocks; see `Scan`.
        densities: per model, the share to keep, in [0, 1].
    """
    n = tensor.numel
    kept = [int(density * n) for density in densities]
    trims = [KEEP_ALL if k >= n else KEEP_NONE if k == 0 else None for k in kept]
    open_models = [model for model, trim in enumerate(trims) if trim is None]
    if not open_models:
        return tuple(trim for trim in trims if trim is not None)
    grid = list(tile(tensor, GRID_ELEMENTS))
    brackets = _sample_brackets(scan, grid, {model: kept[model] / n for model in open_models})
    while brackets:
        counts = _count(scan, grid, brackets)
        missed = {}
        for model, bracket in brackets.items():
            found = _locate(counts[model], bracket, kept[model])
            if isinstance(found, _Bracket):
                missed[model] = found
            else:
                trims[model] = _finish(scan, grid, model, found, counts[model], bracket)
        brackets = missed
    return tuple(trim for trim in trims if trim is not None)


def _sample_brackets(scan: Scan, grid: Sequence[Region], densities: dict[int, float]) -> dict[int, _Bracket]:
    """Bracket each model's threshold by the order statistics of a sample; exactly where the sample is the whole tensor."""
    pieces = [Region(r.tensor, r.start, r.start + _piece(r)) for r in grid] if len(grid) > 1 else list(grid)

    def sample(block: Block) -> dict[int, torch.Tensor]:
        return {model: magnitude_bits(block.task_vectors[model]).cpu() for model in densities}

    samples = list(scan(sample, pieces))
    brackets = {}
    for model, density in densities.items():
        values = torch.cat([piece[model] for piece in samples]).sort(descending=True).values
        count = len(values)
        margin = math.ceil(SIGMAS * math.sqrt(count * density * (1 - density))) + 1 if len(grid) > 1 else 0
        rank = int(density * grid[0].tensor.numel) - 1 if len(grid) == 1 else int(density * count)
        high = int(values[rank - margin]) if rank - margin >= 0 else ABOVE_ALL
        low = int(values[rank + margin]) if rank + margin < count else 0
        brackets[model] = _Bracket(low, high)
    return brackets


def _piece(region: Region) -> int:
    """Elements sampled of a block: whole rows where a row is shorter than the piece."""
    columns = region.tensor.columns
    if region.numel < columns or columns >= SAMPLED_PER_BLOCK:
        return min(region.numel, SAMPLED_PER_BLOCK)
    return min(region.numel, SAMPLED_PER_BLOCK // columns * columns)


def _count(scan: Scan, grid: Sequence[Region], brackets: dict[int, _Bracket]) -> dict[int, list[_Count]]:
    """Read everything once; per model, one count for each block of the grid."""

    def count(block: Block) -> dict[int, _Count]:
        return {model: _count_block(block.task_vectors[model], bracket) for model, bracket in brackets.items()}

    counts: dict[int, list[_Count]] = {model: [] for model in brackets}
    for partial in scan(count, grid):
        for model, one in partial.items():
            counts[model].append(one)
    return counts


def _count_block(values: torch.Tensor, bracket: _Bracket) -> _Count:
    bits = magnitude_bits(values)
    not_below = bits >= bracket.low
    near = bits[not_below & (bits <= bracket.high)]
    inside = near[(near > bracket.low) & (near < bracket.high)]
    at_high = int((near == bracket.high).sum())
    at_low = near.numel() - inside.numel() - at_high if bracket.low < bracket.high else 0
    return _Count(int(not_below.sum()) - near.numel(), at_high, inside.cpu(), at_low)


def _locate(counts: Sequence[_Count], bracket: _Bracket, k: int) -> tuple[int, int] | _Bracket:
    """The threshold's bits and how many elements equal to it are kept; or the next bracket, where this one missed."""
    left = k - sum(count.above for count in counts)
    if left <= 0:
        return _Bracket(bracket.high, ABOVE_ALL)
    for bits, number in _descending(counts, bracket):
        if left <= number:
            return bits, left
        left -= number
    return _Bracket(0, bracket.low)


def _descending(counts: Sequence[_Count], bracket: _Bracket) -> Iterator[tuple[int, int]]:
    """The magnitudes in the bracket with how often each occurs, largest first."""
    yield bracket.high, sum(count.at_high for count in counts)
    inside = torch.cat([count.inside for count in counts])
    values, numbers = torch.unique(inside, return_counts=True)
    yield from zip(values.flip(0).tolist(), numbers.flip(0).tolist(), strict=True)
    if bracket.low < bracket.high:
        yield bracket.low, sum(count.at_low for count in counts)


def _finish(
    scan: Scan, grid: Sequence[Region], model: int, found: tuple[int, int], counts: Sequence[_Count], bracket: _Bracket
) -> Trim:
    """Find the index of the last element kept at the threshold: the `left`-th of those equal to it."""
    bits, left = found
    equal = torch.tensor([count.equal_to(bits, bracket) for count in counts])
    block_index = int(torch.searchsorted(equal.cumsum(0), left))
    nth = left - int(equal[:block_index].sum())

    def position(block: Block) -> int:
        return int((magnitude_bits(block.task_vectors[model]) == bits).nonzero()[nth - 1])

    region = grid[block_index]
    return Trim(bits, region.start + next(iter(scan(position, [region]))))
