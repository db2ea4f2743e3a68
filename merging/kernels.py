"""Compiled twins of the loops of `merging`; what each does is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streaming.kernels import compiled

COLUMNS = 64
"""Columns that are summed together."""


def sum_products(left: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """See `merging.methods.widen.sum_products`."""
    matrices, rows, columns = left.shape
    sums = torch.empty((matrices, columns if dim == -2 else rows), dtype=torch.float64)
    fold = _fold_rows if dim == -2 else _fold_columns
    fold(left.numpy(), other.numpy(), sums.numpy())
    return sums


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


def _sum_each() -> None:
    matrix = torch.ones(1, 8, 8)
    for dim in (-2, -1):
        sum_products(matrix, matrix, dim)


EXAMPLES: dict[str, Callable[[], object]] = {
    "sum_products": _sum_each,
}
"""See `streaming.twins`."""
