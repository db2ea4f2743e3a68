"""SCE: select where the models differ, calculate weights from sizes, erase what disagrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from merging.methods.contract import Elementwise
from merging.methods.gram import measure_sums
from merging.methods.signs import elect_sign, sum_agreeing
from merging.methods.trim import Trim, measure_largest
from merging.parameters import parameter
from streaming.blocks import Scan, TensorSpec
from streaming.elements import Element, Formula, Number, Question, ask, where

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

        def squares(x: Element) -> Sequence[Number]:
            wide = [vector.double() for vector in selected(x, trim)]
            return [vector * vector for vector in wide]

        means = measure_sums(tensor, scan, squares).flatten() / tensor.numel
        total = float(means.sum())
        shares = means / total if total >= LEAST_SUM else torch.full_like(means, 1 / len(means))
        return Sizes(trim, tuple(shares.tolist()))

    def _select(self, tensor: TensorSpec, scan: Scan) -> Trim:
        changed = sum(found.counts[0] for found in ask(scan, lambda x: Question([variance(x.models) != 0.0])))
        (trim,) = measure_largest(
            tensor, scan, [int(self.select_topk * changed)], values=lambda x: [variance(x.models)]
        )
        return trim

    def formula(self, tensor: TensorSpec, statistics: Sizes) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            vectors, weights, least = (
                selected(x, statistics.trim),
                list(map(x.number, statistics.weights)),
                x.number(LEAST_SUM),
            )
            weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
            agreed, divisor = sum_agreeing(weighted, elect_sign(vectors), weights)
            return agreed / where(divisor < least, least, divisor) + x.base

        return merged


def variance(task_vectors: Sequence[Number]) -> Number:
    """Population variance over the models, computed in float64 and rounded to float32."""
    first, *others = (vector.double() for vector in task_vectors)
    mean = first
    for vector in others:
        mean = mean + vector
    mean = mean / float(len(task_vectors))
    total = (first - mean) * (first - mean)
    for vector in others:
        total = total + (vector - mean) * (vector - mean)
    return (total / float(len(task_vectors))).float()


def selected(x: Element, trim: Trim | None) -> Sequence[Number]:
    """The task vectors' numbers, 0 where the element is not selected by variance."""
    if trim is None:
        return x.models
    size = variance(x.models)
    is_kept = trim.keeps(x, size) & (size != 0.0)
    return [where(is_kept, vector, 0.0) for vector in x.models]
