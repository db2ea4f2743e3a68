"""Task arithmetic: add the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Method, parameter
from merging.methods.linear import check_weight_sum
from streaming.blocks import Block


def weighted_sum(task_vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum w_i d_i, in the order of the models, over `[n]` float32 each; overwrites the task vectors, returns the first."""
    total = task_vectors[0].mul_(weights[0])
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        total.add_(task_vector.mul_(weight))
    return total


def add_to_base(base: torch.Tensor, delta: torch.Tensor, lambda_: float) -> torch.Tensor:
    """b + lambda * delta over `[n]` float32; overwrites and returns `delta`."""
    return delta.mul_(lambda_).add_(base)


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """Add the weighted task vectors to the base.

        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    Source: arXiv:2212.04089, equation 1; mergekit's `task_arithmetic`. Deviation: float32 inside.
    """

    additive: ClassVar[bool] = True

    weights: tuple[float, ...] = parameter("weight")
    lambda_: float = parameter("lambda")
    normalize: bool = parameter("normalize")

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
