"""Take a task vector's answer to the mean input back, block by block: by whole rows in one reading, else after measuring the tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from aim.formula import answers, take_back
from streaming.blocks import GRID_ELEMENTS, Block, Region, Scan, TensorSpec
from streaming.sums import row_sums
from streaming.twins import twin


@dataclass(frozen=True)
class Answers:
    """What a whole tensor's task vector D answers to u.

    Attributes:
        along: D u, `[matrices, out]` float64.
        squares: |D|^2 of each matrix, `[matrices]` float64.
    """

    along: torch.Tensor
    squares: torch.Tensor

    @property
    def energies(self) -> tuple[float, float]:
        """|D u|^2 and |D|^2."""
        return float(self.along.square().sum()), float(self.squares.sum())


@dataclass(frozen=True)
class MeanDirection:
    """Takes the answer D u back to the share omega; a `aim.relaxation.Pull`.

    A region of whole rows with the input channels in them knows the answers of its rows. Where rows lie across the input
    channels (`[in, out]`), or are longer than a region, the tensor is read once before, and so it is for the uniform control.

    Attributes:
        u: `[in]`, or `[experts, in]` for a stack of matrices, float64, of length 1; an expert of zeros stays as merged.
        input_dim: the tensor's dimension that runs over the input channels.
        omega: the share that is kept.
        is_uniform: scale each matrix instead, by as much as taking back makes it shorter.
    """

    u: torch.Tensor
    input_dim: int
    omega: float
    is_uniform: bool = False

    @property
    def whole_rows(self) -> bool:
        """See `Pull`."""
        return True

    def to(self, device: torch.device) -> MeanDirection:
        """See `Pull`."""
        return replace(self, u=self.u.to(device))

    def measures(self, tensor: TensorSpec) -> bool:
        """See `Pull`."""
        return not self._in_rows(tensor) or tensor.columns > GRID_ELEMENTS or self.is_uniform

    def measure(self, tensor: TensorSpec, scan: Scan) -> Answers | None:
        """See `Pull`; None where each region will know its answers."""
        if not self.measures(tensor):
            return None
        out = tensor.rows if self._in_rows(tensor) else tensor.columns
        along = torch.zeros(tensor.matrices, out, dtype=torch.float64)
        squares = torch.zeros(tensor.matrices, dtype=torch.float64)

        def look(block: Block) -> tuple[Region, torch.Tensor, torch.Tensor]:
            assert block.base is not None
            change = block.region.as_stack(block.weights[0] - block.base).double()
            looked = answers(*self._oriented(block.region, change))
            return block.region, looked.cpu(), _squares(change).cpu()

        for region, looked, square in scan(look):
            along[slice(*region.matrix_range), self._outputs(region)] += looked
            squares[slice(*region.matrix_range)] += square
        return Answers(along.to(self.u.device), squares.to(self.u.device))

    def pull(
        self, region: Region, base: torch.Tensor, merged: torch.Tensor, statistics: Answers | None
    ) -> tuple[torch.Tensor, tuple[float, float]]:
        """See `Pull`."""
        turned, u = self._oriented(region, merged)
        if statistics is None:
            pulled, along, squares = take_rows_back(base, merged, u, self.omega)
            return pulled, (float(along.square().sum()), float(squares.sum()))
        energies = statistics.energies if region.start == 0 else (0.0, 0.0)
        if self.is_uniform:
            return torch.lerp(base, merged, self._scale(region, statistics).expand_as(base)), energies
        along = statistics.along[slice(*region.matrix_range), self._outputs(region)]
        pulled = take_back(turned, along, u, self.omega)
        return (pulled if self._in_rows(region.tensor) else pulled.transpose(1, 2).contiguous()), energies

    def formula(self, tensor: TensorSpec) -> None:
        """See `Pull`: an element's change depends on its whole row."""

    def _scale(self, region: Region, whole: Answers) -> torch.Tensor:
        """|D'| / |D| of each matrix of a region, `[matrices, 1, 1]` float32; 1 where D is 0."""
        share = whole.along.square().sum(dim=-1) / torch.where(whole.squares > 0, whole.squares, 1.0)
        scale = (1 - (1 - self.omega**2) * share).clamp(min=0.0).sqrt()
        return scale[slice(*region.matrix_range), None, None].float()

    def _in_rows(self, tensor: TensorSpec) -> bool:
        """Whether a row runs over the input channels."""
        return self.input_dim == len(tensor.shape) - 1

    def _outputs(self, region: Region) -> slice:
        """Which outputs a region has."""
        return slice(*(region.row_range if self._in_rows(region.tensor) else region.column_range))

    def _oriented(self, region: Region, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A region as `[matrices, out, in]`, and u of its matrices and input channels, `[matrices or 1, in]`."""
        u = self.u[slice(*region.matrix_range)] if self.u.ndim == 2 else self.u[None]
        if self._in_rows(region.tensor):
            return stack, u[:, slice(*region.column_range)]
        return stack.transpose(1, 2), u[:, slice(*region.row_range)]


@twin("aim.kernels")
def take_rows_back(
    base: torch.Tensor, merged: torch.Tensor, u: torch.Tensor, omega: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take whole rows' answers back, which are found on the way.

    Args:
        base, merged: `[matrices, out, in]` float32, neither overwritten.
        u: `[matrices or 1, in]` float64.

    Returns: the rows, of the same shape; D u and |D|^2 of each row, `[matrices, out]` float64.
    """
    change = (merged - base).double()  # once, for both sums
    along = answers(change, u)
    return take_back(merged, along, u, omega), along, row_sums(change.square())


def _squares(change: torch.Tensor) -> torch.Tensor:
    """|D|^2 of each matrix of a region, `[matrices]` float64; `change` float64."""
    return change.square().sum(dim=(1, 2))
