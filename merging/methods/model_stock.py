"""Model Stock: from the base towards the mean of the models, as far as the angle between them says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch

from merging.methods.contract import Elementwise
from merging.methods.gram import add_scaled, measure_gram
from merging.parameters import parameter
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Formula, Number

LEAST_NORMS = 1e-6


@dataclass(frozen=True)
class ModelStock(Elementwise):
    """Interpolate between the base and the mean of N models.

        c = mean over the pairs of d_i . d_j / max(|d_i| |d_j|, 1e-6), each in [-1, 1]
        t = N c / (1 + (N - 1) c)
        out = b + t * mean(d_i)

    One c for each tensor; `filter_wise` takes one for each row of a matrix.

    Source: arXiv:2403.19522; mergekit's `model_stock`. Deviations: float32 inside, products in float64. Where 1 + (N - 1) c
    is 0 (task vectors that cancel each other) t is 0, as there.
    """

    name: ClassVar[str] = "model_stock"
    min_models: ClassVar[int] = 2

    filter_wise: bool = parameter(
        "filter_wise",
        "one ratio for each row of a matrix instead of one for each tensor",
        default=False,
        kind="switch",
    )

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """t, `[1, matrices, rows, 1]` float64; see `measure_gram`."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        gram = measure_gram(tensor, scan, lambda x: x.models, "rows" if self.filter_wise else "tensor")
        norms = [gram[i, i].sqrt() for i in range(len(gram))]
        cosines = [
            (gram[i, j] / (norms[i] * norms[j]).clamp(min=LEAST_NORMS)).clamp(-1, 1)
            for i, j in combinations(range(len(gram)), 2)
        ]
        cosine = torch.stack(cosines).mean(dim=0)
        divisor = 1 + (len(gram) - 1) * cosine
        return torch.where(divisor > LEAST_NORMS, len(gram) * cosine / divisor, 0.0).unsqueeze(0)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            total = x.models[0]
            for vector in x.models[1:]:
                total = total + vector
            return add_scaled(x, [total / x.number(len(x.models))], statistics) + x.base

        return merged
