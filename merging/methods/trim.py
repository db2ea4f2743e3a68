"""Exact trimming: which elements of a task vector are the k largest in magnitude, found by streaming."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streaming.blocks import GRID_ELEMENTS, Region, Scan, TensorSpec, tile
from streaming.elements import Element, Number, Question, ask, magnitude_bits

INFINITY_BITS = 0x7F800000
ABOVE_ALL = INFINITY_BITS + 1
PIECE_ELEMENTS = 1024
MIN_PIECES = 64
WHOLE_ELEMENTS = 4 * MIN_PIECES * PIECE_ELEMENTS
SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class Trim:
    """Keeps every magnitude above a threshold, and at the threshold those up to an index: exactly k elements.

    Attributes:
        threshold: the k-th largest |d|, as the integer that its float32 bits spell (order is the same).
        last_kept: flat index, in the tensor, of the last element kept among those equal to the threshold.
    """

    threshold: int
    last_kept: int

    def keeps(self, x: Element, value: Number) -> Number:
        """Whether an element is kept.

        Args:
            value: its task vector's number, float32.
        """
        # Up to the last index the threshold itself is above the bound.
        return magnitude_bits(value) > x.integer(self.threshold) - x.is_up_to(self.last_kept)


KEEP_ALL = Trim(threshold=0, last_kept=1 << 62)
KEEP_NONE = Trim(threshold=INFINITY_BITS, last_kept=-1)


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

    def add(self, above: int, at_high: int, at_low: int, inside: np.ndarray) -> None:
        """Add a block: how many magnitudes are above the bracket and at its ends, and the bits of those inside, in order."""
        self.above += above
        self._at_high.append(at_high)
        self._at_low.append(at_low)
        self._inside += inside.tobytes()
        self._ends.append(len(self._inside) // 4)

    def descending(self) -> tuple[np.ndarray, np.ndarray]:
        """The magnitudes in the bracket, largest first, and how often each occurs."""
        values, numbers = np.unique(np.frombuffer(self._inside, dtype=np.int32), return_counts=True)
        ends = 1 if self.bracket.low < self.bracket.high else 0  # both ends are one where the bracket is a point
        return (
            np.concatenate(([self.bracket.high], values[::-1], [self.bracket.low] * ends)).astype(np.int64),
            np.concatenate(([sum(self._at_high)], numbers[::-1], [sum(self._at_low)] * ends)).astype(np.int64),
        )

    def equal_per_block(self, bits: int) -> np.ndarray:
        """How many elements of each block equal `bits`, which lies in the bracket: `[blocks]` int64."""
        if bits == self.bracket.high:
            return np.array(self._at_high)
        if bits == self.bracket.low:
            return np.array(self._at_low)
        positions = np.flatnonzero(np.frombuffer(self._inside, dtype=np.int32) == bits)
        return np.diff(np.searchsorted(positions, self._ends), prepend=0)


def measure_trims(tensor: TensorSpec, scan: Scan, densities: Sequence[float]) -> tuple[Trim, ...]:
    """Find, for each task vector, the trim that keeps its int(density * numel) largest magnitudes; see `measure_largest`."""
    return measure_largest(tensor, scan, [int(density * tensor.numel) for density in densities])


def task_vectors(x: Element) -> Sequence[Number]:
    """What is trimmed mostly."""
    return x.models


def measure_largest(
    tensor: TensorSpec,
    scan: Scan,
    kept: Sequence[int],
    values: Callable[[Element], Sequence[Number]] = task_vectors,
) -> tuple[Trim, ...]:
    """Find, for each task vector, the trim that keeps so many of its largest magnitudes.

    Of equal magnitudes the lower index is kept. One reading and a little: a sample (about one element in 128) brackets
    the threshold, a full reading counts what lies above the bracket and collects what lies in it, and the one block in
    which equal magnitudes are cut off is read again. A bracket that misses (an unlucky sample) is widened and counted
    again, in the end to everything: the result is exact in any case.

    Args:
        tensor: the tensor to be trimmed.
        scan: reads its blocks; see `Scan`.
        kept: per task vector, the number of elements to keep.
        values: what is trimmed, in place of the task vectors: float32 of an element.
    """
    n = tensor.numel
    trims = [KEEP_ALL if k >= n else KEEP_NONE if k == 0 else None for k in kept]
    open_models = [model for model, trim in enumerate(trims) if trim is None]
    if not open_models:
        return tuple(trim for trim in trims if trim is not None)
    grid = list(tile(tensor, GRID_ELEMENTS))
    samples = _take_samples(scan, tensor, {model: kept[model] / n for model in open_models}, kept, values)
    widening = 1
    while samples:
        tallies = _count(scan, grid, {model: sample.bracket(widening) for model, sample in samples.items()}, values)
        for model, tally in tallies.items():
            located = _locate(tally, kept[model])
            if located is not None:
                trims[model] = _finish(scan, grid, functools.partial(_value_of, values, model), *located, tally)
                del samples[model]
        widening *= 4
    return tuple(trim for trim in trims if trim is not None)


def _value_of(values: Callable[[Element], Sequence[Number]], model: int, x: Element) -> Number:
    return values(x)[model]


class _Sample:
    """A sample of one task vector's magnitudes, which tells about where its k-th largest is.

    Args:
        pieces: `[pieces, elements]` int32 magnitudes.
        density: share of the tensor that is kept.
        exact: the sample is the whole tensor, and the k-th largest is known.
    """

    def __init__(self, pieces: np.ndarray, density: float, k: int, *, exact: bool):
        self._sorted = np.sort(pieces, axis=None)
        count = self._sorted.size
        self._rank = k - 1 if exact else int(density * count)  # from the largest
        self._margin = 0.0
        if not exact:
            # Rows and columns differ in scale, so what counts is how much the pieces differ, not what chance alone gives.
            shares = (pieces > self._sorted[count - 1 - min(self._rank, count - 1)]).mean(axis=1)
            variance = max(shares.var() / len(pieces), density * (1 - density) / count)
            self._margin = SIGMAS * math.sqrt(variance) * count + 1

    def bracket(self, widening: int) -> _Bracket:
        """Magnitudes between which the k-th largest lies: almost certainly for 1, more so for more."""
        count, margin = self._sorted.size, math.ceil(self._margin * widening)
        first, last = count - 1 - (self._rank + margin), count - 1 - (self._rank - margin)
        high = int(self._sorted[last]) if last < count else ABOVE_ALL
        return _Bracket(int(self._sorted[first]) if first >= 0 else 0, high)


def _take_samples(
    scan: Scan,
    tensor: TensorSpec,
    densities: dict[int, float],
    kept: Sequence[int],
    values: Callable[[Element], Sequence[Number]],
) -> dict[int, _Sample]:
    """Sample each model's magnitudes: pieces of 1024 elements, evenly spread but for a shift of their own, so that no
    period of rows or columns is met always at the same place; small tensors whole."""
    n = tensor.numel
    exact = n <= max(WHOLE_ELEMENTS, 4 * PIECE_ELEMENTS)
    size = n if exact else min(PIECE_ELEMENTS, GRID_ELEMENTS)
    count = 1 if exact else min(max(MIN_PIECES, n // GRID_ELEMENTS), n // (4 * PIECE_ELEMENTS))
    stride = n // count
    shifts = [(index * 0x9E3779B1 % (1 << 32)) * (stride - size + 1) >> 32 for index in range(count)]
    starts = [index * stride + shift for index, shift in enumerate(shifts)]
    pieces = list(tile(tensor, GRID_ELEMENTS)) if exact else [Region(tensor, start, start + size) for start in starts]

    def question(x: Element) -> Question:
        every = values(x)
        return Question(stored=[magnitude_bits(every[model]) for model in densities])

    # Filled as the pieces come: many small arrays kept until the end would hold on to the memory around them.
    samples = {model: np.empty(sum(piece.numel for piece in pieces), dtype=np.int32) for model in densities}
    position = 0
    for piece, found in zip(pieces, ask(scan, question, pieces), strict=True):
        for sample, magnitudes in zip(samples.values(), found.stored, strict=True):
            sample[position : position + piece.numel] = magnitudes
        position += piece.numel
    return {
        model: _Sample(samples.pop(model).reshape(count, -1), density, kept[model], exact=exact)
        for model, density in densities.items()
    }


def _count(
    scan: Scan,
    grid: Sequence[Region],
    brackets: dict[int, _Bracket],
    values: Callable[[Element], Sequence[Number]],
) -> dict[int, _Tally]:
    """Read everything once and count each model's magnitudes against its bracket."""

    def question(x: Element) -> Question:
        every = values(x)
        counts: list[Number] = []
        inside: list[tuple[Number, Number]] = []
        for model, bracket in brackets.items():
            bits, low, high = magnitude_bits(every[model]), x.integer(bracket.low), x.integer(bracket.high)
            # The ends are numbers that occur, and in 16-bit models often: counted apart, they need not be picked out.
            counts += [bits > high, bits == high, bits == low]
            inside.append((bits, (bits > low) & (bits < high)))
        return Question(counts, inside)

    tallies = {model: _Tally(bracket) for model, bracket in brackets.items()}
    for found in ask(scan, question, grid):
        for at, tally in enumerate(tallies.values()):
            above, at_high, at_low = found.counts[3 * at : 3 * at + 3]
            tally.add(above, at_high, at_low, found.collected[at])
    return tallies


def _locate(tally: _Tally, k: int) -> tuple[int, int] | None:
    """The threshold's bits and how many elements equal to it are kept; None where it lies outside the bracket."""
    values, numbers = tally.descending()
    cumulative = tally.above + numbers.cumsum()
    if not tally.above < k <= cumulative[-1]:
        return None
    index = int(np.searchsorted(cumulative, k))
    return int(values[index]), k - int(cumulative[index] - numbers[index])


def _finish(
    scan: Scan, grid: Sequence[Region], value: Callable[[Element], Number], bits: int, left: int, tally: _Tally
) -> Trim:
    """Find the index of the last element kept at the threshold: the `left`-th of those equal to it."""
    equal = tally.equal_per_block(bits)
    block_index = int(np.searchsorted(equal.cumsum(), left))
    nth = left - int(equal[:block_index].sum())

    def question(x: Element) -> Question:
        return Question(collected=[(x.offset(), magnitude_bits(value(x)) == x.integer(bits))])

    region = grid[block_index]
    (found,) = ask(scan, question, [region])
    return Trim(bits, region.start + int(found.collected[0][nth - 1]))
