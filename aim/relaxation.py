"""The relaxation as a transform of the merge's stream: block by block, before the one rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from aim.activations import Activations, ChannelStatistics, Means
from aim.choices import Relaxing
from aim.directions import MeanDirection
from aim.formula import (
    AFTER_FIRST,
    Scaling,
    direction,
    drop_top,
    factors,
    normalise,
    other_direction,
    relax_like_the_reference,
    without_channels,
)
from aim.omegas import Omega
from aim.targets import Selection
from streaming.blocks import Region, Scan, TensorSpec
from streaming.elements import Change, lerp
from streaming.tally import Tally, sample_of


class Pull(Protocol):
    """How one tensor is pulled back to the base."""

    @property
    def whole_rows(self) -> bool:
        """See `streaming.stream.Transform`."""

    def to(self, device: torch.device) -> Pull:
        """The same, on a device."""

    def measures(self, tensor: TensorSpec) -> bool:
        """See `streaming.stream.Transform`."""

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """See `streaming.stream.Transform`."""

    def pull(
        self, region: Region, base: torch.Tensor, merged: torch.Tensor, statistics: Any
    ) -> tuple[torch.Tensor, tuple[float, float]]:
        """Pull a region back.

        Args:
            base, merged: `[matrices, rows, columns]` float32, neither overwritten.
            statistics: what `measure` gave.

        Returns: the region, of the same shape; what it adds to |D u|^2 and |D|^2 (0 where there is no direction u).
        """

    def formula(self, tensor: TensorSpec) -> Change | None:
        """See `streaming.stream.Transform`."""


@dataclass(frozen=True)
class ChannelFactors:
    """How much of the task vector a tensor keeps per input channel; a `Pull`.

    values: `[in]` or `[experts, in]` float32, of the matrices of a stack or of as many groups of a matrix's rows; input_dim: the tensor's dimension that runs over them, see `spread`.
    like_the_reference: round as the published program does.
    """

    values: torch.Tensor
    input_dim: int
    like_the_reference: bool = False

    @property
    def whole_rows(self) -> bool:
        """See `Pull`."""
        return False

    def to(self, device: torch.device) -> ChannelFactors:
        """See `Pull`."""
        return replace(self, values=self.values.to(device))

    def measures(self, tensor: TensorSpec) -> bool:
        """See `Pull`."""
        return False

    def measure(self, tensor: TensorSpec, scan: Scan) -> None:
        """See `Pull`."""

    def pull(
        self, region: Region, base: torch.Tensor, merged: torch.Tensor, statistics: None
    ) -> tuple[torch.Tensor, tuple[float, float]]:
        """See `Pull`."""
        factor = self.of(region)
        if self.like_the_reference:
            return relax_like_the_reference(base, merged, factor), (0.0, 0.0)
        return torch.lerp(base, merged, factor.expand_as(base)), (0.0, 0.0)

    def formula(self, tensor: TensorSpec) -> Change | None:
        """See `Pull`; None where the reference's roundings are no float32."""
        if self.like_the_reference or self._is_by_rows(tensor):
            return None
        factors = spread(self.values, self.input_dim, tensor.shape)
        matrices, rows, columns = factors.shape
        if min(rows, columns) > 1 or matrices > 1 == max(rows, columns):
            return None  # channels that run along neither the rows nor the columns alone
        return lambda x, merged: lerp(x.base, merged, x.channel(factors))

    def _is_by_rows(self, tensor: TensorSpec) -> bool:
        """Whether groups of a matrix's rows have factors of their own."""
        return self.values.ndim == 2 and len(tensor.shape) == 2

    def of(self, region: Region) -> torch.Tensor:
        """The factors of a region, shaped to multiply `region.as_stack(...)`: `[matrices or 1, rows or 1, columns or 1]`."""
        if self._is_by_rows(region.tensor):
            first, last = region.row_range
            group = torch.arange(first, last, device=self.values.device) // (region.tensor.rows // len(self.values))
            return self.values[group, slice(*region.column_range)][None]
        stack = spread(self.values, self.input_dim, region.tensor.shape)
        for dim, part in enumerate((region.matrix_range, region.row_range, region.column_range)):
            stack = stack.narrow(dim, part[0], part[1] - part[0]) if stack.shape[dim] > 1 else stack
        return stack


def spread(values: torch.Tensor, input_dim: int, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of input channels as they lie in a tensor seen as a stack of matrices: `[matrices or 1, rows or 1, columns or 1]`.

    Args:
        values: `[in]`, or `[experts, in]` where the tensor's first dimension is the experts.
        input_dim: the first dimension that runs over the input channels; those behind it too, as many as it takes.
        shape: of the tensor.
    """
    sizes, dim, left = [1] * len(shape), input_dim, values.shape[-1]
    while left > 1 and dim < len(shape):
        sizes[dim], left, dim = shape[dim], left // shape[dim], dim + 1
    if values.ndim == 2:
        sizes[0] = len(values)
    placed = values.reshape(sizes)
    if len(shape) < 3:
        return placed.view((1,) * (3 - len(shape)) + placed.shape)
    if any(size > 1 for size in sizes[:-2]):
        placed = placed.expand(*shape[:-2], *sizes[-2:])
    return placed.reshape(-1, *sizes[-2:])


class Relaxation:
    """Pulls merged weights back to the base; a `streaming.stream.Transform`.

    Args:
        pulls: tensor -> how it is pulled back; a tensor that is not in it stays as merged.
        device: where blocks are.

    Attributes:
        tally: sums of |relaxed - merged| over a sample, and its numbers of elements; |D u|^2 and |D|^2 of whole tensors with a direction u.
    """

    def __init__(self, pulls: Mapping[str, Pull], device: torch.device):
        self._pulls = {name: pull.to(device) for name, pull in pulls.items()}
        self.tally = Tally(4, _describe)

    @property
    def relaxed(self) -> int:
        """Number of tensors it changes."""
        return len(self._pulls)

    def applies_to(self, tensor: str) -> bool:
        """See `Transform`."""
        return tensor in self._pulls

    def whole_rows(self, tensor: str) -> bool:
        """See `Transform`."""
        return self._pulls[tensor].whole_rows

    def measures(self, tensor: TensorSpec) -> bool:
        """See `Transform`."""
        return self._pulls[tensor.name].measures(tensor)

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """See `Transform`."""
        return self._pulls[tensor.name].measure(tensor, scan)

    def __call__(
        self, region: Region, base: torch.Tensor, merged: torch.Tensor, statistics: Any = None
    ) -> torch.Tensor:
        """See `Transform`."""
        name = region.tensor.name
        stack, energies = self._pulls[name].pull(region, region.as_stack(base), region.as_stack(merged), statistics)
        relaxed = stack.view(-1)
        if energies[1]:
            self.tally.add(name, -1 - region.start, (0.0, 0.0, *energies))
        for part in sample_of(region):
            within = Region(region.tensor, region.start + part.start, region.start + part.stop)
            self.look(within, merged[part], relaxed[part])
        return relaxed

    def formula(self, tensor: TensorSpec, statistics: Any) -> Change | None:
        """See `Transform`."""
        return self._pulls[tensor.name].formula(tensor)

    def look(self, region: Region, merged: torch.Tensor, changed: torch.Tensor) -> None:
        """See `Transform`."""
        change = (changed - merged).abs().sum()
        self.tally.add(region.tensor.name, region.start, (float(change), region.numel, 0.0, 0.0))

    def mean_changes(self) -> dict[str, float]:
        """Mean |relaxed - merged| per kind of layer, over the blocks that were looked at (one in 16), to 4 digits."""
        sums = {kind: numbers[:2] for kind, numbers in self.tally.by_kind().items()}
        return {kind: float(f"{change / elements:.4g}") for kind, (change, elements) in sums.items() if elements}

    def energies(self) -> dict[str, tuple[float, float]]:
        """|D u|^2 and |D|^2 of each tensor that has a direction u and a task vector."""
        return {name: (numbers[2], numbers[3]) for name, numbers in self.tally.by_tensor().items() if numbers[3]}

    def along_mean(self) -> dict[str, float]:
        """|D u|^2 / |D|^2 per kind of layer, to 4 digits: the share of the task vectors that lies along u."""
        sums = {kind: numbers[2:] for kind, numbers in self.tally.by_kind().items()}
        return {kind: float(f"{along / total:.4g}") for kind, (along, total) in sums.items() if total}


def _describe(sums: Any) -> dict[str, float]:
    """What a tensor's sums mean, for logs."""
    change, elements, along, total = sums
    changed = {"relaxed_mean_change": change / elements} if elements else {}
    return changed | ({"along_mean": along / total} if total else {})


def make_pulls(activations: Activations, selection: Selection, how: Relaxing, omega: Omega) -> dict[str, Pull]:
    """How every tensor that has statistics, and whose omega is below 1, is pulled back; norms by channel, whatever is protected.

    Args:
        activations: of the base.
        selection: what the base offers to be relaxed.
        how: what is protected, and the controls.
        omega: of all tensors.
    """
    pulls: dict[str, Pull] = {}
    dims = {**selection.input_dims, **activations.input_dims}
    for name in selection.targets:
        own = omega.of(name)
        if name not in activations.statistics or own == 1.0:
            continue
        if how.protect == "mean" and not selection.targets[name].is_vector:
            mean = activations.statistics[name].mean
            assert mean is not None  # see `aim.transforms.check_activations`
            u = other_direction(direction(mean), how.control, seed=how.seed, tensor=name)
            if bool(u.any()) and has_rows(selection.targets[name].shape, dims[name], u):
                pulls[name] = MeanDirection(u, dims[name], own, is_uniform=how.control == "uniform")
            continue
        s = importance_of(activations, name, how.scaling)
        f = factors(drop_top(s) if how.control == "without_top" else s, own)
        f = without_channels(f, "permuted" if how.control == "random" else how.control, seed=how.seed, tensor=name)
        pulls[name] = ChannelFactors(f, dims[name], like_the_reference=how.numerics == "reference")
    return pulls


def has_rows(shape: Sequence[int], input_dim: int, channels: torch.Tensor) -> bool:
    """Whether the input channels run along the rows or the columns of a tensor's matrices, each of which has one input.

    Args:
        channels: `[in]` or `[experts, in]`.
    """
    return input_dim >= len(shape) - 2 and shape[input_dim] == channels.shape[-1] and channels.ndim < len(shape)


def mean_energy_of(statistics: ChannelStatistics) -> float | None:
    """|mean|^2 / E|x|^2, the share of an input's squared length that is the square of its mean: the mean over experts that saw tokens.

    Returns: None where the signed mean was not kept, or no token was seen.
    """
    mean = statistics.mean
    if mean is None:
        return None
    whole = statistics.mean_sq.double().reshape(-1, mean.shape[-1]).sum(dim=-1)
    own = mean.double().reshape(-1, mean.shape[-1]).square().sum(dim=-1)
    seen = whole > 0
    return float((own[seen] / whole[seen]).mean()) if bool(seen.any()) else None


def importance_of(activations: Activations, name: str, scaling: Scaling = "identity") -> torch.Tensor:
    """s of one tensor, `[in]` or `[experts, in]`; zero for an expert that saw no token, which therefore stays as merged."""
    statistics = activations.statistics[name]
    means: Means | None = statistics.after_first if scaling.startswith(AFTER_FIRST) else statistics
    assert means is not None  # see `aim.transforms.check_activations`
    mean_abs = means.mean_abs
    active = mean_abs.amax(dim=-1) > 0
    s = torch.zeros_like(mean_abs)
    s[active] = normalise(mean_abs[active], scaling)
    return s
