"""Sign election: where task vectors disagree, the sign with the larger total wins (TIES and what builds on it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from streaming.elements import Number, where


def elect_and_sum(vectors: Sequence[Number], weights: Sequence[Number], *, normalize: bool) -> Number:
    """Sum what agrees with the elected sign.

        D_i = w_i d_i;   s = sign(sum D_i), an exact 0 counts as +
        out = sum of the D_i with sign(D_i) = s        (`normalize`: divided by the sum of their w_i, a sum of 0 counts as 1)

    A D_i of 0 agrees with neither sign, so a trimmed element does not count in the divisor.

    Args:
        vectors: task vectors of an element, trimmed or dropped already.
        weights: one per task vector, any sign.
        normalize: mean over the agreeing models rather than their sum.

    Source: arXiv:2306.01708, section 4; mergekit's `sum` consensus, which elects on the weighted task vectors.
    """
    weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
    agreed, divisor = sum_agreeing(weighted, elect_sign(weighted), weights)
    return agreed / where(divisor == 0.0, 1.0, divisor) if normalize else agreed


def elect_sign(vectors: Sequence[Number]) -> Number:
    """sign(sum of the vectors), an exact 0 counts as +: +1 or -1."""
    total = 0.0 + vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return where(total >= 0.0, 1.0, -1.0)


def sum_agreeing(vectors: Sequence[Number], sign: Number, weights: Sequence[Number]) -> tuple[Number, Number]:
    """Sum the vectors that have a sign (+1 or -1), weighted already, and their weights."""
    agreed: Number | float = 0.0
    divisor: Number | float = 0.0
    for vector, weight in zip(vectors, weights, strict=True):
        turned = vector * sign  # exact: the sign turned to +
        agreed = agreed + where(turned < 0.0, 0.0, turned)
        divisor = divisor + where(turned > 0.0, 1.0, 0.0) * weight  # exact: a product with 0 or 1
    return agreed * sign, cast(Number, divisor)
