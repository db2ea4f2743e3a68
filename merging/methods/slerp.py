"""SLERP: from the base to a model along the arc between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from merging.methods.contract import Elementwise
from merging.methods.gram import add_scaled, measure_gram
from merging.parameters import REQUIRED, parameter
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Formula

COLINEAR = 0.9995
LEAST_NORM = 1e-8


@dataclass(frozen=True)
class Slerp(Elementwise):
    """Interpolate between base and model on the sphere, each tensor as one vector.

        theta = angle between b and x;   out = sin((1 - t) theta) / sin theta b + sin(t theta) / sin theta x
        where |cos theta| > 0.9995:      out = (1 - t) b + t x

    A vector of norm 1e-8 or less is not normalised for the cosine.

    Source: K. Shoemake, Animating rotation with quaternion curves (1985); mergekit's `slerp`. Deviation: the angle is
    computed in float64.
    """

    name: ClassVar[str] = "slerp"
    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    max_models: ClassVar[int | None] = 1

    t: float = parameter("t", "where between the base (0) and the model (1)", default=0.5, in_files=REQUIRED)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """What base and model are multiplied with, `[2, 1, 1, 1]` float64."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        gram = measure_gram(tensor, scan, lambda x: [x.base, *x.models])
        norms = gram.diagonal().flatten().sqrt()
        units = torch.where(norms > LEAST_NORM, norms, 1.0)
        cosine = gram[0, 1].flatten() / (units[0] * units[1])
        if float(cosine.abs()) > COLINEAR:
            factors = torch.tensor([1 - self.t, self.t], dtype=torch.float64)
        else:
            angle = cosine.arccos()
            factors = torch.cat([((1 - self.t) * angle).sin(), (self.t * angle).sin()]) / angle.sin()
        return factors.view(2, 1, 1, 1)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula:
        """See `Elementwise.formula`."""
        return lambda x: add_scaled(x, [x.base, *x.models], statistics)
