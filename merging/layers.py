"""Which tensors belong to which layer, by their names alone: `model.layers.3.mlp.up_proj.weight` to layer 3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkpoints.tensor_names import LayerName, split_name


@dataclass(frozen=True)
class Layers:
    """The stacks of layers among a checkpoint's tensors.

    Attributes:
        counts: prefix of the names -> number of layers.
    """

    counts: Mapping[str, int]

    def split(self, tensor: str) -> LayerName | None:
        """The parts of a layer's tensor's name; None for a tensor outside of the layers."""
        parts = split_name(tensor)
        return parts if parts and parts.prefix in self.counts else None

    def position(self, tensor: str) -> float:
        """Where among the layers a tensor is: 0 for the first to 1 for the last, 1 for an only one, 0 outside of them."""
        parts = self.split(tensor)
        return 0.0 if parts is None else position(parts.layer, self.counts[parts.prefix])


def span(first: int, count: int) -> str:
    """So many layers for people: `layers 0-7`, `layer 8`."""
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"


def position(index: int, count: int) -> float:
    """Where among `count` layers the one of this index is: 0 for the first to 1 for the last, 1 for an only one."""
    return index / (count - 1) if count > 1 else 1.0


def find_layers(tensors: Iterable[str]) -> Layers:
    """The stacks of layers: where the first number in the names runs from 0 without a gap."""
    layers: dict[str, set[int]] = {}
    for tensor in tensors:
        parts = split_name(tensor)
        if parts:
            layers.setdefault(parts.prefix, set()).add(parts.layer)
    return Layers({prefix: len(seen) for prefix, seen in layers.items() if seen == set(range(len(seen)))})
