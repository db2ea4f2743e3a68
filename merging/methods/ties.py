"""TIES: trim small changes, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.sparse import ThinnedByElement
from merging.methods.trim import Trim, measure_trims
from merging.parameters import shared
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Number, where


@dataclass(frozen=True)
class Ties(ThinnedByElement):
    """Trim, elect sign, and merge.

        d_i  <- its int(density_i * n) largest |d_i|, the rest 0
        D_i  = w_i d_i;   s = sign(sum D_i), 0 counts as +
        out  = b + lambda * sum of D_i with sign s / sum of their w_i        (not divided where `normalize` is false)

    Source: arXiv:2306.01708; mergekit's `ties`. Deviations: float32 inside; of magnitudes equal to the threshold the
    lower index is kept, so that exactly int(density * n) elements remain (mergekit's order there is unspecified).
    """

    name: ClassVar[str] = "ties"
    elects: ClassVar[bool] = True

    normalize: bool = shared("normalize", default=True)

    def select(self, tensor: TensorSpec, scan: Scan) -> tuple[Trim, ...]:
        """The threshold of each model; see `measure_trims`."""
        return measure_trims(tensor, scan, self.densities)

    def thin(self, x: Element, tensor: TensorSpec, selection: Any) -> Sequence[Number]:
        """See `ThinnedByElement.thin`."""
        return [
            where(trim.keeps(x, vector), vector, 0.0) if density < 1.0 else vector
            for vector, trim, density in zip(x.models, selection, self.densities, strict=True)
        ]
