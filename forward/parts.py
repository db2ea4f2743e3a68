"""Find which part of a parameter a tensor is: views of it, and copies that were made on the way to a product, by their strides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

Range = tuple[int, int]
"""First index, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class Use:
    """A part of a parameter that is multiplied with an input.

    Attributes:
        parameter: its name in the model, the first one where several modules share it.
        axis: the dimension that runs over the input's channels.
        ranges: for each dimension of the parameter what of it takes part; along `axis`, the channels.
        joined: how many dimensions, of which `axis` is the first, run over the channels together, each whole; mostly 1.
        order: these dimensions as the input runs over them, the outermost first; empty where that is their own order.
    """

    parameter: str
    axis: int
    ranges: tuple[Range, ...]
    joined: int = 1
    order: tuple[int, ...] = ()

    def in_order(self, x: torch.Tensor) -> tuple[Use, torch.Tensor]:
        """The use, and its input `[..., channels]`, with the channels in the order of the parameter's own dimensions."""
        if not self.order:
            return self, x
        apart = x.unflatten(-1, [self.ranges[axis][1] for axis in self.order])
        places = [self.order.index(axis) - len(self.order) for axis in self.axes]
        rest = range(apart.ndim - len(self.order))
        return replace(self, order=()), apart.permute(*rest, *places).flatten(-len(self.order))

    @property
    def axes(self) -> range:
        """The dimensions that run over the channels."""
        return range(self.axis, self.axis + self.joined)

    @property
    def channels(self) -> Range:
        """What of the parameter's input channels the input has."""
        return (
            self.ranges[self.axis] if self.joined == 1 else (0, math.prod(self.ranges[axis][1] for axis in self.axes))
        )

    def as_json(self) -> list[Any]:
        """For `of_json`."""
        return [self.parameter, self.axis, self.ranges, self.joined]

    @classmethod
    def of_json(cls, content: Any) -> Use:
        """What `as_json` gave. Raises ValueError: something else."""
        if not isinstance(content, list):
            raise ValueError("no use of a parameter")
        parameter, axis, ranges, joined = content
        is_use = isinstance(parameter, str) and type(axis) is type(joined) is int and all(map(_is_range, ranges))
        if not is_use or not 0 <= axis <= axis + joined - 1 < len(ranges):
            raise ValueError("no use of a parameter")
        return cls(parameter, axis, tuple((first, last) for first, last in ranges), joined)


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)


@dataclass(frozen=True, slots=True)
class _Dim:
    """A dimension of a storage: its size and stride, and which axis of the parameter it runs over, in which steps."""

    size: int
    stride: int
    axis: int
    step: int


Span = tuple[int, int, int]
"""Axis of the parameter, number of indices, step between them."""


class Part:
    """What a storage holds of a parameter.

    Args:
        parameter: its name.
        shape: its own.
        dims: of the tensor that fills the storage.
        start: its first element's place in the parameter.
        offset: and in the storage.
    """

    def __init__(self, parameter: str, shape: tuple[int, ...], dims: list[_Dim], start: tuple[int, ...], offset: int):
        self.parameter = parameter
        self.shape = shape
        self._dims = sorted((dim for dim in dims if dim.size > 1), key=lambda dim: -dim.stride)
        self._start = start
        self._offset = offset
        self._uses: dict[tuple[object, ...], Use | None] = {}

    @classmethod
    def whole(cls, name: str, parameter: torch.Tensor) -> Part:
        """A parameter itself."""
        shape, strides = tuple(parameter.shape), parameter.stride()
        dims = [_Dim(size, strides[axis], axis, 1) for axis, size in enumerate(shape)]
        return cls(name, shape, dims, (0,) * len(shape), int(parameter.storage_offset()))

    def copied(self, source: torch.Tensor, copy: torch.Tensor) -> Part | None:
        """What a copy, element by element, of a view holds; None where that cannot be said."""
        place = self.place(source)
        if place is None or source.shape != copy.shape:
            return None
        start, spans = place
        if any(len(axes) > 1 for axes in spans):
            return None
        dims = [
            _Dim(size, stride, *((axes[0][0], axes[0][2]) if axes else (0, 1)))
            for size, stride, axes in zip(copy.shape, copy.stride(), spans, strict=True)
        ]
        return Part(self.parameter, self.shape, dims, start, int(copy.storage_offset()))

    def place(self, view: torch.Tensor) -> tuple[tuple[int, ...], list[list[Span]]] | None:
        """Where a view of the storage lies in the parameter.

        Returns: the place of its first element; for each of its dimensions the axes that it runs over, the innermost first, none
            for a size of 1 or a repeated element. None where that cannot be said.
        """
        start, rest = list(self._start), int(view.storage_offset()) - self._offset
        if rest < 0:
            return None
        for dim in self._dims:
            index, rest = divmod(rest, dim.stride) if dim.stride else (0, rest)
            start[dim.axis] += index * dim.step
        if rest:
            return None
        spans = [self._spans(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True)]
        return None if any(axes is None for axes in spans) else (tuple(start), [axes or [] for axes in spans])

    def _spans(self, size: int, stride: int) -> list[Span] | None:
        """What a dimension of a view runs over."""
        if size == 1 or stride == 0:
            return []
        for position in reversed(range(len(self._dims))):
            dim = self._dims[position]
            step, uneven = divmod(stride, dim.stride) if dim.stride else (0, 1)
            if uneven or step == 0 or step >= dim.size:
                continue
            if step * (size - 1) < dim.size:
                return [(dim.axis, size, step * dim.step)]
            if step == 1 and size % dim.size == 0 and position:  # several dimensions, joined
                outer = self._spans(size // dim.size, dim.stride * dim.size)
                return None if outer is None else [(dim.axis, dim.size, dim.step), *outer]
            return None
        return None

    def use(self, view: torch.Tensor, contracted: int, index: int | None = None) -> Use | None:
        """The use of a view in a product.

        Args:
            contracted: the dimension of the view that is summed over.
            index: along its first dimension, where that is a batch of products.

        Returns: None where the contracted dimension is no run of one axis of the parameter, nor several of its axes whole.
        """
        key = (view.shape, view.stride(), view.storage_offset(), contracted, index)
        if key not in self._uses:  # the same few views again and again
            self._uses[key] = self._find_use(view, contracted, index)
        return self._uses[key]

    def _find_use(self, view: torch.Tensor, contracted: int, index: int | None) -> Use | None:
        place = self.place(view)
        if place is None:
            return None
        start, spans = place
        ranges = [(first, first + 1) for first in start]
        batch = [] if index is None else spans[0]
        for axis, size, step in reversed(batch):  # the outermost first
            inner = 1
            for other, count, _ in batch:
                if other == axis:
                    break
                inner *= count
            first = start[axis] + (index or 0) // inner % size * step
            ranges[axis] = (first, first + 1)
        for dim, axes in enumerate(spans):
            if dim != contracted and (dim or index is None):
                for (
                    axis,
                    size,
                    step,
                ) in axes:  # of an axis that the batch runs over too, the index has said where it begins
                    low, high = ranges[axis]
                    ranges[axis] = (low, high + (size - 1) * step)
        run = spans[contracted]
        if not run:  # one channel
            width = view.shape[contracted]
            taken = {axis for axes in spans for axis, _, _ in axes}
            axis = next((a for a in reversed(range(len(start))) if a not in taken and self.shape[a] == 1), -1)
            return Use(self.parameter, axis, tuple(ranges)) if width == 1 and axis >= 0 else None
        if any(step != 1 for _, _, step in run):
            return None
        if len(run) > 1:  # several dimensions together, the outermost last
            order = tuple(axis for axis, _, _ in reversed(run))
            is_whole = all(size == self.shape[axis] for axis, size, _ in run)
            if not is_whole or sorted(order) != list(range(min(order), min(order) + len(order))):
                return None
            for axis in order:
                ranges[axis] = (0, self.shape[axis])
            return Use(
                self.parameter, min(order), tuple(ranges), len(order), () if list(order) == sorted(order) else order
            )
        axis, size, _ = run[0]
        ranges[axis] = (ranges[axis][0], ranges[axis][0] + size)
        return Use(self.parameter, axis, tuple(ranges))
