"""TIES: trim small changes, elect a sign, average what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from merging.methods.contract import Method, parameter
from merging.methods.signs import elect_and_sum
from merging.methods.task_arithmetic import add_to_base
from merging.methods.trim import Trim, measure_trims
from streaming.blocks import Block, Scan, TensorSpec


@dataclass(frozen=True)
class Ties(Method):
    """Trim, elect sign, and merge.

        d_i  <- its int(density_i * n) largest |d_i|, the rest 0
        D_i  = w_i d_i;   s = sign(sum D_i), 0 counts as +
        out  = b + lambda * sum of D_i with sign s / sum of their w_i        (not divided where `normalize` is false)

    Source: arXiv:2306.01708; mergekit's `ties`. Deviations: float32 inside; of magnitudes equal to the threshold the
    lower index is kept, so that exactly int(density * n) elements remain (mergekit's order there is unspecified).
    """

    weights: tuple[float, ...] = parameter(key="weight", default=1.0, per_model=True)
    densities: tuple[float, ...] = parameter(key="density", default=0.5, low=0.0, high=1.0, per_model=True)
    lambda_: float = parameter(key="lambda", default=1.0)
    normalize: bool = parameter(key="normalize", default=True)

    def measure(self, tensor: TensorSpec, scan: Scan) -> tuple[Trim, ...]:
        """The threshold of each model; see `measure_trims`."""
        return measure_trims(tensor, scan, self.densities)

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        for task_vector, trim, density in zip(block.task_vectors, statistics, self.densities, strict=True):
            if density < 1.0:
                trim.apply_(task_vector, block.region.start)
        return add_to_base(
            block.base, elect_and_sum(block.task_vectors, self.weights, normalize=self.normalize), self.lambda_
        )
