"""DELLA: drop changes at random, small ones of a row more often, then merge with elected signs or linearly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from checkpoints.errors import ArgumentError
from merging.methods.sparse import SparseTaskVectors
from merging.parameters import parameter, shared
from merging.randomness import keys
from streaming.blocks import GRID_ELEMENTS, Block, Scan, TensorSpec
from streaming.elements import TOP_BIT, hash_range
from streaming.twins import twin

Keys = Callable[[int], tuple[int, int]]


class Kept(NamedTuple):
    """Which changes of a tensor are kept: for each model `[rows, columns / 8, rounded up]` uint8, a bit for each element, the lowest first."""

    bits: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Della(SparseTaskVectors):
    """Drop by rank, restore the l1 norm, elect signs, and average what agrees.

        r = rank of |d_i| in its row, ascending, 0 to c - 1, equal ones share their mean        (c: columns; a vector is one row)
        d_i <- d_i * m_i,   m_i ~ Bernoulli(density_i - epsilon_i + 2 epsilon_i r / (c - 1))
        d_i <- d_i * |d_i before|_1 / |d_i|_1        (not where `rescale` is false)
        D_i = w_i d_i;   s = sign(sum D_i), 0 counts as +
        out = b + lambda * sum of D_i with sign s / sum of their w_i        (not divided where `normalize` is false)

    A row longer than a block is sorted once, in memory. Masks are of `merging/randomness.py`, with a threshold for each rank.

    Source: arXiv:2406.11617; mergekit's `della`. Deviations: float32 inside; masks from `merging/randomness.py` instead of a
    global generator; equal magnitudes share a rank (mergekit's order there is unspecified); a row of one element is kept with probability density (mergekit: not a number); density 0 gives a
    zero task vector (mergekit refuses it).
    """

    name: ClassVar[str] = "della"
    elects: ClassVar[bool] = True
    restores_norm: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    epsilons: tuple[float, ...] = parameter(
        "epsilon",
        "the probability of keeping a change grows from density - epsilon for the smallest of a row to density + epsilon for the largest; one number or one for each model",
        default=0.15,
        per_model=True,
        low=0.0,
        high=0.5,
    )
    normalize: bool = shared("normalize", default=True)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for density, epsilon in zip(self.densities, self.epsilons, strict=True):
            if 0.0 < density < 1.0 and not 0.0 < density - epsilon <= density + epsilon < 1.0:
                raise ArgumentError(
                    f"epsilon: expected density - epsilon above 0 and density + epsilon below 1, got density {density:g} "
                    f"and epsilon {epsilon:g}. Choose a smaller epsilon, or density 1 to keep everything."
                )

    def select(self, tensor: TensorSpec, scan: Scan) -> list[torch.Tensor] | None:
        """Where a row is longer than a block can be, the sorted magnitudes of each row: `[rows, columns]` per model."""
        if tensor.columns <= GRID_ELEMENTS or not tensor.numel:
            return None
        pieces = list(scan(lambda block: torch.stack(block.task_vectors).abs_().cpu()))
        return [values.view(-1, tensor.columns).sort(dim=-1).values for values in torch.cat(pieces, dim=-1)]

    def thinning(
        self, tensor: TensorSpec, selection: list[torch.Tensor] | None
    ) -> tuple[Callable[[Block], Sequence[torch.Tensor]], Any]:
        """See `SparseTaskVectors.thinning`: ranks its rows once."""
        if selection is not None:
            return super().thinning(tensor, selection)
        rows, width = tensor.numel // tensor.columns, -(-tensor.columns // 8)
        drops = [0.0 < density < 1.0 for density in self.densities]
        kept = Kept(tuple(torch.empty(rows if drop else 0, width, dtype=torch.uint8) for drop in drops))

        def thin(block: Block) -> Sequence[torch.Tensor]:
            first = block.region.start // tensor.columns
            for bits, found in zip(kept.bits, self._drop(block, selection), strict=True):
                if found is not None:
                    bits[first : first + len(found)] = found
            return block.task_vectors

        return thin, kept

    def thinned(self, block: Block, selection: list[torch.Tensor] | Kept | None) -> list[torch.Tensor]:
        """See `SparseTaskVectors.thinned`; in place."""
        if not isinstance(selection, Kept):
            self._drop(block, selection)
            return block.task_vectors
        columns = block.region.tensor.columns
        first, stop = block.region.start // columns, block.region.stop // columns
        for values, density, bits in zip(block.task_vectors, self.densities, selection.bits, strict=True):
            if density == 0.0:
                values.zero_()
            elif density < 1.0:
                keep_marked_(values, columns, bits[first:stop])
        return block.task_vectors

    def _drop(self, block: Block, sorted_rows: list[torch.Tensor] | None) -> list[torch.Tensor | None]:
        """Drop by rank, in place.

        Args:
            sorted_rows: from `select`.

        Returns: of each model which elements are kept, as `drop_by_rank_` says it; None where all or none are, or rows are long.
        """
        region = block.region
        columns = region.tensor.columns
        kept: list[torch.Tensor | None] = [None] * len(block.task_vectors)
        for model, (values, density) in enumerate(zip(block.task_vectors, self.densities, strict=True)):
            if density == 0.0:
                values.zero_()
            elif density < 1.0:
                limits = thresholds(columns, density, self.epsilons[model])
                of = functools.partial(keys, self.seed, region.tensor.name, model)
                if sorted_rows is None:
                    kept[model] = drop_by_rank_(values, columns, limits, of, region.start)
                else:
                    magnitudes = values.abs().view(-1, min(columns, region.numel))  # whole rows, or a piece of one
                    first = region.start // columns
                    rows = sorted_rows[model][first : first + len(magnitudes)].to(values.device)
                    ranks = row_ranks(magnitudes, rows).view(-1)
                    values.mul_(_are_kept(limits.to(values.device)[ranks], of, region.start))
        return kept


@dataclass(frozen=True)
class DellaLinear(Della):
    """Drop by rank and restore the l1 norm as `Della`, and add up.

        out = b + lambda * sum w_i d_i        (divided by sum w_i where `normalize` is true)

    Source: arXiv:2406.11617; mergekit's `della_linear`. Deviations as in `Della`.
    """

    name: ClassVar[str] = "della_linear"
    elects: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    normalize: bool = shared("normalize")


@twin("merging.kernels")
def drop_by_rank_(values: torch.Tensor, columns: int, limits: torch.Tensor, keys_of: Keys, start: int) -> torch.Tensor:
    """Set each element of whole rows to zero, in place, unless its random number is below the limit of its rank.

    Args:
        values: `[n]` float32, whole rows of so many columns.
        limits: from `thresholds`, on the CPU.
        keys_of: see `streaming.elements.Element.draw`.
        start: the first element's index in its tensor.

    Returns: `[rows, columns / 8, rounded up]` uint8, a bit for each element, the lowest first: 1 where it is kept and not zero.
    """
    magnitudes = values.abs().view(-1, columns)
    ranks = row_ranks(magnitudes, magnitudes.sort(dim=-1).values).view(-1)
    kept = _are_kept(limits.to(values.device)[ranks], keys_of, start) & (values != 0)
    values.mul_(kept)
    return torch.from_numpy(np.packbits(kept.view(-1, columns).cpu().numpy(), axis=1, bitorder="little"))


@twin("merging.kernels")
def keep_marked_(values: torch.Tensor, columns: int, kept: torch.Tensor) -> None:
    """Do again what `drop_by_rank_` did, by what it gave: `values` are `[n]` float32, whole rows of so many columns."""
    marks = np.unpackbits(kept.numpy(), axis=1, count=columns, bitorder="little")
    values.mul_(torch.from_numpy(marks).view(-1).to(values.device))


def _are_kept(limits: torch.Tensor, keys_of: Keys, start: int) -> torch.Tensor:
    """Of each element whether its random number is below its limit: `[n]` bool."""
    return hash_range(start, start + len(limits), keys_of, limits.device) < limits


def row_ranks(magnitudes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Twice the rank of each magnitude in its row, 0 for the smallest; equal ones share the mean of their ranks.

    Args:
        magnitudes: `[rows, n]` float32, whole rows or pieces of them.
        rows: `[rows, columns]`, the whole rows, sorted.

    Returns: `[rows, n]` int64, 0 to 2 (columns - 1), that of a NaN, which stays one, the last.
    """
    below = torch.searchsorted(rows, magnitudes)
    return torch.searchsorted(rows, magnitudes, right=True).add_(below).sub_(1).clamp_(max=2 * rows.shape[-1] - 2)


@functools.lru_cache(maxsize=64)
def thresholds(columns: int, density: float, epsilon: float) -> torch.Tensor:
    """What the random number (`streaming.elements.hash_of`) of an element that is kept is below: by twice the rank, `[2 columns - 1]` int64."""
    ranks = torch.arange(2 * columns - 1, dtype=torch.float64).div_(2)
    kept = probabilities(ranks, columns, density, epsilon)
    return (kept * (1 << 32)).round_().to(torch.int64).add_(TOP_BIT)


def probabilities(ranks: torch.Tensor, columns: int, density: float, epsilon: float) -> torch.Tensor:
    """With what probability an element of each rank is kept: `[n]` float64, in place of the ranks."""
    place = ranks.div_(columns - 1) if columns > 1 else ranks.fill_(0.5)
    return place.mul_(2 * epsilon).add_(density - epsilon)
