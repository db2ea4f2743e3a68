"""Sign election: where task vectors disagree, the sign with the larger total wins (TIES, DARE-TIES)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
    total = torch.zeros_like(task_vectors[0])
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        total.add_(task_vector.mul_(weight))
    sign = total.ge_(0.0).mul_(2.0).sub_(1.0)  # +1 or -1, in place of the total
    agreed = torch.zeros_like(sign)
    divisor = torch.zeros_like(sign) if normalize else None
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        task_vector.mul_(sign).clamp_(min=0.0)  # exact: the sign turned to +, what disagrees gone
        agreed.add_(task_vector)
        if divisor is not None:
            divisor.add_(task_vector.gt_(0.0), alpha=weight)  # exact: a product with 0 or 1
    agreed.mul_(sign)
    if divisor is not None:
        agreed.div_(divisor.add_(torch.eq(divisor, 0.0, out=sign)))
    return agreed
