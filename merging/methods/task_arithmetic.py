"""Task arithmetic: add the task vectors to the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Method
from merging.methods.linear import check_weight_sum, weighted_sum
from merging.parameters import shared
from streaming.blocks import Block
from streaming.twins import twin


@twin("merging.kernels")
def add_to_base(base: torch.Tensor, delta: torch.Tensor, lambda_: float) -> torch.Tensor:
    """b + lambda * delta over `[n]` float32; overwrites and returns `delta`."""
    return delta.mul_(lambda_).add_(base)


@dataclass(frozen=True)
class TaskArithmetic(Method):
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

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        delta = weighted_sum(block.task_vectors, self.weights)
        if self.normalize:
            delta.div_(sum(self.weights))
        return add_to_base(block.base, delta, self.lambda_)
