"""RAM and RAM+: average each element over the models that changed it, so that a change of one model alone is not diluted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Method
from merging.parameters import parameter
from streaming.blocks import Block, Scan, TensorSpec


@dataclass(frozen=True)
class Ram(Method):
    """Average over the models that changed an element.

        c = number of models with |d_i| > epsilon        (each element for itself)
        out = b + sum of those d_i / c        (b where c is 0)

    Source: mergekit's `ram`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "ram"

    epsilon: float = parameter(
        "epsilon", "changes up to this, in units of the weights, count as none", default=1e-5, low=0.0
    )

    def combine(self, block: Block, statistics: Sequence[float] | None) -> torch.Tensor:
        """See `Method.combine`; statistics: what model i's changes are multiplied with where it is the only one."""
        assert block.base is not None
        total = torch.zeros_like(block.base)
        count = torch.zeros_like(block.base)
        alone = torch.zeros_like(block.base)
        for index, values in enumerate(block.task_vectors):
            changed = values.abs().gt_(self.epsilon)  # 1 or 0
            total.add_(values.mul_(changed))
            count.add_(changed)
            if statistics is not None:
                alone.add_(changed.mul_(statistics[index]))
        if statistics is not None:
            total.mul_(torch.where(count == 1.0, alone, 1.0))
        return total.div_(count.clamp_(min=1.0)).add_(block.base)


@dataclass(frozen=True)
class RamPlusTl(Ram):
    """Average as `Ram`, and enlarge the changes of one model alone, the more of the model's changes are shared.

        s_i = elements that model i changed and another one too,   u_i = elements that only model i changed        (in the tensor)
        out as of `Ram`, where only model i changed an element with d_i (1 + r min(max(s_i / u_i, 0), alpha))

    Source: mergekit's `ramplus_tl`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "ramplus_tl"

    r: float = parameter(
        "r", "how much more a change of one model alone counts, per s / u: shared changes by own ones", default=0.1
    )
    alpha: float = parameter("alpha", "the largest s / u that counts", default=0.2, low=0.0)

    def measure(self, tensor: TensorSpec, scan: Scan) -> list[float]:
        """What each model's changes are multiplied with where it is the only one."""

        def count(block: Block) -> torch.Tensor:
            changed = torch.stack([values.abs() > self.epsilon for values in block.task_vectors])
            number = changed.sum(dim=0)
            return torch.stack([(changed & (number > 1)).sum(dim=1), (changed & (number == 1)).sum(dim=1)]).cpu()

        counts: Any = sum(scan(count))
        if not tensor.numel:
            return []  # no block will ask for it
        shared, own = counts.tolist()
        return [1 + self.r * min(s / u if u else 0.0, self.alpha) for s, u in zip(shared, own, strict=True)]
