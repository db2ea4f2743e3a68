"""Scalar products of all pairs of models, whole or by row or column, in one reading; and sums of the models with numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from streaming.blocks import Block, Region, Scan, TensorSpec
from streaming.elements import Element, Number

Channels = Literal["tensor", "rows", "columns"]
"""What one scalar product runs over: everything, each row, or each column. A vector is one row, and one column too."""


def measure_gram(
    tensor: TensorSpec, scan: Scan, vectors: Callable[[Block], Sequence[torch.Tensor]], channels: Channels = "tensor"
) -> torch.Tensor:
    """Scalar products of every pair of `vectors`.

    Args:
        tensor: of at least one element.
        vectors: the v numbers to multiply at each element of a block, `[n]` float32 each.

    Returns: `[v, v, matrices, rows, columns]` float64 on the CPU; a dimension that the products run over is 1 long.
    """
    shape = channel_shape(tensor, channels)
    total: torch.Tensor | None = None

    def products(block: Block) -> tuple[Region, torch.Tensor]:
        stack = torch.stack([block.region.as_stack(values) for values in vectors(block)]).double()
        if shape == (1, 1, 1):
            flat = stack.flatten(1)
            return block.region, (flat @ flat.T)[:, :, None, None, None].cpu()
        dim = -1 if shape[-1] == 1 else -2
        pairs = [(vector * stack).sum(dim=dim, keepdim=True) for vector in stack]  # each [v, matrices, rows, columns]
        return block.region, torch.stack(pairs).cpu()

    for region, partial in scan(products):
        if total is None:
            total = partial.new_zeros(*partial.shape[:2], *shape)
        total[:, :, *place(region, shape)] += partial
    assert total is not None, "expected a tensor with elements"
    return total


def channel_shape(tensor: TensorSpec, channels: Channels) -> tuple[int, int, int]:
    """Matrices, rows and columns of the channels: (1, 1, 1) for a whole tensor."""
    if channels == "tensor" or tensor.is_vector:
        return 1, 1, 1
    return (tensor.matrices, tensor.rows, 1) if channels == "rows" else (tensor.matrices, 1, tensor.columns)


def place(region: Region, shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """Which of the channels a region holds: slices of matrices, rows and columns."""
    ranges = (region.matrix_range, region.row_range, region.column_range)
    matrices, rows, columns = (
        slice(0, 1) if size == 1 else slice(*range_) for size, range_ in zip(shape, ranges, strict=True)
    )
    return matrices, rows, columns


def add_scaled(x: Element, vectors: Sequence[Number], factors: torch.Tensor) -> Number:
    """sum f_i v_i, in order, from a sum that starts at 0.

    Args:
        vectors: numbers of the element.
        factors: `[v, matrices, rows, columns]` float64, of the whole tensor, as in `measure_gram`.
    """
    first, *others = zip(vectors, factors.float(), strict=True)
    total = 0.0 + first[0] * x.channel(first[1])
    for vector, factor in others:
        total = total + vector * x.channel(factor)
    return total
