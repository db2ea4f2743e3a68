"""How a tensor is cut: regions of consecutive elements, each whole rows of one matrix or a piece of one row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

GRID_ELEMENTS = 1 << 17
"""Elements of a measured block. A constant: sums over it are part of the result."""

Partial = TypeVar("Partial")


def kind_of(tensor: str) -> str:
    """The kind of layer a tensor belongs to: its name with every number replaced (`model.layers.*.mlp.up_proj.weight`)."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One output tensor, as a method sees it.

    A tensor of more than two dimensions is a stack of matrices (the experts of a layer, say).
    """

    name: str
    shape: tuple[int, ...]
    is_embedding: bool = False
    """Whether an `nn.Embedding` holds it: a row, not a column, belongs to one channel."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """Whether it has fewer than two dimensions."""
        return len(self.shape) < 2

    @property
    def rows(self) -> int:
        """Rows of one matrix; 1 for a vector."""
        return 1 if self.is_vector else self.shape[-2]

    @property
    def columns(self) -> int:
        """Columns of one matrix; the length of a vector."""
        return self.shape[-1] if self.shape else 1

    @property
    def matrices(self) -> int:
        """Number of stacked matrices."""
        return math.prod(self.shape[:-2])


@dataclass(frozen=True, slots=True)
class Region:
    """The elements `start` to `stop` of a flattened tensor: whole rows of one matrix, or a piece of one row."""

    tensor: TensorSpec
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def matrix(self) -> int:
        """Which of the stacked matrices it lies in."""
        return self.start // (self.tensor.rows * self.tensor.columns)

    @property
    def row_range(self) -> tuple[int, int]:
        """First row, and the row after the last, within the matrix."""
        first = self.start // self.tensor.columns - self.matrix * self.tensor.rows
        return first, first + max(1, self.numel // self.tensor.columns)

    @property
    def column_range(self) -> tuple[int, int]:
        """First column, and the column after the last."""
        first = self.start % self.tensor.columns
        return first, first + min(self.numel, self.tensor.columns)

    def as_matrix(self, values: torch.Tensor) -> torch.Tensor:
        """View the region's elements `[numel]` as `[rows, columns]`."""
        return values.view(-1, min(self.numel, self.tensor.columns))


def tile(tensor: TensorSpec, max_elements: int) -> Iterator[Region]:
    """Cut a tensor into regions of at most `max_elements` >= 1, in order: as many whole rows as fit, else pieces of a row."""
    rows_each = max(1, max_elements // max(1, tensor.columns))
    width = min(tensor.columns, max_elements)
    for matrix in range(tensor.matrices):
        origin = matrix * tensor.rows * tensor.columns
        for row in range(0, tensor.rows, rows_each):
            last = min(row + rows_each, tensor.rows)
            if width == tensor.columns:
                if width:
                    yield Region(tensor, origin + row * width, origin + last * width)
                continue
            begin, end = origin + row * tensor.columns, origin + last * tensor.columns
            for start in range(begin, end, width):
                yield Region(tensor, start, min(start + width, end))


@dataclass(slots=True)
class Block:
    """The numbers of one region, float32 on the working device, each `[region.numel]`.

    Weight space and delta space are kept apart: a method reads `task_vectors` or `weights`, by its `space`; the other is
    empty. A method may overwrite them, the base never.
    """

    region: Region
    base: torch.Tensor | None
    """None only where nothing asks for it: a method in weight space without a transform."""
    task_vectors: list[torch.Tensor]
    """Fine-tuned minus base, in the recipe's order of models."""
    weights: list[torch.Tensor]
    """The fine-tuned weights themselves, in the recipe's order."""


class Scan(Protocol):
    """Run a function over blocks of one tensor, in parallel, and give its results in the order of the regions.

    regions: which to read; the fixed grid of `GRID_ELEMENTS` where None. Results are few at a time in memory, so a
    reduction should consume them as they come.
    """

    def __call__(
        self, measure: Callable[[Block], Partial], regions: Sequence[Region] | None = None
    ) -> Iterator[Partial]:
        """See the class."""
        ...
