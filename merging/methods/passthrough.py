"""Passthrough: one model as it is, for stacks of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from merging.methods.contract import Elementwise, Method
from merging.parameters import parameter
from streaming.blocks import TensorSpec
from streaming.elements import Element, Formula, Number


@dataclass(frozen=True)
class Passthrough(Elementwise):
    """Take the one model's weights.

        out = scale * x

    In a recipe file, slices of one model each stack layers.

    Source: mergekit's `passthrough`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "passthrough"
    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    max_models: ClassVar[int | None] = 1

    weights: tuple[float, ...] = parameter("scale", "what the weights are multiplied with", default=1.0, per_model=True)

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            return x.models[0] * x.number(self.weights[0])

        return merged

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """See `Method.without_base`."""
        return cls
