"""NearSwap: take the model's weights where they are near to the base's, and go a step of one length towards them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Method
from merging.parameters import REQUIRED, parameter
from streaming.blocks import Block

LEAST_DISTANCE = 1e-6


@dataclass(frozen=True)
class NearSwap(Method):
    """Move each element of the base towards the model, the nearer it is the further.

        w = min(t / max(|d|, 1e-6), 1)        (each element for itself)
        out = b + w d

    So an element within t of the base becomes the model's, and any other moves by t.

    Source: mergekit's `nearswap`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "nearswap"
    max_models: ClassVar[int | None] = 1

    t: float = parameter("t", "distance from the base, in units of the weights, up to which the model's are taken", default=REQUIRED, low=0.0)  # fmt: skip

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        (values,) = block.task_vectors
        share = torch.full_like(values, self.t).div_(values.abs().clamp_(min=LEAST_DISTANCE)).clamp_(max=1.0)
        return values.mul_(share).add_(block.base)
