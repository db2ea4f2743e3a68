"""Karcher mean: the point of the sphere whose squared distances to the models add up to the least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from merging.methods.contract import Elementwise, Method
from merging.methods.gram import add_scaled, measure_gram
from merging.parameters import parameter
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Formula


@dataclass(frozen=True)
class Karcher(Elementwise):
    """Average the directions of the models on the sphere, and their lengths; each tensor as one vector.

        u_i = x_i / |x_i|,   u = mean(u_i) / |mean(u_i)|
        at most max_iter times:  T = mean(theta_i / sin theta_i (u_i - cos theta_i u)),  theta_i the angle between u and u_i
                                 stop where |T| < tol;   u <- cos|T| u + sin|T| T / |T|
        out = mean(|x_i|) u

    Tensors of norm tol or less have no direction and count in the length only. The base gives no numbers.

    All of it happens in the space that the models span: the scalar products of the models are all that is measured.

    Source: mergekit's `karcher`. Deviations: float32 inside, directions in float64; a model opposite to u, to which there
    is no shortest way, does not pull.
    """

    name: ClassVar[str] = "karcher"
    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False

    max_iter: int = parameter("max_iter", "steps at most", default=10, kind="whole", low=0)
    tol: float = parameter("tol", "a step shorter than this, in radians, is the last", default=1e-5, low=0.0)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """What each model is multiplied with, `[models, 1, 1, 1]` float64."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        gram = measure_gram(tensor, scan, lambda x: x.models)[..., 0, 0, 0]
        return karcher_factors(gram, int(self.max_iter), self.tol).view(-1, 1, 1, 1)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula:
        """See `Elementwise.formula`."""
        return lambda x: add_scaled(x, x.models, statistics)

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """See `Method.without_base`."""
        return cls


def karcher_factors(gram: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """The Karcher mean as a sum of the models: what each is multiplied with.

    Args:
        gram: `[models, models]` float64, the scalar products x_i . x_j.
        max_iter, tol: see `Karcher`.

    Returns: `[models]` float64.
    """
    norms = gram.diagonal().sqrt()
    factors = torch.zeros_like(norms)
    valid = norms > tol
    if not valid.any():
        return factors
    # From here on a vector is its factors of the unit vectors u_i, and `unit` has their scalar products.
    unit = gram[valid][:, valid] / norms[valid].outer(norms[valid])
    count = len(unit)

    def length(vector: torch.Tensor) -> float:
        return math.sqrt(max(float(vector @ unit @ vector), 0.0))

    mean = torch.full((count,), 1 / count, dtype=torch.float64)
    if length(mean) < tol:
        mean = torch.eye(count, dtype=torch.float64)[0]
    mean = mean / length(mean)
    previous = math.inf
    for _ in range(max_iter):
        cosines = (unit @ mean).clamp(-1, 1)
        angles = cosines.arccos()
        pulls = (angles >= tol) & (angles <= math.pi - 1e-6)
        rates = torch.where(pulls, angles / angles.sin(), 0.0) / count
        tangent = rates - (rates * cosines).sum() * mean
        size = length(tangent)
        # What is left of T below 1e-6 and no longer shrinks is rounding: a tol of 1e-10 is never reached.
        if size < tol or 1e-6 > size >= previous:
            break
        previous = size
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean = mean / length(mean)
    factors[valid] = norms.mean() * mean / norms[valid]
    return factors
