"""Sums over the rows of an input, for each of its channels: in torch, and compiled (`aim.kernels`) with the same bits on a CPU."""

from __future__ import annotations

import torch

from forward.parts import Use
from streaming.twins import twin

SUMMED_AT_ONCE = 32
"""Rows that are added up in float32, one after the other, before their sum goes to float64."""
ELEMENTS_AT_ONCE = 1 << 18
"""Of an input that are turned to float32 at a time: a scratch of 1 MB stays in a core's cache."""
UNKNOWN = -1
"""Position of a row whose token cannot be told: rows that a router has picked."""
KEPT = 8
"""Numbers of a channel: sums of |x|, x² and x over the first rows of blocks, the same over the others, the largest |x|, and where."""
PEAK, PEAK_AT = 6, 7


class Sums:
    """Sums over rows, of one input or of several that weights share.

    Weights that have always had the same inputs have one of these: what one of them sees is added once, and the others note
    that they saw it too.

    Args:
        width: channels.
        device: of the inputs.

    Attributes:
        numbers: `[8, in]` float64, see `KEPT`; the place of the largest is its token's position in its block, the first of several.
        first_rows, other_rows: how many.
        seen: for each use how many inputs it saw.
        inputs: how many were added.
    """

    def __init__(self, width: int, device: torch.device | None = None):
        self.numbers = torch.zeros(KEPT, width, dtype=torch.float64, device=device)
        self.numbers[PEAK_AT] = UNKNOWN
        self._before = self.numbers.clone()
        self.first_rows = self.other_rows = 0
        self._rows_before = (0, 0)
        self.seen: dict[Use, int] = {}
        self.inputs = 0

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.numbers.shape[1]

    @property
    def totals(self) -> torch.Tensor:
        """`[2, 3, in]` float64, of the first rows and of the others: |x|, x² and x. A view."""
        return self.numbers[:PEAK].view(2, 3, -1)

    def add(self, x: torch.Tensor, first: int) -> None:
        """Take in an input `[blocks, rows, in]`, of whose blocks each token has `first` rows; 0 where that cannot be told."""
        if self.numbers.device != x.device:  # what was restored is on the CPU
            self.numbers, self._before = self.numbers.to(x.device), self._before.to(x.device)
        add_rows(x, first, self.numbers, self._before)
        self.numbers, self._before = self._before, self.numbers
        blocks, rows, _ = x.shape
        self._rows_before = (self.first_rows, self.other_rows)
        self.first_rows += blocks * first
        self.other_rows += blocks * (rows - first)
        self.inputs += 1

    def lagging(self) -> list[Use]:
        """Uses that have not seen the last input."""
        return [use for use, count in self.seen.items() if count < self.inputs]

    def part_with(self, use: Use) -> Sums:
        """Sums of its own for a use, of the inputs that it saw: all, or all but the last."""
        is_behind = self.seen.pop(use) < self.inputs
        made = Sums.of(
            (self._before if is_behind else self.numbers).clone(),
            *(self._rows_before if is_behind else (self.first_rows, self.other_rows)),
        )
        made.seen[use] = made.inputs
        return made

    @classmethod
    def of(cls, numbers: torch.Tensor, first_rows: int, other_rows: int) -> Sums:
        """Those with these numbers."""
        made = cls(numbers.shape[1], numbers.device)
        made.numbers, made.first_rows, made.other_rows = numbers, first_rows, other_rows
        made.inputs = 1  # whatever they were
        return made

    def plus(self, other: Sums) -> Sums:
        """Those of the inputs of both, of which the other's came later."""
        numbers = self.numbers + other.numbers.to(self.numbers.device)
        theirs = other.numbers.to(self.numbers.device)
        larger = theirs[PEAK] > self.numbers[PEAK]
        numbers[PEAK:] = torch.where(larger, theirs[PEAK:], self.numbers[PEAK:])
        return Sums.of(numbers, self.first_rows + other.first_rows, self.other_rows + other.other_rows)

    def is_equal(self, other: Sums) -> bool:
        """Whether all numbers are those of others."""
        rows = (self.first_rows, self.other_rows) == (other.first_rows, other.other_rows)
        return rows and torch.equal(self.numbers, other.numbers)


@twin("aim.kernels")
def add_rows(x: torch.Tensor, first: int, before: torch.Tensor, after: torch.Tensor) -> None:
    """Add the rows of an input `[blocks, rows, in]` to the numbers of `Sums`, `[8, in]` float64: `after` becomes `before` with them.

    On a CPU, `SUMMED_AT_ONCE` rows of a block are added up in float32, one after the other, and their sum goes to float64; the
    `first` rows of a block and the others by themselves. A GPU adds a whole input in float32, in an order of its own, and inputs in float64.
    """
    after.copy_(before)
    if x.device.type != "cpu":
        add_on_gpu(x, first, after)
        return
    for block in x:
        row = 0
        for total, part in zip(after[:PEAK].view(2, 3, -1), (block[:first], block[first:]), strict=True):
            for piece in part.split(_rows_at_once(x.shape[-1])) if len(part) else ():
                values = _buffer(piece)
                absolute, squared, own = values.unbind(dim=1)
                own.copy_(piece)
                torch.abs(own, out=absolute)
                torch.mul(own, own, out=squared)
                _add_columns(total, values)
                larger = absolute.amax(dim=0) > after[PEAK]
                if bool(larger.any()):
                    highest, at = absolute.max(dim=0)
                    place = (at + row).div(first, rounding_mode="floor") if first else torch.full_like(at, UNKNOWN)
                    after[PEAK] = torch.where(larger, highest.double(), after[PEAK])
                    after[PEAK_AT] = torch.where(larger, place.double(), after[PEAK_AT])
                row += len(piece)


def add_on_gpu(x: torch.Tensor, first: int, numbers: torch.Tensor) -> None:
    """Add rows `[blocks, rows, in]` to `[8, in]`: few kernels, none of which needs memory for more than a row, and no waiting."""
    if not x.numel():
        return
    totals = numbers[:PEAK].view(2, 3, -1)
    for total, part in zip(totals, (x[:, :first], x[:, first:]), strict=True):
        if part.numel():
            total += _column_sums(part)
    (highest, at_highest), (lowest, at_lowest) = x.max(dim=1), x.min(dim=1)  # [blocks, in]; the first row of several
    is_low = (-lowest > highest) | ((-lowest == highest) & (at_lowest < at_highest))
    highest, block = torch.where(is_low, -lowest, highest).max(dim=0)
    at = torch.where(is_low, at_lowest, at_highest).gather(0, block.unsqueeze(0)).squeeze(0)
    place = at.div(first, rounding_mode="floor") if first else torch.full_like(at, UNKNOWN)
    larger = highest > numbers[PEAK]
    numbers[PEAK] = torch.where(larger, highest.double(), numbers[PEAK])
    numbers[PEAK_AT] = torch.where(larger, place.double(), numbers[PEAK_AT])


def _column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of |x|, x² and x over `[blocks, rows]`: `[3, in]` float64. The norms read an input as it is, without a copy."""
    # In float32, as a GPU adds pairs of sums of pairs, and turns only 16-bit numbers to float32 as it reads them.
    dims, dtype = (0, 1), torch.float32
    absolute = torch.linalg.vector_norm(x, 1, dim=dims, dtype=dtype)
    length = torch.linalg.vector_norm(x, 2, dim=dims, dtype=dtype)
    return torch.stack([absolute.double(), length.double().square(), x.sum(dim=dims, dtype=dtype).double()])


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
    whole = len(values) // SUMMED_AT_ONCE * SUMMED_AT_ONCE
    if whole:
        _add_groups(total, values[:whole].unflatten(0, (whole // SUMMED_AT_ONCE, SUMMED_AT_ONCE)))
    if whole < len(values):
        _add_groups(total, values[whole:].unsqueeze(0))


def _add_groups(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add groups of rows, `[groups, rows, 3, width]`."""
    first, *others = values.unbind(dim=1)
    sums = first.clone()
    for row in others:
        sums += row
    for one in sums:
        total += one
