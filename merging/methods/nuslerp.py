"""NuSLERP: between two models along the arc between them, or between their task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from checkpoints.settings import setting
from merging.methods.contract import Elementwise, Method
from merging.methods.gram import add_scaled, measure_gram
from merging.parameters import parameter, shared
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Formula, Number
from streaming.sums import Channels

LEAST_NORM = 1e-7
LEAST_SUM = 1e-6
COLINEAR = 1e-6


@dataclass(frozen=True)
class NuSlerp(Elementwise):
    """Interpolate between two task vectors on the sphere: each tensor as one vector, or row by row, or column by column.

        t = w_2 / (w_1 + w_2)        (1/2 where the sum is below 1e-6)
        theta = angle between d_1 and d_2
        out = b + sin((1 - t) theta) / sin theta d_1 + sin(t theta) / sin theta d_2
        where |sin theta| < 1e-6:   out = b + (1 - t) d_1 + t d_2

    `nuslerp_flatten` false takes an angle for each row, with `nuslerp_row_wise` for each column (mergekit's name for it).
    In a recipe without a base model the weights x_1 and x_2 take the place of the task vectors, and nothing is added.

    Source: mergekit's `nuslerp`. Deviations: float32 inside, angles in float64; straight below |sin theta| 1e-6 instead of 1e-8, so that
    opposite vectors cannot blow up; a tensor of more than two dimensions is a stack of matrices.
    """

    name: ClassVar[str] = "nuslerp"
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2

    weights: tuple[float, ...] = shared("weight")
    flatten: bool = parameter(
        "nuslerp_flatten",
        "one angle for each tensor; without, one for each of its rows",
        default=True,
        kind="switch",
    )
    row_wise: bool = parameter(
        "nuslerp_row_wise",
        f"with {setting('nuslerp_flatten', 'false')}: one for each column",
        default=False,
        kind="switch",
    )

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """What the two are multiplied with, `[2, matrices, rows, columns]` float64; see `measure_gram`."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        channels: Channels = "tensor" if self.flatten else "columns" if self.row_wise else "rows"
        gram = measure_gram(tensor, scan, lambda x: x.models, channels)
        first, second = (gram[i, i].sqrt().clamp_(min=LEAST_NORM) for i in (0, 1))
        angle = (gram[0, 1] / (first * second)).clamp_(-1, 1).arccos()
        total = sum(self.weights)
        t = 0.5 if abs(total) < LEAST_SUM else self.weights[1] / total
        arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
        line = torch.tensor([1 - t, t], dtype=torch.float64).view(2, 1, 1, 1)
        return torch.where(angle.sin().abs() < COLINEAR, line, arc)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            total = add_scaled(x, x.models, statistics)
            return total if self.space == "weights" else total + x.base

        return merged

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """See `Method.without_base`."""
        return NuSlerpOfWeights


@dataclass(frozen=True)
class NuSlerpOfWeights(NuSlerp):
    """`NuSlerp` between the weights of two models: what a recipe without a base model asks for."""

    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
