"""Exact trimming: which elements of a task vector are the k largest in magnitude, found by streaming."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from streaming.blocks import GRID_ELEMENTS, Block, Region, Scan, TensorSpec, tile

MAGNITUDE_BITS = 0x7FFFFFFF
INFINITY_BITS = 0x7F800000
ABOVE_ALL = INFINITY_BITS + 1
SAMPLED_PER_BLOCK = 1024
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
        if self.threshold > 0:
            keep_above_(head, self.threshold - 1)
        keep_above_(tail, self.threshold)
        return values


KEEP_ALL = Trim(threshold=0, last_kept=1 << 62)
KEEP_NONE = Trim(threshold=INFINITY_BITS, last_kept=-1)


def keep_above_(values: torch.Tensor, bits: int) -> None:
    """Set to zero what is not larger in magnitude than the float32 that `bits` spells, in place: `[n]` float32."""
    if values.numel():
        threshold = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
        # Forty times faster than a fill by mask, whose branches on random data are mispredicted.
        torch.ops.aten.hardshrink.out(values, threshold, out=values)


def magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    """|values| as integers in the same order: the bits of a float32 without its sign. `[n]` float32 -> `[n]` int32."""
    return values.view(torch.int32) & MAGNITUDE_BITS


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Magnitudes between which the threshold is looked for, `low` <= threshold <= `high`, as bits."""

    low: int
    high: int


class _Tally:
    """Counts of one task vector's blocks against a bracket, in the order of the blocks.

    What lies inside the bracket is joined at once into one array: many small arrays that live on between the large ones
    that come and go would keep the allocator from using the memory of those again.
    """

    def __init__(self, bracket: _Bracket):
        self.bracket = bracket
        self.above = 0
        self._at_high: list[int] = []
        self._at_low: list[int] = []
        self._inside = bytearray()
        self._ends: list[int] = []

    def add(self, count: _Count) -> None:
        self.above += count.above
        self._at_high.append(count.at_high)
        self._at_low.append(count.at_low)
        self._inside += count.inside.tobytes()
        self._ends.append(len(self._inside) // 4)

    def descending(self) -> Iterator[tuple[int, int]]:
        """The magnitudes in the bracket with how often each occurs, largest first."""
        yield self.bracket.high, sum(self._at_high)
        values, numbers = np.unique(np.frombuffer(self._inside, dtype=np.int32), return_counts=True)
        yield from zip(values[::-1].tolist(), numbers[::-1].tolist(), strict=True)
        if self.bracket.low < self.bracket.high:
            yield self.bracket.low, sum(self._at_low)

    def equal_per_block(self, bits: int) -> np.ndarray:
        """How many elements of each block equal `bits`, which lies in the bracket: `[blocks]` int64."""
        if bits == self.bracket.high:
            return np.array(self._at_high)
        if bits == self.bracket.low:
            return np.array(self._at_low)
        positions = np.flatnonzero(np.frombuffer(self._inside, dtype=np.int32) == bits)
        return np.diff(np.searchsorted(positions, self._ends), prepend=0)


class _Count(NamedTuple):
    """One block of one task vector against a bracket; `inside` has the bits strictly inside it, `[few]` int32, in order."""

    above: int
    at_high: int
    at_low: int
    inside: np.ndarray


def measure_trims(tensor: TensorSpec, scan: Scan, densities: Sequence[float]) -> tuple[Trim, ...]:
    """Find, for each task vector, the trim that keeps its int(density * numel) largest magnitudes.

    Of equal magnitudes the lower index is kept. Two readings and a little: a sample (1024 elements of each block)
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
        tallies = _count(scan, grid, brackets)
        missed = {}
        for model in brackets:
            found = _locate(tallies[model], kept[model])
            if isinstance(found, _Bracket):
                missed[model] = found
            else:
                trims[model] = _finish(scan, grid, model, *found, tallies[model])
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
        values = torch.cat([piece[model] for piece in samples]).numpy()
        count = len(values)
        margin = math.ceil(SIGMAS * math.sqrt(count * density * (1 - density))) + 1 if len(grid) > 1 else 0
        rank = int(density * grid[0].tensor.numel) - 1 if len(grid) == 1 else int(density * count)
        first, last = count - 1 - (rank + margin), count - 1 - (rank - margin)  # in ascending order
        values.partition([min(max(position, 0), count - 1) for position in (first, last)])
        high = int(values[last]) if last < count else ABOVE_ALL
        low = int(values[first]) if first >= 0 else 0
        brackets[model] = _Bracket(low, high)
    return brackets


def _piece(region: Region) -> int:
    """Elements sampled of a block: whole rows where a row is shorter than the piece."""
    columns = region.tensor.columns
    if region.numel < columns or columns >= SAMPLED_PER_BLOCK:
        return min(region.numel, SAMPLED_PER_BLOCK)
    return min(region.numel, SAMPLED_PER_BLOCK // columns * columns)


def _count(scan: Scan, grid: Sequence[Region], brackets: dict[int, _Bracket]) -> dict[int, _Tally]:
    """Read everything once and count each model's magnitudes against its bracket."""

    def count(block: Block) -> dict[int, _Count]:
        return {model: _count_block(block.task_vectors[model], bracket) for model, bracket in brackets.items()}

    tallies = {model: _Tally(bracket) for model, bracket in brackets.items()}
    for partial in scan(count, grid):
        for model, one in partial.items():
            tallies[model].add(one)
    return tallies


def _count_block(values: torch.Tensor, bracket: _Bracket) -> _Count:
    tensor = magnitude_bits(values)
    # On the CPU numpy compares and picks several times faster than torch does; the operators are the same.
    bits: Any = tensor.numpy() if tensor.device.type == "cpu" else tensor
    above = bits > bracket.high
    near = torch.as_tensor(bits[(bits >= bracket.low) & ~above]).cpu().numpy()
    inside = near[(near > bracket.low) & (near < bracket.high)]
    at_high = int(np.count_nonzero(near == bracket.high))
    at_low = len(near) - len(inside) - at_high if bracket.low < bracket.high else 0
    return _Count(int(above.sum()), at_high, at_low, inside)


def _locate(tally: _Tally, k: int) -> tuple[int, int] | _Bracket:
    """The threshold's bits and how many elements equal to it are kept; or the next bracket, where this one missed."""
    left = k - tally.above
    if left <= 0:
        return _Bracket(tally.bracket.high, ABOVE_ALL)
    for bits, number in tally.descending():
        if left <= number:
            return bits, left
        left -= number
    return _Bracket(0, tally.bracket.low)


def _finish(scan: Scan, grid: Sequence[Region], model: int, bits: int, left: int, tally: _Tally) -> Trim:
    """Find the index of the last element kept at the threshold: the `left`-th of those equal to it."""
    equal = tally.equal_per_block(bits)
    block_index = int(np.searchsorted(equal.cumsum(), left))
    nth = left - int(equal[:block_index].sum())

    def position(block: Block) -> int:
        return int((magnitude_bits(block.task_vectors[model]) == bits).nonzero()[nth - 1])

    region = grid[block_index]
    return Trim(bits, region.start + next(iter(scan(position, [region]))))
