"""A control of RegMean: the same moments, of channels in another order. `--method examples.real.controls:ShuffledRegMean`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from merging.methods.regmean import InputMoments, RegMean
from streaming.stream import Merger


@dataclass(frozen=True)
class ShuffledRegMean(RegMean):
    """RegMean with the channels of every input in one other order, the same in all models: how large moments are it knows, not where.

    Source: our own, to compare with.
    """

    name: ClassVar[str] = "shuffled_regmean"

    def with_moments(
        self, moments: Sequence[InputMoments], input_dim: int, where: str, base: InputMoments | None = None
    ) -> Merger:
        """See `RegMean.with_moments`."""
        shuffled = [_shuffled(one) for one in moments]
        return super().with_moments(shuffled, input_dim, where, base and _shuffled(base))


def _shuffled(moments: InputMoments) -> InputMoments:
    """Moments `[in, in]` with their channels in an order that the number of channels gives."""
    channels = moments.rest.shape[-1]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(channels)).to(moments.rest.device)
    return InputMoments(moments.rest[..., order, :][..., order], moments.first[..., order, :][..., order])
