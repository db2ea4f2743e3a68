"""SCE: select where the models differ, calculate weights from sizes, erase what disagrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from merging.methods.contract import Elementwise
from merging.methods.signs import elect_sign, sum_agreeing
from merging.methods.trim import Trim, measure_largest
from merging.parameters import parameter
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Element, Formula, Number, Tensors, where

LEAST_SUM = 1e-6
"""mergekit's bound on sums of weights."""


class Sizes(NamedTuple):
    """What `measure` finds: which elements are selected (None: all), and the weight of each model."""

    trim: Trim | None
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Sce(Elementwise):
    """Keep the elements in which the models differ most, weigh the models by the size of what is left, elect signs.

        v = variance of d_i over the models, each element for itself
        d_i <- d_i at the int(select_topk * (number of v > 0)) largest v, else 0        (all where select_topk is 1)
        w_i = mean(d_i^2) / sum of these        (all alike where the sum is below 1e-6)
        s = sign(sum d_i), 0 counts as +
        out = b + sum of w_i d_i with sign s / max(sum of their w_i, 1e-6)

    Source: arXiv:2408.07990; mergekit's `sce`. Deviations: float32 inside, variances and sums in float64; of equal variances the
    lower index is kept.
    """

    name: ClassVar[str] = "sce"
    select_topk: float = parameter(
        "select_topk",
        "share of the changed elements that is kept: those in which the models differ most",
        default=1.0,
        low=0.0,
        high=1.0,
    )

    def measure(self, tensor: TensorSpec, scan: Scan) -> Sizes:
        """See `Sizes`; one reading, and two more and a sample below select_topk 1."""
        if not tensor.numel:
            return Sizes(None, ())  # no block will ask for it
        trim = None if self.select_topk >= 1.0 else self._select(tensor, scan)

        def squares(block: Block) -> torch.Tensor:
            select_(block, trim)
            return torch.stack([values.double().square_().sum() for values in block.task_vectors]).cpu()

        means = torch.stack(list(scan(squares))).sum(dim=0) / tensor.numel
        total = float(means.sum())
        shares = means / total if total >= LEAST_SUM else torch.full_like(means, 1 / len(means))
        return Sizes(trim, tuple(shares.tolist()))

    def _select(self, tensor: TensorSpec, scan: Scan) -> Trim:
        changed = sum(scan(lambda block: int(variance(block.task_vectors).count_nonzero())))

        def of_variance(measure: Any, regions: Any = None) -> Any:
            return scan(lambda block: measure(replace(block, task_vectors=[variance(block.task_vectors)])), regions)

        (trim,) = measure_largest(tensor, of_variance, [int(self.select_topk * changed)])
        return trim

    def formula(self, tensor: TensorSpec, statistics: Sizes) -> Formula | None:
        """See `Elementwise.formula`; variances are no numbers of float32."""
        return self._elected(statistics.weights) if statistics.trim is None else None

    def combine(self, block: Block, statistics: Sizes) -> torch.Tensor:
        """See `Method.combine`."""
        select_(block, statistics.trim)
        return self._elected(statistics.weights)(Tensors(block))

    def _elected(self, shares: Sequence[float]) -> Formula:
        """What is made of the elements that are selected."""

        def merged(x: Element) -> Number:
            sign, weights, least = elect_sign(x.models), list(map(x.number, shares)), x.number(LEAST_SUM)
            weighted = [vector * weight for vector, weight in zip(x.models, weights, strict=True)]
            agreed, divisor = sum_agreeing(weighted, sign, weights)
            return agreed / where(divisor < least, least, divisor) + x.base

        return merged


def variance(task_vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Population variance over the models, computed in float64: `[n]` float32 each -> `[n]` float32."""
    mean = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for values in task_vectors:
        mean.add_(values)
    mean.div_(len(task_vectors))
    total = torch.zeros_like(mean)
    for values in task_vectors:
        total.add_((values - mean).square_())
    return total.div_(len(task_vectors)).float()


def select_(block: Block, trim: Trim | None) -> None:
    """Set to 0, in place, the elements of every task vector that are not selected by variance."""
    if trim is not None:
        x, sizes = Tensors(block), variance(block.task_vectors)
        dropped = where(trim.keeps(x, sizes), sizes, 0.0) == 0
        for values in block.task_vectors:
            values.masked_fill_(dropped, 0.0)
