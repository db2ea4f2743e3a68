"""DARE: drop elements of the task vectors at random and rescale the rest, then merge linearly or with elected signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Method, parameter
from merging.methods.linear import check_weight_sum
from merging.methods.signs import elect_and_sum
from merging.methods.task_arithmetic import add_to_base, weighted_sum
from merging.randomness import drop_
from streaming.blocks import Block


@dataclass(frozen=True)
class _Dare(Method):
    """Drop each element of d_i with probability 1 - density_i, multiply the kept by 1 / density_i."""

    draws: ClassVar[bool] = True

    weights: tuple[float, ...] = parameter(key="weight", default=1.0, per_model=True)
    densities: tuple[float, ...] = parameter(key="density", default=0.5, low=0.0, high=1.0, per_model=True)
    lambda_: float = parameter(key="lambda", default=1.0)
    normalize: bool = parameter(key="normalize", default=False)
    seed: int = 0

    def drop_and_rescale(self, block: Block) -> list[torch.Tensor]:
        """The block's task vectors, dropped and rescaled in place."""
        region = block.region
        for model, (values, density) in enumerate(zip(block.task_vectors, self.densities, strict=True)):
            if density < 1.0:
                drop_(values, density, seed=self.seed, tensor=region.tensor.name, model=model, start=region.start)
                if density > 0.0:
                    values.div_(density)
        return block.task_vectors


@dataclass(frozen=True)
class DareLinear(_Dare):
    """Drop, rescale, and add up.

        d_i <- d_i * m_i / density_i,   m_i ~ Bernoulli(density_i)
        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    Source: arXiv:2311.03099, section 3; mergekit's `dare_linear`. Deviations: float32 inside; 1 / density as in the paper
    where mergekit rescales by the ratio of the l1 norms; masks from `merging/randomness.py` instead of a global generator.
    """

    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight_sum(self.weights, self.normalize)

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        delta = weighted_sum(self.drop_and_rescale(block), self.weights)
        if self.normalize:
            delta.div_(sum(self.weights))
        return add_to_base(block.base, delta, self.lambda_)


@dataclass(frozen=True)
class DareTies(_Dare):
    """Drop, rescale, elect signs, and add up what agrees.

        d_i <- d_i * m_i / density_i,   m_i ~ Bernoulli(density_i);   D_i = w_i d_i;   s = sign(sum D_i), 0 counts as +
        out = b + lambda * sum of D_i with sign s        (divided by the sum of their w_i where `normalize` is true)

    Source: arXiv:2311.03099 and 2306.01708; mergekit's `dare_ties`. Deviations as in `DareLinear`.
    """

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        delta = elect_and_sum(self.drop_and_rescale(block), self.weights, normalize=self.normalize)
        return add_to_base(block.base, delta, self.lambda_)
