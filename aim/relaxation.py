"""The relaxation as a transform of the merge's stream: block by block, before the one rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from aim.activations import Activations
from aim.formula import Control, Scaling, factors, normalise, relax_like_the_reference, without_channels
from aim.omegas import Omega
from aim.targets import Selection
from streaming.blocks import Region
from streaming.tally import Tally, sample_of


@dataclass(frozen=True)
class ChannelFactors:
    """How much of the task vector a tensor keeps per input channel.

    values: `[in]` or `[experts, in]` float32; input_dim: the tensor's dimension that runs over them.
    """

    values: torch.Tensor
    input_dim: int

    def of(self, region: Region) -> torch.Tensor:
        """The factors of a region, shaped to multiply `region.as_stack(...)`: `[matrices or 1, rows or 1, columns or 1]`."""
        values = self.values[slice(*region.matrix_range)] if self.values.ndim == 2 else self.values[None]
        if self.input_dim == len(region.tensor.shape) - 1:
            return values[:, None, slice(*region.column_range)]
        return values[:, slice(*region.row_range), None]


class Relaxation:
    """Pulls merged weights back to the base; a `streaming.stream.Transform`.

    Args:
        channels: tensor -> its factors; a tensor that is not in it stays as merged.
        device: where blocks are.
        like_the_reference: round as the published program does.

    Attributes:
        tally: sums of |relaxed - merged|, and numbers of elements.
    """

    def __init__(
        self, channels: Mapping[str, ChannelFactors], device: torch.device, *, like_the_reference: bool = False
    ):
        self._channels = {name: ChannelFactors(one.values.to(device), one.input_dim) for name, one in channels.items()}
        self._like_the_reference = like_the_reference
        self.tally = Tally(2, lambda sums: {"relaxed_mean_change": sums[0] / sums[1]})

    @property
    def relaxed(self) -> int:
        """Number of tensors it changes."""
        return len(self._channels)

    def applies_to(self, tensor: str) -> bool:
        """See `Transform`."""
        return tensor in self._channels

    def __call__(self, region: Region, base: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """See `Transform`."""
        factor = self._channels[region.tensor.name].of(region)
        start, end = region.as_stack(base), region.as_stack(merged)
        if self._like_the_reference:
            relaxed = relax_like_the_reference(start, end, factor)
        else:
            relaxed = torch.lerp(start, end, factor.expand_as(start))
        for part in sample_of(region):
            change = (relaxed.view(-1)[part] - merged[part]).abs().sum()
            self.tally.add(region.tensor.name, region.start + part.start, (float(change), part.stop - part.start))
        return relaxed.view(-1)

    def mean_changes(self) -> dict[str, float]:
        """Mean |relaxed - merged| per kind of layer, over the blocks that were looked at (one in 16), to 4 digits."""
        return {kind: float(f"{change / elements:.4g}") for kind, (change, elements) in self.tally.by_kind().items()}


def make_channels(
    activations: Activations,
    selection: Selection,
    omega: Omega,
    *,
    scaling: Scaling = "identity",
    control: Control = "none",
    seed: int = 0,
) -> dict[str, ChannelFactors]:
    """Factors for every tensor that has statistics and whose omega is below 1.

    Args:
        activations: of the base; selection: what the base offers to be relaxed.
        omega, scaling, control: see `aim.formula`; seed: of the permuted control.
    """
    channels = {}
    dims = {**selection.input_dims, **activations.input_dims}
    for name in selection.targets:
        if name in activations.statistics and omega.of(name) < 1.0:
            f = factors(importance_of(activations, name, scaling), omega.of(name))
            channels[name] = ChannelFactors(without_channels(f, control, seed=seed, tensor=name), dims[name])
    return channels


def importance_of(activations: Activations, name: str, scaling: Scaling = "identity") -> torch.Tensor:
    """s of one tensor, `[in]` or `[experts, in]`; zero for an expert that saw no token, which therefore stays as merged."""
    mean_abs = activations.statistics[name].mean_abs
    active = mean_abs.amax(dim=-1) > 0
    s = torch.zeros_like(mean_abs)
    s[active] = normalise(mean_abs[active], scaling)
    return s
