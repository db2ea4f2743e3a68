"""Model Breadcrumbs: drop the largest changes and the smallest, then merge linearly or with elected signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.sparse import ThinnedByElement
from merging.methods.trim import Trim, measure_largest
from merging.parameters import parameter
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Number, where


@dataclass(frozen=True)
class Breadcrumbs(ThinnedByElement):
    """Keep the middle of each task vector by magnitude, and add up.

        k_i = int(density_i * n),   t_i = min(int(gamma_i * n), n - k_i)        (n: elements of the tensor)
        d_i <- its k_i largest |d_i| after the t_i largest, the rest 0
        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    Source: arXiv:2312.06795, whose beta is gamma here; mergekit's `breadcrumbs`. Deviations: float32 inside; of equal magnitudes
    the lower index counts as the larger.
    """

    name: ClassVar[str] = "breadcrumbs"
    additive: ClassVar[bool] = True

    gammas: tuple[float, ...] = parameter(
        "gamma",
        "share of each task vector's largest changes that is dropped, one number or one for each model",
        default=0.01,
        per_model=True,
        low=0.0,
        high=1.0,
    )

    def select(self, tensor: TensorSpec, scan: Scan) -> tuple[tuple[Trim, Trim], ...]:
        """For each model the trim that keeps the t + k largest, and the one that keeps the t largest."""
        n = tensor.numel
        kept = [int(density * n) for density in self.densities]
        top = [min(int(gamma * n), n - k) for gamma, k in zip(self.gammas, kept, strict=True)]

        counts = [*(t + k for t, k in zip(top, kept, strict=True)), *top]
        trims = measure_largest(tensor, scan, counts, lambda x: [*x.models, *x.models])
        return tuple(zip(trims[: len(kept)], trims[len(kept) :], strict=True))

    def thin(self, x: Element, tensor: TensorSpec, selection: Any) -> Sequence[Number]:
        """See `ThinnedByElement.thin`."""
        return [
            where(band_and_top.keeps(x, vector) & ~top.keeps(x, vector), vector, 0.0) if density < 1.0 else vector
            for vector, (band_and_top, top), density in zip(x.models, selection, self.densities, strict=True)
        ]


@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Keep the middle of each task vector as `Breadcrumbs`, elect signs as `Ties`, and add up what agrees.

        out = b + lambda * sum of w_i d_i with the sign of sum w_i d_i        (`normalize`: divided by the sum of their w_i)

    Source: arXiv:2312.06795 and 2306.01708; mergekit's `breadcrumbs_ties`. Deviations as in `Breadcrumbs`.
    """

    name: ClassVar[str] = "breadcrumbs_ties"
    elects: ClassVar[bool] = True
    additive: ClassVar[bool] = False
