"""Sign election: where task vectors disagree, the sign with the larger total wins (TIES and what builds on it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streaming.twins import twin


@twin("merging.kernels")
def elect_and_sum(task_vectors: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Sum what agrees with the elected sign.

        D_i = w_i d_i;   s = sign(sum D_i), an exact 0 counts as +
        out = sum of the D_i with sign(D_i) = s        (`normalize`: divided by the sum of their w_i, a sum of 0 counts as 1)

    A D_i of 0 agrees with neither sign, so a trimmed element does not count in the divisor.

    Args:
        task_vectors: `[n]` float32 each, trimmed or dropped already; overwritten.
        weights: one per task vector, any sign.
        normalize: mean over the agreeing models rather than their sum.

    Returns: `[n]` float32.
    Source: arXiv:2306.01708, section 4; mergekit's `sum` consensus, which elects on the weighted task vectors.
    """
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        task_vector.mul_(weight)
    return sum_agreeing(task_vectors, elect_sign(task_vectors), weights if normalize else None)


def elect_sign(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """sign(sum of the vectors), an exact 0 counts as +: +1 or -1, `[n]` float32. Vectors: `[n]` float32 each, left alone."""
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total.add_(vector)
    return total.ge_(0.0).mul_(2.0).sub_(1.0)  # in place of the total


def sum_agreeing(
    vectors: Sequence[torch.Tensor],
    sign: torch.Tensor,
    weights: Sequence[float] | None,
    least_divisor: float | None = None,
) -> torch.Tensor:
    """Sum what has a sign.

    Args:
        vectors: `[n]` float32 each, weighted already; overwritten.
        sign: `[n]` float32, +1 or -1; overwritten.
        weights: where given, the sum is divided by the sum of the agreeing vectors' weights.
        least_divisor: what the divisor is at least; without it, a divisor of 0 counts as 1.

    Returns: `[n]` float32.
    """
    agreed = torch.zeros_like(sign)
    divisor = None if weights is None else torch.zeros_like(sign)
    for index, vector in enumerate(vectors):
        vector.mul_(sign).clamp_(min=0.0)  # exact: the sign turned to +, what disagrees gone
        agreed.add_(vector)
        if divisor is not None and weights is not None:
            divisor.add_(vector.gt_(0.0), alpha=weights[index])  # exact: a product with 0 or 1
    agreed.mul_(sign)
    if divisor is not None:
        if least_divisor is None:
            divisor.add_(torch.eq(divisor, 0.0, out=sign))
        else:
            divisor.clamp_(min=least_divisor)
        agreed.div_(divisor)
    return agreed
