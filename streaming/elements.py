"""What the arithmetic of one element is written in, once: a formula means the same for torch tensors and for a compiled loop.

    def formula(self, tensor, statistics):
        def merged(x: Element) -> Number:
            return x.base + x.models[0] * x.number(0.5)
        return merged

With the tensors of a block (`Tensors`) a formula computes: that is its definition, on any device. With symbols (`streaming.trace`) it
writes down what a compiled loop does with each element, in the same order and with the same roundings.

Formulas use `+ - * /`, comparisons, `&`, `|`, `~` and `abs` of numbers, and the functions below. Operands are numbers of an
`Element`; a Python number may stand beside one where float32 holds it exactly (0.0, 1.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch

from streaming.blocks import Block, Region, Scan
from streaming.sums import Channels, deal, fold_regions, lanes_of

Number: TypeAlias = torch.Tensor
"""A number of each element: float32, float64 (`double`), int32 or a condition. To type checkers a tensor; a `streaming.trace.Symbol` where a loop is written down."""

MAGNITUDE_BITS = 0x7FFFFFFF
TOP_BIT = -(1 << 31)
LOW_32 = (1 << 32) - 1


def as_signed(value: int) -> int:
    """The int32 with the bits of an unsigned 32-bit number."""
    return value - (1 << 32) if value >= 1 << 31 else value


# The last two multipliers and the shifts between them are those of "lowbias32" (C. Wellons, Hash Function Prospector). The
# product with the golden ratio before them breaks up counting: without it, indices a stride of 4096 apart are correlated.
SPREAD = as_signed(0x9E3779B1)
FIRST_MULTIPLIER = as_signed(0x21F0AAAD)
SECOND_MULTIPLIER = as_signed(0xD35A2D97)


class Element(Protocol):
    """What is known of one element of a tensor, and of each element of a block in turn."""

    @property
    def base(self) -> Number:
        """Of the base, float32."""

    @property
    def models(self) -> Sequence[Number]:
        """Of each model, in the recipe's order, float32: task vectors or weights, as the method's `space` says."""

    def number(self, value: float) -> Number:
        """One number for all elements, rounded to float32."""

    def integer(self, value: int) -> Number:
        """One int32 for all elements."""

    def channel(self, values: torch.Tensor) -> Number:
        """The number of its matrix, row or column.

        Args:
            values: `[matrices or 1, rows or 1, columns or 1]` float32 of the whole tensor; rows or columns are 1.
        """

    def offset(self) -> Number:
        """The element's index, counted from its region's first: int32."""

    def is_up_to(self, index: int) -> Number:
        """1 where the element's index in its tensor is at most `index`, else 0: int32."""

    def draw(self, keys: Callable[[int], tuple[int, int]]) -> Number:
        """A random int32, uniform, of the element's index (`hash_of`).

        Args:
            keys: the two keys of the elements whose index has these upper 32 bits.
        """


Formula: TypeAlias = Callable[[Element], Number]
"""The merged number of an element."""
Change: TypeAlias = Callable[[Element, Number], Number]
"""What becomes of an element's merged number before it is rounded."""


@dataclass(frozen=True)
class Question:
    """What is asked of the elements of a region.

    Attributes:
        counts: conditions, each of which is counted.
        collected: (int32, condition): the numbers of the elements for which it holds, in order.
        stored: int32 of every element.
        sums: float64, each added up over `channels`, in the order of `streaming.sums`.
    """

    counts: Sequence[Number] = ()
    collected: Sequence[tuple[Number, Number]] = ()
    stored: Sequence[Number] = ()
    sums: Sequence[Number] = ()
    channels: Channels = "tensor"


class Answer(NamedTuple):
    """What a region's elements say to a `Question`: a number for each of `counts`, int32 for `collected` and `stored`, and sums.

    Attributes:
        sums: `[sums, matrices, rows, columns]` float64; a dimension that a sum runs over is 1 long.
    """

    region: Region
    counts: Sequence[int]
    collected: Sequence[np.ndarray]
    stored: Sequence[np.ndarray]
    sums: np.ndarray


Ask: TypeAlias = Callable[[Element], Question]


def ask(scan: Scan, question: Ask, regions: Sequence[Region] | None = None) -> Iterator[Answer]:
    """Ask the regions of a tensor, in their order: by a compiled loop where the scan is one of a stream that has it.

    Args:
        scan, regions: see `streaming.blocks.Scan`.
    """
    by_loop = getattr(scan, "ask", None)
    if by_loop is not None:
        return cast(Iterator[Answer], by_loop(question, regions))
    return scan(lambda block: answer(question(Tensors(block)), block.region), regions)


def answer(question: Question, region: Region) -> Answer:
    """The answer of tensors, which are a region's."""
    sums = np.empty(0)
    if question.sums:
        lanes = lanes_of(region, question.channels)
        dealt = torch.stack([deal(values, lanes) for values in question.sums]).cpu()
        (sums,) = fold_regions(dealt.flatten(1).numpy(), [lanes], [region], question.channels)
    return Answer(
        region,
        [int(torch.count_nonzero(condition)) for condition in question.counts],
        [values[condition].cpu().numpy() for values, condition in question.collected],
        [values.cpu().numpy() for values in question.stored],
        sums,
    )


def where(condition: Number, yes: Number | float, no: Number | float) -> Number:
    """`yes` where the condition holds, else `no`."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return condition.select(yes, no)


def magnitude_bits(values: Number) -> Number:
    """|values| as int32 in the same order: the bits of a float32 without its sign."""
    return values.view(torch.int32) & MAGNITUDE_BITS


def lerp(start: Number, end: Number, weight: Number) -> Number:
    """From `start` (weight 0) to `end` (weight 1), both exact at the ends: one fused multiply-add from the nearer end, as torch has it."""
    if isinstance(start, torch.Tensor):
        return torch.lerp(start, end, weight.expand_as(start))
    return start.lerp(end, weight)


def hash_of(index: Number, keys: tuple[int, int]) -> Number:
    """Hash the lower 32 bits of an index, which its int32 has.

        x = index * SPREAD ^ k0;  x ^= x >> 16;  x *= FIRST_MULTIPLIER;  x ^= x >> 15;  x ^= k1;  x *= SECOND_MULTIPLIER

    modulo 2^32, over unsigned numbers: the copies of the sign that a shift of signed ones brings are masked off.

    Returns: int32, uniform, x - 2^31: the order of the unsigned numbers, in signed ones.
    """
    x = index * SPREAD ^ keys[0]
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST_MULTIPLIER
    x = x ^ ((x >> 15) & 0x1FFFF)
    # A top bit that is flipped here is flipped after the product, and nothing else: x - 2^31 for free.
    return (x ^ (keys[1] ^ TOP_BIT)) * SECOND_MULTIPLIER


def hash_range(start: int, stop: int, keys: Callable[[int], tuple[int, int]], device: torch.device) -> torch.Tensor:
    """`hash_of` of the indices `start` to `stop`: `[stop - start]` int32. Keys: see `Element.draw`."""
    parts = []
    while start < stop:
        end = min(stop, ((start >> 32) + 1) << 32)
        low = start & LOW_32
        index = torch.arange(low, low + end - start, dtype=torch.int64, device=device).to(torch.int32)
        parts.append(hash_of(index, keys(start >> 32)))
        start = end
    if not parts:
        return torch.empty(0, dtype=torch.int32, device=device)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Tensors:
    """The elements of a block, all at once; an `Element`.

    Args:
        block: whose numbers are left alone.

    Attributes:
        region: the block's.
    """

    def __init__(self, block: Block):
        self._block = block
        self.region = block.region
        self.models: Sequence[Number] = block.task_vectors or block.weights

    @property
    def base(self) -> Number:
        """See `Element`."""
        assert self._block.base is not None
        return self._block.base

    @property
    def _device(self) -> torch.device:
        return self.models[0].device

    def number(self, value: float) -> Number:
        """See `Element`."""
        return torch.full((), value, dtype=torch.float32, device=self._device)  # on a GPU without waiting for it

    def integer(self, value: int) -> Number:
        """See `Element`."""
        return torch.full((), value, dtype=torch.int32, device=self._device)

    def channel(self, values: torch.Tensor) -> Number:
        """See `Element`."""
        region = self._block.region
        ranges = (region.matrix_range, region.row_range, region.column_range)
        here = values[
            tuple(
                slice(None) if size == 1 else slice(*range_) for size, range_ in zip(values.shape, ranges, strict=True)
            )
        ]
        return here.to(self._device).expand(region.shape).reshape(-1)

    def offset(self) -> Number:
        """See `Element`."""
        return torch.arange(self.region.numel, dtype=torch.int32, device=self._device)

    def is_up_to(self, index: int) -> Number:
        """See `Element`."""
        count = min(max(index + 1 - self._block.region.start, 0), self._block.region.numel)
        flags = torch.zeros(self._block.region.numel, dtype=torch.int32, device=self._device)
        flags[:count] = 1
        return flags

    def draw(self, keys: Callable[[int], tuple[int, int]]) -> Number:
        """See `Element`."""
        region = self._block.region
        return hash_range(region.start, region.stop, keys, self._device)
