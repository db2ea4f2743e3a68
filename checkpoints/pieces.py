"""The same parameters in files of another layout: other names, experts packed or each by itself, a decoder inside another model.

A stored tensor is a run of the elements of a parameter (`Placement.start`), mostly all of it. So a tensor of one file consists
of runs of the tensors of another that become the same parameter, whatever the names and however many tensors there are.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from checkpoints.placements import Architecture, Placement, Shape
from checkpoints.source import Source, TensorInfo


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of the elements of a stored tensor.

    Attributes:
        name: of the tensor.
        start: its first element that counts.
        count: how many.
        is_whole: whether that is all of the tensor, in a shape of its own.
    """

    name: str
    start: int
    count: int
    is_whole: bool = False


def find_pieces(
    ours: Mapping[str, Placement],
    our_shapes: Mapping[str, Shape],
    theirs: Mapping[str, Placement],
    their_shapes: Mapping[str, Shape],
) -> dict[str, list[Piece]]:
    """What each of our tensors consists of in their files.

    Args:
        ours, theirs: tensor -> the parameter that it becomes, of one model class.
        our_shapes, their_shapes: tensor -> its shape.

    Returns: our tensor -> its elements, in order; nothing for one that is not there whole.
    """
    mine, by_key = _by_key(ours), _by_key(theirs)
    runs: dict[str, list[tuple[int, int, str]]] = {}
    for name, placement in theirs.items():
        if placement.start is not None:
            count = math.prod(their_shapes[name])
            runs.setdefault(placement.parameter, []).append((placement.start, placement.start + count, name))
    for entries in runs.values():
        entries.sort()
    by_name: dict[str, list[Piece]] = {}
    for name, placement in ours.items():
        key = _key(placement)
        twin = by_key[key] if key in mine and key in by_key else None
        if twin is not None:  # the same part of the same parameter; whoever merges compares the shapes
            by_name[name] = [Piece(twin, 0, math.prod(their_shapes[twin]), is_whole=True)]
        elif placement.start is not None:
            stop = placement.start + math.prod(our_shapes[name])
            pieces = _cover(runs.get(placement.parameter, []), placement.start, stop)
            if pieces:
                by_name[name] = pieces
    return by_name


def _key(placement: Placement) -> tuple[object, ...]:
    """Equal for tensors that are the same part of the same parameter, even where a shape is wrong."""
    return placement.parameter, placement.expert, placement.others, placement.start or 0


def _by_key(placements: Mapping[str, Placement]) -> dict[tuple[object, ...], str]:
    """The tensors that alone are their part of a parameter."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, placement in placements.items():
        names.setdefault(_key(placement), []).append(name)
    return {key: having[0] for key, having in names.items() if len(having) == 1}


def _cover(runs: Sequence[tuple[int, int, str]], start: int, stop: int) -> list[Piece]:
    """The runs that hold the elements `start` to `stop`; empty where one is missing."""
    pieces = []
    at = start
    for begin, end, name in runs:
        if begin <= at < end and at < stop:
            upto = min(end, stop)
            pieces.append(Piece(name, at - begin, upto - at))
            at = upto
    return pieces if at == stop else []


def text_placements(theirs: Architecture, ours: Architecture) -> dict[str, Placement]:
    """Their tensors placed in our model class: what is in their decoder in ours, their head in our head."""
    inner = {}
    head = ours.placements.get(ours.output_head or "")
    for name, placement in theirs.placements.items():
        if name == theirs.output_head:
            if head is not None:
                inner[name] = replace(placement, parameter=head.parameter)
        elif not theirs.decoder or placement.parameter.startswith(f"{theirs.decoder}."):
            rest = placement.parameter[len(theirs.decoder) :].removeprefix(".")
            inner[name] = replace(placement, parameter=".".join(filter(None, (ours.decoder, rest))))
    return inner


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored tensor that a tensor, or one expert's part of it, is, as far as its input channels go.

    Attributes:
        name: of the stored tensor.
        expert: which of those that it holds; None for all of it.
    """

    name: str
    expert: int | None = None


class Assembled:
    """A source of tensors that consist of pieces of another source's.

    Args:
        inner: has the pieces.
        pieces: name -> its elements, in order.
        shapes: name -> its shape.
    """

    def __init__(self, inner: Source, pieces: Mapping[str, Sequence[Piece]], shapes: Mapping[str, Shape]):
        self.label = inner.label
        self._inner = inner
        self.pieces = pieces
        self._begins: dict[str, list[int]] = {}
        infos: dict[str, TensorInfo] = {}
        for name, parts in pieces.items():
            begins = [0]
            dtype = inner.tensors[parts[0].name].dtype
            for part in parts:
                begins.append(begins[-1] + part.count)
                dtype = torch.promote_types(dtype, inner.tensors[part.name].dtype)
            self._begins[name] = begins
            infos[name] = TensorInfo(dtype, shapes[name])
        self.tensors: Mapping[str, TensorInfo] = infos

    def origins(self, name: str) -> tuple[Origin, ...]:
        """What a tensor is made of: one origin, or one for each of the experts that are packed in it.

        Gate and up weights of an expert, which are joined along the output dimension, have one input; the first stands for
        both. Empty where it is made of something else.
        """
        shape, pieces = self.tensors[name].shape, self.pieces[name]
        if len(shape) == 3:
            each = math.prod(shape[1:])
            at = {begin: piece.name for begin, piece in zip(self._begins[name], pieces, strict=False)}
            experts = [at.get(expert * each) for expert in range(shape[0])]
            return tuple(Origin(origin) for origin in experts if origin is not None) if None not in experts else ()
        packed = self._inner.tensors[pieces[0].name]
        if len(pieces) != 1 or len(packed.shape) != 3:
            return ()
        return (Origin(pieces[0].name, pieces[0].start // math.prod(packed.shape[1:])),)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; one read for each piece."""
        info, begins, parts = self.tensors[name], self._begins[name], self.pieces[name]
        first = bisect.bisect_right(begins, start) - 1
        if stop <= begins[first + 1] and self._inner.tensors[parts[first].name].dtype == info.dtype:
            shift = parts[first].start - begins[first]
            return self._inner.read(parts[first].name, start + shift, stop + shift, buffer)
        out = buffer[: (stop - start) * info.dtype.itemsize].view(info.dtype)
        scratch = torch.empty_like(buffer)
        for part, begin in zip(parts[first:], begins[first:], strict=False):
            low, high = max(start, begin), min(stop, begin + part.count)
            if low >= high:
                break
            shift = part.start - begin
            out[low - start : high - start].copy_(self._inner.read(part.name, low + shift, high + shift, scratch))
        return out
