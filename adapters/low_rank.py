"""The nearest matrix of low rank to a task vector, as two factors.

    D = fine-tuned - base,   D = U S V^T,   D_r = U_r S_r V_r^T         (no matrix of rank r is nearer: Eckart and Young)
    B = U_r sqrt(S_r),   A = U_r^T D / sqrt(S_r)

The singular vectors of the shorter side come from the eigenvectors of D D^T (or D^T D) in float64, and the other factor from D
itself, so that nothing is divided by a small number and a matrix of exact rank r comes back to float32 rounding. The cost is
that of one product and one eigenproblem of the shorter side; beside D there are three square float64 matrices of that side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting

ROWS_AT_ONCE = 1024
"""Rows that are turned into float64 at a time."""
ROUNDING = 2.0**-23
"""Of float32: twice what rounding a weight to the nearest number moves it by, relative to it."""


@dataclass(frozen=True)
class LoraChoice:
    """What becomes of a fine-tune's changes.

    Attributes:
        rank: directions of a matrix that are kept at most; None for as many as `energy` asks for.
        energy: keep as many as hold this share of the change's sum of squares, in (0, 1]; None for `rank` of them.
        save_whole: ends of the names of modules that are stored whole, as peft's `modules_to_save`; `bias` stands for all
            biases, `all` for everything that is no matrix product.
        dtype: of the factors.
        is_exact: refuse a matrix whose change has so many directions that factors would be no smaller than it.

    Raises: ArgumentError: a number out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    save_whole: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    is_exact: bool = False

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            object.__setattr__(self, "rank", 16)
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"{setting('rank')}: expected a whole number above 0, got {self.rank}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ArgumentError(f"{setting('energy')}: expected a share above 0 and at most 1, got {self.energy}.")

    def as_json(self) -> dict[str, Any]:
        """Everything that decides the adapter beside its inputs."""
        return {
            "rank": self.rank,
            "energy": self.energy,
            "save_whole": sorted(self.save_whole),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def as_text(self) -> str:
        """How many directions a matrix gets, for people."""
        parts = [f"rank {self.rank}" if self.energy is None else f"{100 * self.energy:g} % of the energy"]
        parts += [f"rank {self.rank} at most"] if self.energy is not None and self.rank is not None else []
        return ", ".join(parts)

    def rank_of(self, squares: torch.Tensor, total: float, floor: float) -> int:
        """How many directions are kept, at least one.

        Args:
            squares: `[n]` float64 squared singular values, the largest first.
            total: their sum; the squared norm of the change.
            floor: singular values up to this are rounding, and are not kept.
        """
        count = int((squares > floor**2).sum())
        if self.energy is not None:
            reached = torch.cumsum(squares, 0) >= self.energy * total
            count = min(count, int(reached.int().argmax()) + 1 if bool(reached.any()) else count)
        if self.rank is not None:
            count = min(count, self.rank)
        return max(1, count)


@dataclass(frozen=True)
class Factors:
    """A matrix of low rank, `b @ a`.

    Attributes:
        b: `[rows, r]` float32.
        a: `[r, columns]` float32.
        energy: share of the change's sum of squares that it holds.
    """

    b: torch.Tensor
    a: torch.Tensor
    energy: float

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return self.b.shape[1]


def factorise(change: torch.Tensor, choice: LoraChoice, weight_norm: float) -> Factors:
    """The nearest matrix of the rank that the choice asks for.

    Args:
        change: `[rows, columns]` float32, not zero throughout; on any device.
        choice: how many directions.
        weight_norm: of the fine-tuned weights, the root of their sum of squares: tells how large rounding may be.
    """
    rows, columns = change.shape
    is_wide = rows <= columns
    longer = change.T if is_wide else change  # [long, short]
    values, vectors = torch.linalg.eigh(_gram(longer))
    squares = values.flip(0).clamp_(min=0.0)
    total = float(squares.sum())
    # The largest singular value of noise whose elements are that large.
    floor = ROUNDING * weight_norm / (rows * columns) ** 0.5 * (rows**0.5 + columns**0.5)
    rank = choice.rank_of(squares, total, floor)
    kept = vectors.flip(1)[:, :rank]
    roots = squares[:rank].clamp_(min=torch.finfo(torch.float64).tiny) ** 0.25
    thin = (kept * roots).float().cpu()
    long = torch.cat([(part.double() @ kept / roots).float() for part in longer.split(ROWS_AT_ONCE)]).cpu()
    b, a = (thin, long.T) if is_wide else (long, thin.T)
    return Factors(b.contiguous(), a.contiguous(), float(squares[:rank].sum()) / total)


def _gram(longer: torch.Tensor) -> torch.Tensor:
    """`L^T L` of `[long, short]`, in float64, some rows at a time."""
    gram = torch.zeros(longer.shape[1], longer.shape[1], dtype=torch.float64, device=longer.device)
    for part in longer.split(ROWS_AT_ONCE):
        wide = part.double()
        gram.addmm_(wide.T, wide)
    return gram
