"""DARE: drop elements of the task vectors at random and rescale the rest, then merge linearly or with elected signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.sparse import ThinnedByElement
from merging.randomness import drop
from streaming.blocks import TensorSpec
from streaming.elements import Element, Number


@dataclass(frozen=True)
class _Dare(ThinnedByElement):
    """Drop each element of d_i with probability 1 - density_i; by the own rule, multiply the kept by 1 / density_i."""

    draws: ClassVar[bool] = True

    seed: int = 0

    def thin(self, x: Element, tensor: TensorSpec, selection: Any) -> Sequence[Number]:
        """See `ThinnedByElement.thin`; rescales too."""
        thinned = []
        for model, (vector, density) in enumerate(zip(x.models, self.densities, strict=True)):
            if density < 1.0:
                vector = drop(x, vector, density, seed=self.seed, tensor=tensor.name, model=model)
                if density > 0.0 and self.rescale is None:
                    vector = vector / x.number(density)
            thinned.append(vector)
        return thinned


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
