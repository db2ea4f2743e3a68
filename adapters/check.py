"""How far the base with the adapter is from what the adapter was made of, per kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.targets import How, Target
from checkpoints.source import READ_ELEMENTS, Source, TensorRef
from checkpoints.tensor_names import kind_of


@dataclass
class Compared:
    """The tensors of one kind.

    Attributes:
        kind: their name, numbers replaced.
        how: what became of them.
        can_be_whole: whether a lost tensor can be stored whole.
        tensors, changed: how many there are, and how many differ from the base.
        weights, change, error: sums of squares of the changed weights, of their difference from the base, and of their
            difference from base and adapter; roots of them are what is reported.
    """

    kind: str
    how: How
    can_be_whole: bool = False
    tensors: int = 0
    changed: int = 0
    weights: float = 0.0
    change: float = 0.0
    error: float = 0.0

    @property
    def change_of_weights(self) -> float:
        """Size of the change relative to the weights."""
        return math.sqrt(self.change / self.weights) if self.weights else 0.0

    @property
    def error_of_change(self) -> float:
        """Size of the error relative to the change; 0 where nothing changed."""
        return math.sqrt(self.error / self.change) if self.change else 0.0

    @property
    def error_of_weights(self) -> float:
        """Size of the error relative to the weights."""
        return math.sqrt(self.error / self.weights) if self.weights else 0.0

    def as_json(self) -> dict[str, Any]:
        """For merge_recipe.json."""
        return {
            "kind": self.kind,
            "stored_as": self.how,
            "tensors": self.tensors,
            "changed": self.changed,
            "change_of_weights": self.change_of_weights,
            "error_of_change": self.error_of_change,
            "error_of_weights": self.error_of_weights,
        }


def compare(
    refs: Mapping[str, tuple[TensorRef, TensorRef]],
    adapted: Source,
    targets: Mapping[str, Target],
    progress: Callable[[int], object],
) -> list[Compared]:
    """Compare every tensor, some of it at a time.

    Args:
        refs: name -> the base's tensor and the changed one.
        adapted: base and adapter.
        targets: what became of each.
        progress: called with numbers of bytes of the changed model.
    """
    found: dict[tuple[str, How], Compared] = {}
    for name, (before, after) in refs.items():
        target = targets[name]
        one = found.setdefault((kind_of(name), target.how), Compared(kind_of(name), target.how, target.can_be_whole))
        sums = _sums(before, after, TensorRef(adapted, name))
        one.tensors += 1
        one.changed += sums[1] > 0
        one.weights, one.change, one.error = (
            old + new for old, new in zip((one.weights, one.change, one.error), sums, strict=True)
        )
        progress(after.info.nbytes)
    return list(found.values())


def _sums(before: TensorRef, after: TensorRef, made: TensorRef) -> tuple[float, float, float]:
    """Sums of squares: of the changed tensor, of what it has more than the base, of what it has more than the adapted base."""
    sums = [0.0, 0.0, 0.0]
    buffers = [torch.empty(READ_ELEMENTS * 8, dtype=torch.uint8) for _ in range(3)]
    for start in range(0, after.info.numel, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, after.info.numel)
        base, wanted, got = (
            ref.read(start, stop, buffer).double() for ref, buffer in zip((before, after, made), buffers, strict=True)
        )
        for at, values in enumerate((wanted, wanted - base, wanted - got)):
            sums[at] += float(values @ values)
    return sums[0], sums[1], sums[2]


def table(compared: Sequence[Compared]) -> str:
    """What was compared, for people: relative sizes per kind of tensor, and of all together."""
    words = {"factors": "factors", "whole": "whole", "lost": "not stored"}
    rows = [
        (one.kind, words[one.how], f"{one.changed}/{one.tensors}", *_shares(one))
        for one in compared
        if one.changed or one.how != "lost"
    ]
    everything = Compared("all", "factors")
    for one in compared:
        everything.tensors += one.tensors
        everything.changed += one.changed
        everything.weights += one.weights
        everything.change += one.change
        everything.error += one.error
    rows.append(("all", "", f"{everything.changed}/{everything.tensors}", *_shares(everything)))
    head = ("tensors", "stored as", "changed", "|change|/|w|", "|error|/|change|", "|error|/|w|")
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shares(one: Compared) -> tuple[str, str, str]:
    return f"{one.change_of_weights:.2e}", f"{one.error_of_change:.2e}", f"{one.error_of_weights:.2e}"
