"""NearSwap: take the model's weights where they are near to the base's, and go a step of one length towards them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.contract import Elementwise
from merging.parameters import REQUIRED, parameter
from streaming.blocks import TensorSpec
from streaming.elements import Element, Formula, Number, where

LEAST_DISTANCE = 1e-6


@dataclass(frozen=True)
class NearSwap(Elementwise):
    """Move each element of the base towards the model, the nearer it is the further.

        w = min(t / max(|d|, 1e-6), 1)        (each element for itself)
        out = b + w d

    So an element within t of the base becomes the model's, and any other moves by t.

    Source: mergekit's `nearswap`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "nearswap"
    max_models: ClassVar[int | None] = 1

    t: float = parameter("t", "distance from the base, in units of the weights, up to which the model's are taken", default=REQUIRED, low=0.0)  # fmt: skip

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            (vector,) = x.models
            distance, least = abs(vector), x.number(LEAST_DISTANCE)
            share = x.number(self.t) / where(distance < least, least, distance)
            return vector * where(share > 1.0, 1.0, share) + x.base

        return merged
