"""Task arithmetic: add the task vectors to the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from merging.methods.contract import Elementwise
from merging.methods.linear import check_weight_sum, weighted_sum
from merging.parameters import shared
from streaming.blocks import TensorSpec
from streaming.elements import Element, Formula, Number


def add_to_base(base: Number, delta: Number, lambda_: Number | float) -> Number:
    """b + lambda * delta, of numbers of an element or of tensors `[n]` float32."""
    return delta * lambda_ + base


@dataclass(frozen=True)
class TaskArithmetic(Elementwise):
    """Add the weighted task vectors to the base.

        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    Source: arXiv:2212.04089, equation 1; mergekit's `task_arithmetic`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "task_arithmetic"
    additive: ClassVar[bool] = True

    weights: tuple[float, ...] = shared("weight")
    lambda_: float = shared("lambda")
    normalize: bool = shared("normalize")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight_sum(self.weights, self.normalize)

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            delta = weighted_sum(x.models, list(map(x.number, self.weights)))
            if self.normalize:
                delta = delta / x.number(sum(self.weights))
            return add_to_base(x.base, delta, x.number(self.lambda_))

        return merged
