"""Sums over the rows of an input, for each of its channels: in torch, and compiled (`aim.kernels`) with the same bits on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streaming.twins import twin

SUMMED_AT_ONCE = 32
"""Rows that are added up in float32, one after the other, before their sum goes to float64."""
ELEMENTS_AT_ONCE = 1 << 18
"""Of an input that are turned to float32 at a time: a scratch of 1 MB stays in a core's cache."""
UNKNOWN = -1
"""Position of a row whose token cannot be told: rows that a router has picked."""


@dataclass
class Sums:
    """Sums over rows, on the device of the input.

    Attributes:
        totals: `[2, 3, in]` float64, of the first rows of each block and of the others: |x|, x² and x.
        peak: `[in]` float32, the largest |x|; peak_at: `[in]` int64, the row of its block that has it, the first of several;
            the position of a token once it is told of one.
        rows: `[2]` int64 on the CPU, how many of each.
    """

    totals: torch.Tensor
    peak: torch.Tensor
    peak_at: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device | None = None) -> Sums:
        """Of no rows."""
        return cls(
            torch.zeros(2, 3, width, dtype=torch.float64, device=device),
            torch.zeros(width, device=device),
            torch.full((width,), UNKNOWN, dtype=torch.int64, device=device),
            torch.zeros(2, dtype=torch.int64),
        )

    @classmethod
    def of(cls, x: torch.Tensor, first: int) -> Sums:
        """Of an input `[blocks, rows, in]`, of which the `first` rows of each block are counted apart."""
        blocks, rows, width = x.shape
        found = cls.zeros(width, x.device)
        add_rows(x, first, found.totals, found.peak, found.peak_at)
        found.rows[0], found.rows[1] = blocks * first, blocks * (rows - first)
        return found

    def clone(self) -> Sums:
        """A copy."""
        return Sums(*(one.clone() for one in vars(self).values()))

    def to(self, device: torch.device) -> None:
        """Move them: what was restored is on the CPU."""
        if self.totals.device != device:
            self.totals, self.peak, self.peak_at = (one.to(device) for one in (self.totals, self.peak, self.peak_at))

    def add(self, other: Sums) -> None:
        """Take in those of more rows."""
        self.totals += other.totals
        self.rows += other.rows
        larger = other.peak > self.peak
        if larger.device.type == "cpu" and not bool(larger.any()):  # asking a GPU would make it wait
            return
        self.peak = torch.where(larger, other.peak, self.peak)
        self.peak_at = torch.where(larger, other.peak_at, self.peak_at)


@twin("aim.kernels")
def add_rows(x: torch.Tensor, first: int, totals: torch.Tensor, peak: torch.Tensor, peak_at: torch.Tensor) -> None:
    """Add the rows of an input `[blocks, rows, in]` to sums of its channels, in place; see `Sums` for the others.

    On a CPU, `SUMMED_AT_ONCE` rows of a block are added up in float32, one after the other, and their sum goes to float64; the
    `first` rows of a block and the others by themselves. A GPU adds in float64, in an order of its own.
    """
    for block in x:
        row = 0
        for total, part in zip(totals, (block[:first], block[first:]), strict=True):
            for piece in part.split(_rows_at_once(x.shape[-1])) if len(part) else ():
                values = _buffer(piece)
                absolute, squared, own = values.unbind(dim=1)
                own.copy_(piece)
                torch.abs(own, out=absolute)
                torch.mul(own, own, out=squared)
                _add_columns(total, values)
                larger = absolute.amax(dim=0) > peak
                if larger.device.type != "cpu" or bool(larger.any()):
                    highest, at = absolute.max(dim=0)
                    peak.copy_(torch.where(larger, highest, peak))
                    peak_at.copy_(torch.where(larger, at + row, peak_at))
                row += len(piece)


def _rows_at_once(width: int) -> int:
    return max(1, ELEMENTS_AT_ONCE // width // SUMMED_AT_ONCE) * SUMMED_AT_ONCE


_scratch: dict[tuple[int, torch.device], torch.Tensor] = {}


def _buffer(piece: torch.Tensor) -> torch.Tensor:
    """Room for three float32 numbers `[rows, 3, width]`, the same for every input of a width: new memory would cost more than the sums."""
    rows, width = piece.shape
    key = (width, piece.device)
    if key not in _scratch or len(_scratch[key]) < rows:
        _scratch[key] = torch.empty(rows, 3, width, device=piece.device)
    return _scratch[key][:rows]


def _add_columns(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add rows `[rows, 3, width]` float32 to `[3, width]` float64."""
    if values.device.type != "cpu":
        total += values.sum(dim=0, dtype=torch.float64)
        return
    whole = len(values) // SUMMED_AT_ONCE * SUMMED_AT_ONCE
    groups = values[:whole].unflatten(0, (whole // SUMMED_AT_ONCE, SUMMED_AT_ONCE)).unbind(dim=1)
    for rows in (groups if whole else (), values[whole:].unsqueeze(1)):  # [groups, 3, width] each
        if len(rows):
            sums = rows[0].clone()
            for row in rows[1:]:
                sums += row
            for one in sums:
                total += one
