"""DARE: drop elements of the task vectors at random and rescale the rest, then merge linearly or with elected signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.sparse import SparseTaskVectors
from merging.randomness import drop_
from streaming.blocks import Block


@dataclass(frozen=True)
class _Dare(SparseTaskVectors):
    """Drop each element of d_i with probability 1 - density_i; by the own rule, multiply the kept by 1 / density_i."""

    draws: ClassVar[bool] = True

    seed: int = 0

    def thin_(self, block: Block, selection: Any) -> None:
        """See `SparseTaskVectors.thin_`; rescales too."""
        region = block.region
        for model, (values, density) in enumerate(zip(block.task_vectors, self.densities, strict=True)):
            if density < 1.0:
                divisor = density if density > 0.0 and self.rescale is None else None
                drop_(
                    values, density, seed=self.seed, tensor=region.tensor.name, model=model, start=region.start, divisor=divisor
                )  # fmt: skip


@dataclass(frozen=True)
class DareLinear(_Dare):
    """Drop, rescale, and add up.

        d_i <- d_i * m_i / density_i,   m_i ~ Bernoulli(density_i)
        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    `rescale` true restores the l1 norm of each d_i instead, false rescales nothing.

    Source: arXiv:2311.03099, section 3; mergekit's `dare_linear`. Deviations: float32 inside; 1 / density as in the paper
    where mergekit rescales by the ratio of the l1 norms; masks from `merging/randomness.py` instead of a global generator.
    """

    name: ClassVar[str] = "dare_linear"
    additive: ClassVar[bool] = True


@dataclass(frozen=True)
class DareTies(_Dare):
    """Drop, rescale, elect signs, and add up what agrees.

        d_i <- d_i * m_i / density_i,   m_i ~ Bernoulli(density_i);   D_i = w_i d_i;   s = sign(sum D_i), 0 counts as +
        out = b + lambda * sum of D_i with sign s        (divided by the sum of their w_i where `normalize` is true)

    Source: arXiv:2311.03099 and 2306.01708; mergekit's `dare_ties`. Deviations and `rescale` as in `DareLinear`.
    """

    name: ClassVar[str] = "dare_ties"
    elects: ClassVar[bool] = True
