"""RAM and RAM+: average each element over the models that changed it, so that a change of one model alone is not diluted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from merging.methods.contract import Elementwise
from merging.parameters import parameter
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Element, Formula, Number, where


@dataclass(frozen=True)
class Ram(Elementwise):
    """Average over the models that changed an element.

        c = number of models with |d_i| > epsilon        (each element for itself)
        out = b + sum of those d_i / c        (b where c is 0)

    Source: mergekit's `ram`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "ram"

    epsilon: float = parameter(
        "epsilon", "changes up to this, in units of the weights, count as none", default=1e-5, low=0.0
    )

    def formula(self, tensor: TensorSpec, statistics: Sequence[float] | None) -> Formula:
        """See `Elementwise.formula`; statistics: what model i's changes are multiplied with where it is the only one."""

        def merged(x: Element) -> Number:
            total, count, alone = cast(tuple[Number, Number, Number], (0.0, 0.0, 0.0))
            for index, vector in enumerate(x.models):
                changed = where(abs(vector) > x.number(self.epsilon), 1.0, 0.0)
                total = total + vector * changed
                count = count + changed
                if statistics is not None:
                    alone = alone + changed * x.number(statistics[index])
            if statistics is not None:
                total = total * where(count == 1.0, alone, 1.0)
            return total / where(count < 1.0, 1.0, count) + x.base

        return merged


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
