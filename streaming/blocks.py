"""How a tensor is cut: regions of consecutive elements, each whole rows of one matrix or a piece of one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

GRID_ELEMENTS = 1 << 17
"""Elements of a measured block. A constant: sums over it are part of the result."""

BLOCK_ELEMENTS = 4 * GRID_ELEMENTS
"""Elements of other blocks on the CPU: threads get in each other's way less often than with smaller ones, and caches hold them."""

Partial = TypeVar("Partial")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One output tensor, as a method sees it.

    A tensor of more than two dimensions is a stack of matrices (the experts of a layer, say).
    """

    name: str
    shape: tuple[int, ...]
    is_embedding: bool = False
    """Whether an `nn.Embedding` holds it: a row, not a column, belongs to one channel."""
    is_head: bool = False
    """Whether it is the matrix that makes the logits, stored by itself."""

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
    """The elements `start` to `stop` of a flattened tensor: whole matrices of a stack, whole rows of one, or a piece of a row.

    A region that is only counted or sampled may be any run of elements; the ranges below mean nothing then.
    """

    tensor: TensorSpec
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, int, int]:
        """Matrices, rows of each, columns of each."""
        rows, columns = self.tensor.rows, self.tensor.columns
        if self.numel >= rows * columns:
            return self.numel // (rows * columns), rows, columns
        return (1, self.numel // columns, columns) if self.numel >= columns else (1, 1, self.numel)

    @property
    def matrix_range(self) -> tuple[int, int]:
        """First of the stacked matrices, and the one after the last."""
        first = self.start // (self.tensor.rows * self.tensor.columns)
        return first, first + self.shape[0]

    @property
    def row_range(self) -> tuple[int, int]:
        """First row within a matrix, and the row after the last."""
        first = self.start // self.tensor.columns % self.tensor.rows
        return first, first + self.shape[1]

    @property
    def column_range(self) -> tuple[int, int]:
        """First column, and the column after the last."""
        first = self.start % self.tensor.columns
        return first, first + self.shape[2]

    def as_stack(self, values: torch.Tensor) -> torch.Tensor:
        """View the region's elements `[numel]` as `[matrices, rows, columns]`."""
        return values.view(self.shape)


def tile(tensor: TensorSpec, max_elements: int, part: tuple[int, int] | None = None) -> Iterator[Region]:
    """Cut a tensor into regions of at most `max_elements` >= 1, in order: as many whole matrices as fit, else as many whole
    rows, else pieces of a row.

    Args:
        part: first element and the one after the last, of a part that begins and ends where regions of some size do; None for all.
    """
    rows, columns = tensor.rows, tensor.columns
    begin, end = part or (0, tensor.numel)
    if begin == end:
        return
    per_matrix = rows * columns
    if per_matrix <= max_elements and begin % per_matrix == end % per_matrix == 0:
        yield from _cut(tensor, begin, end, max_elements // per_matrix * per_matrix)
        return
    for origin in range(begin // per_matrix * per_matrix, end, per_matrix):
        first, last = max(begin, origin), min(end, origin + per_matrix)
        if columns <= max_elements and first % columns == last % columns == 0:
            yield from _cut(tensor, first, last, max_elements // columns * columns)
            continue
        for row in range(first // columns * columns, last, columns):
            yield from _cut(tensor, max(first, row), min(last, row + columns), max_elements)


def in_groups(regions: Iterable[Region], most: int = GRID_ELEMENTS) -> Iterator[list[Region]]:
    """Small regions that follow each other together, of at most `most` elements in all, larger ones by themselves."""
    group: list[Region] = []
    elements = 0
    for region in regions:
        if group and elements + region.numel > most:
            yield group
            group, elements = [], 0
        group.append(region)
        elements += region.numel
    if group:
        yield group


def _cut(tensor: TensorSpec, begin: int, end: int, elements: int) -> Iterator[Region]:
    for start in range(begin, end, elements):
        yield Region(tensor, start, min(start + elements, end))


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
