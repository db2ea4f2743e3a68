"""How a region's numbers are added up, in one order for torch and for compiled loops: dealt to lanes in turn, lanes by halves.

Numbers are float64. What one sum runs over is a group; the groups of a region follow each other. Those of a group are dealt to its lanes
in turn, and each lane adds what it gets to 0, in order. A lane belongs to a column, or to the whole group where there is one sum for
all of it; the lanes of one sum are added by halves: the second half to the first, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

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
        return lanes_of_rows(matrices * rows, columns)
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


def lanes_of_rows(rows: int, columns: int) -> Lanes:
    """How rows are dealt, of which each has a sum."""
    return Lanes(rows, columns, 1, min(LANES_OF_A_ROW, columns))


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sums of the last dimension, `[..., n]` float64 -> `[...]`; of a GPU's, or of rows that are not contiguous, in torch's order."""
    if values.is_cuda or not values.is_contiguous() or not values.numel():
        return values.sum(dim=-1)
    lanes = lanes_of_rows(values.shape[:-1].numel(), values.shape[-1])
    with np.errstate(invalid="ignore"):  # of what is not finite the sum is not, which is no news
        sums = fold(deal(values.view(-1), lanes).numpy()[None], lanes)
    return torch.from_numpy(sums[0, :, 0].copy()).view(values.shape[:-1])


def fold(dealt: np.ndarray, lanes: Lanes) -> np.ndarray:
    """Add up the lanes of each sum.

    Args:
        dealt: `[sums, groups, lanes.total]` float64, overwritten.

    Returns: `[sums, groups, lanes.width]`.
    """
    parts = dealt.reshape(*dealt.shape[:2], lanes.each, lanes.width)
    while (count := parts.shape[2]) > 1:
        half = count // 2
        upper = parts[:, :, count - half :]
        parts = parts[:, :, : count - half]
        parts[:, :, :half] += upper
    return parts[:, :, 0]


def fold_regions(
    dealt: np.ndarray, lanes: Sequence[Lanes], regions: Sequence[Region], channels: Channels
) -> list[np.ndarray]:
    """The sums of regions from their lanes.

    Args:
        dealt: `[sums, ...]` float64, the lanes of one region after the other, overwritten.
        lanes: of each region.

    Returns: `[sums, matrices, rows, columns]` for each; a dimension that a sum runs over is 1 long.
    """
    sums: list[np.ndarray] = []
    begin = 0
    for one, alike in groupby(lanes):  # together: each call from Python is a turn of its lock
        groups = one.groups * len(list(alike))
        end = begin + groups * one.total
        folded = fold(dealt[:, begin:end].reshape(len(dealt), groups, one.total), one)
        for first in range(0, groups, one.groups):
            region = regions[len(sums)]
            matrices, rows, columns = region.shape
            shape = {"tensor": (1, 1, 1), "rows": (matrices, rows, 1), "columns": (matrices, 1, columns)}[channels]
            sums.append(folded[:, first : first + one.groups].reshape(len(dealt), *shape).copy())
        begin = end
    return sums
