"""Where the tensors of a checkpoint end up in its model, as plain data; `checkpoints.architecture` finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from checkpoints.tensor_names import split_name

Kind = Literal["linear", "conv1d", "experts", "norm", "embedding", "bias", "convolution", "other"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor on disk ends up in the model."""

    parameter: str
    """Name of the parameter, as in `model.get_parameter`."""
    kind: Kind
    """linear: a matrix that its module multiplies the input with; conv1d: the same, stored input first; experts: such
    matrices fused for all experts of a layer; norm: one-dimensional, and a norm if the module's input is as wide (who
    sees inputs checks that); embedding: an nn.Embedding, or what one is tied to; bias; convolution: its kernel; other: anything
    else, whose use only a run of the model tells."""
    input_dim: int | None = None
    """The dimension of the tensor ON DISK that runs over the module's input channels; None where none does."""
    expert: int | None = None
    """Which expert, where the disk tensor is one slice of a fused parameter."""
    others: tuple[str, ...] = ()
    """Further parameters cut from the same disk tensor: a projection that is fused on disk and not in the model."""
    start: int | None = field(default=None, compare=False)
    """Where in the flattened parameter the flattened tensor begins, which is one run of its elements, in order; None where
    it is not: transposed, say, or cut into several parameters."""

    axes: tuple[int | None, ...] = field(default=(), compare=False)
    """For each dimension of the parameter the one of the tensor on disk that becomes it whole; None where none does."""

    @property
    def module(self) -> str:
        """Dotted name of the module that holds the parameter; its input is what `input_dim` runs over."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's tensors, by their names on disk.

    A stored tensor is in exactly one of `placements`, `buffers`, `ignored` and `unplaced`.
    """

    model_class: str
    placements: Mapping[str, Placement]
    tied: Mapping[str, str]
    """Tensor -> tensor that has its values, where the config ties them; the second is stored if one of them is. If
    both are stored they may differ, and then they are not tied after all: transformers compares them."""
    input_embedding: str | None
    """The token embedding; the name to expect if it is not stored; None for a model without one."""
    output_head: str | None
    """The matrix that makes the logits; the name to expect if it is not stored; None for a model without one."""
    buffers: tuple[str, ...]
    """Stored, and loaded, but no parameter (a router's correction bias): no weight, and not to be left out either."""
    ignored: tuple[str, ...]
    """Stored, and skipped on loading on purpose: the model computes it (rotary frequencies, masks)."""
    unplaced: tuple[str, ...]
    """Stored, and nothing in the model takes it."""
    missing: tuple[str, ...]
    """Parameters, by their names in the model, that no stored tensor fills and the model class expects."""
    mismatched: Mapping[str, str]
    """Stored tensor -> what does not fit, a clause: its shape is not what the config says."""
    decoder: str = ""
    """Dotted name of the module that reads tokens and whose output the head reads; empty where that is the model itself."""

    @cached_property
    def unused(self) -> frozenset[str]:
        """Stored tensors with which the model computes nothing: those that loading ignores, and layers behind its last one,
        which guess the tokens after the next."""
        last: dict[str, int] = {}
        for name in filter(None, map(split_name, self.placements)):
            last[name.prefix] = max(name.layer, last.get(name.prefix, 0))
        behind = (
            name for name in self.unplaced if (at := split_name(name)) and at.layer > last.get(at.prefix, at.layer)
        )
        return frozenset((*self.ignored, *behind))

    def is_text(self, name: str) -> bool:
        """Whether a stored tensor belongs to the decoder or is its head: not to a tower that reads images, say."""
        placement = self.placements.get(name)
        if name == self.output_head or placement is None or not self.decoder:
            return True
        return placement.parameter.startswith(f"{self.decoder}.")

    def stored_name(self, name: str) -> str:
        """The disk tensor with the values of `name`: the one that it is tied to, or itself."""
        return self.tied.get(name, name)
