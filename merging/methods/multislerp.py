"""MultiSLERP: the mean direction of several models, as long as the models are on average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from checkpoints.errors import ArgumentError
from merging.methods.contract import Elementwise, Method
from merging.methods.gram import add_scaled, measure_gram
from merging.parameters import parameter, shared
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Formula, Number


@dataclass(frozen=True)
class MultiSlerp(Elementwise):
    """Average the directions of the task vectors on the sphere, and their lengths; each tensor as one vector.

        w_i <- w_i / sum w_i        (not where `normalize_weights` is false)
        u_i = d_i / (|d_i| + eps),   m = sum w_i u_i
        out = b + (sum w_i |d_i|) m / |m|
        where |m| < eps:   out = b + sum w_i d_i

    In a recipe without a base model the weights x_i take the place of the task vectors, and nothing is added.

    Source: mergekit's `multislerp`, which also goes from m / |m| along the tangent sum w_i (u_i - (u_i . m) m). That tangent
    is 0 at this m, whatever the models. Deviations: float32 inside, products in float64; more than two models without a
    mean direction (|m| < eps, such as a tensor that no model changed) are added up, where mergekit ends with an error.
    """

    name: ClassVar[str] = "multislerp"

    weights: tuple[float, ...] = shared("weight")
    normalize_weights: bool = parameter(
        "normalize_weights", "divide the weights by their sum", default=True, kind="switch"
    )
    eps: float = parameter("eps", "lengths below this have no direction", default=1e-8, above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_weights and abs(sum(self.weights)) < 1e-8:
            raise ArgumentError(
                f"weight: {', '.join(f'{w:g}' for w in self.weights)} add up to 0, which normalize_weights divides by. Set it to false."
            )

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """What each model is multiplied with, `[models, 1, 1, 1]` float64."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        gram = measure_gram(tensor, scan, lambda x: x.models)[..., 0, 0, 0]
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if self.normalize_weights:
            weights = weights / sum(self.weights)
        norms = gram.diagonal().sqrt()
        units = weights / (norms + self.eps)  # m as a sum of the vectors
        length = math.sqrt(max(float(units @ gram @ units), 0.0))
        factors = weights if length < self.eps else units * float(weights @ norms) / length
        return factors.view(-1, 1, 1, 1)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            total = add_scaled(x, x.models, statistics)
            return total if self.space == "weights" else total + x.base

        return merged

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """See `Method.without_base`."""
        return MultiSlerpOfWeights


@dataclass(frozen=True)
class MultiSlerpOfWeights(MultiSlerp):
    """`MultiSlerp` of the weights of the models: what a recipe without a base model asks for."""

    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
