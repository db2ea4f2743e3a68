"""Scalar products of all pairs of models, whole or by row or column, in one reading; and sums of the models with numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streaming.blocks import GRID_ELEMENTS, Region, Scan, TensorSpec, tile
from streaming.elements import Element, Number, Question, ask
from streaming.sums import Channels


def measure_gram(
    tensor: TensorSpec, scan: Scan, vectors: Callable[[Element], Sequence[Number]], channels: Channels = "tensor"
) -> torch.Tensor:
    """Scalar products of every pair of `vectors`.

    Args:
        tensor: of at least one element.
        vectors: the v numbers of an element that are multiplied.
        channels: what one product runs over. A vector is one row, and one column too.

    Returns: `[v, v, matrices, rows, columns]` float64 on the CPU; a dimension that the products run over is 1 long.
    """

    def products(x: Element) -> Sequence[Number]:
        doubles = [one.double() for one in vectors(x)]
        return [one * other for place, one in enumerate(doubles) for other in doubles[place:]]

    sums = measure_sums(tensor, scan, products, channels)
    count = int((2 * len(sums)) ** 0.5)  # of v vectors, which have v (v + 1) / 2 products
    first, second = torch.triu_indices(count, count)
    gram = sums.new_empty(count, count, *sums.shape[1:])
    gram[first, second] = gram[second, first] = sums
    return gram


def measure_sums(
    tensor: TensorSpec, scan: Scan, numbers: Callable[[Element], Sequence[Number]], channels: Channels = "tensor"
) -> torch.Tensor:
    """Sums of numbers of the elements, in one reading: those of the blocks of the fixed grid, in order, in each that of `streaming.sums`.

    Args:
        tensor: of at least one element.
        numbers: what is added up, float64.
        channels: what one sum runs over. A vector is one row, and one column too.

    Returns: `[sums, matrices, rows, columns]` float64 on the CPU; a dimension that the sums run over is 1 long.
    """
    over: Channels = "tensor" if tensor.is_vector else channels
    shape = {
        "tensor": (1, 1, 1),
        "rows": (tensor.matrices, tensor.rows, 1),
        "columns": (tensor.matrices, 1, tensor.columns),
    }[over]
    total: torch.Tensor | None = None
    for found in ask(scan, lambda x: Question(sums=numbers(x), channels=over), list(tile(tensor, GRID_ELEMENTS))):
        if total is None:
            total = torch.zeros(len(found.sums), *shape, dtype=torch.float64)
        total[:, *place(found.region, shape)] += torch.from_numpy(found.sums)
    assert total is not None, "expected a tensor with elements"
    return total


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
