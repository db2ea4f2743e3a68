"""How a region's numbers are added up, in one order for torch and for compiled loops: dealt to lanes in turn, lanes by halves.

Numbers are float64. What one sum runs over is a group; the groups of a region follow each other. Those of a group are dealt to its lanes
in turn, and each lane adds what it gets to 0, in order. A lane belongs to a column, or to the whole group where there is one sum for
all of it; the lanes of one sum are added by halves: the second half to the first, and so on.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from streaming.blocks import Region

Channels: TypeAlias = Literal["tensor", "rows", "columns"]
"""What one sum runs over: all of a region, each row, or each column of a matrix."""

LANES, LANES_OF_A_ROW = 1024, 128
"""Lanes of a group: many, so that torch has few steps to take; few for a row, of which there are many."""


class Lanes(NamedTuple):
    """How the numbers of a region are dealt.

    Attributes:
        groups: of a region.
        span: numbers of a group.
        width: sums of a group.
        each: lanes of one sum.
    """

    groups: int
    span: int
    width: int
    each: int

    @property
    def total(self) -> int:
        """Lanes of a group."""
        return self.width * self.each


def lanes_of(region: Region, channels: Channels) -> Lanes:
    """How a region of at least one element is dealt."""
    if channels == "tensor":
        return Lanes(1, region.numel, 1, min(LANES, region.numel))
    matrices, rows, columns = region.shape
    if channels == "rows":
        return Lanes(matrices * rows, columns, 1, min(LANES_OF_A_ROW, columns))
    return Lanes(matrices, rows * columns, columns, min(max(1, LANES // columns), rows))


def deal(values: torch.Tensor, lanes: Lanes) -> torch.Tensor:
    """What each lane adds up: `[n]` float64 -> `[groups, lanes.total]`. On a GPU in an order of its own."""
    turns = -(-lanes.span // lanes.total)
    dealt = values.view(lanes.groups, lanes.span)
    if turns * lanes.total > lanes.span:
        dealt = torch.nn.functional.pad(dealt, (0, turns * lanes.total - lanes.span))
    dealt = dealt.view(lanes.groups, turns, lanes.total)
    if dealt.is_cuda:
        return dealt.sum(dim=1)
    # Row after row: only along the last dimension does numpy add in another order. torch's sums have one for each processor.
    return torch.from_numpy(np.add.reduce(dealt.numpy(), axis=1, initial=0.0))


def fold(dealt: Any, lanes: Lanes, region: Region, channels: Channels) -> Any:
    """The sums of a region from its lanes.

    Args:
        dealt: `[sums, groups, lanes.total]` float64, of numpy or torch, overwritten.

    Returns: `[sums, matrices, rows, columns]`; a dimension that a sum runs over is 1 long.
    """
    parts = dealt.reshape(len(dealt), lanes.groups, lanes.each, lanes.width)
    while (count := parts.shape[2]) > 1:
        half = count // 2
        upper = parts[:, :, count - half :]
        parts = parts[:, :, : count - half]
        parts[:, :, :half] += upper
    if channels == "tensor":
        return parts.reshape(len(parts), 1, 1, 1)
    matrices, rows, columns = region.shape
    return parts.reshape(len(parts), matrices, *((rows, 1) if channels == "rows" else (1, columns)))
