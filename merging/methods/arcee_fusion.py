"""Arcee Fusion: take a model's weights where they matter most, by the size of the change and by how it moves its row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from merging.methods.contract import Method
from merging.methods.trim import measure_largest
from streaming.blocks import Block, Region, Scan, TensorSpec

SMALL = 1e-8
FEW = 8


class Importance(NamedTuple):
    """What `measure` finds.

    Attributes:
        divergences: KL of each row, `[rows of all matrices]` float32.
        threshold: the importance from which on the model's weights are taken.
    """

    divergences: torch.Tensor
    threshold: float


@dataclass(frozen=True)
class ArceeFusion(Method):
    """Take the model's element where its importance is an outlier of the tensor, else the base's.

        p = softmax(x) + 1e-8,   q = softmax(b) + 1e-8        (over a row; a vector is one row)
        I = |x - b| * sum p ln(p / q)        (the sum over the row)
        out = x where I >= median(I) + 1.5 (Q3(I) - Q1(I)), else b        (quartiles of the tensor, interpolated linearly)

    Source: mergekit's `arcee_fusion`. Deviations: softmax and its sums in float64, written as sum p (r - ln(1 + r)) with
    r = q / p - 1, which is the same number without its rounding noise; float32 elsewhere; exact quartiles of any tensor.
    """

    name: ClassVar[str] = "arcee_fusion"
    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    max_models: ClassVar[int | None] = 1

    def measure(self, tensor: TensorSpec, scan: Scan) -> Importance:
        """See `Importance`; four readings and a sample."""
        if not tensor.numel:
            return Importance(torch.empty(0), 0.0)  # no block will ask for it
        divergences = _divergences(tensor, scan)
        q1, median, q3 = _quantiles(tensor, scan, divergences, (0.25, 0.5, 0.75))
        threshold = median + 1.5 * (q3 - q1)
        # The least float32 that is not below it: elements are float32.
        rounded = np.float32(threshold)
        return Importance(
            divergences, float(rounded if rounded >= threshold else np.nextafter(rounded, np.float32(np.inf)))
        )

    def combine(self, block: Block, statistics: Importance) -> torch.Tensor:
        """See `Method.combine`."""
        assert block.base is not None
        kept = importance(block, statistics.divergences) >= statistics.threshold
        return torch.where(kept, block.weights[0], block.base)


def importance(block: Block, divergences: torch.Tensor) -> torch.Tensor:
    """|x - b| times the divergence of its row: `[n]` float32."""
    assert block.base is not None
    sizes = (block.weights[0] - block.base).abs_()
    return sizes.mul_(_of_rows(divergences, block.region).to(sizes.device))


def _divergences(tensor: TensorSpec, scan: Scan) -> torch.Tensor:
    """KL of every row, from two readings: the sums of the softmaxes, then what p and q differ by."""
    # Log of the sum of exp, of model and base: pieces of a row are joined as they come.
    logs = torch.full((2, tensor.numel // tensor.columns), -math.inf, dtype=torch.float64)

    def sums(block: Block) -> tuple[Region, torch.Tensor]:
        return block.region, torch.stack([values.logsumexp(dim=-1) for values in _both(block)]).cpu()

    for region, partial in scan(sums):
        rows = _rows(region)
        logs[:, rows] = torch.logaddexp(logs[:, rows], partial)

    def terms(block: Block) -> tuple[Region, torch.Tensor]:
        p, q = (
            (values - log.to(values.device).unsqueeze(-1)).exp_().add_(SMALL)
            for values, log in zip(_both(block), logs[:, _rows(block.region)], strict=True)
        )
        r = (q - p).div_(p)
        return block.region, (r - r.log1p()).mul_(p).sum(dim=-1).cpu()

    total = torch.zeros(logs.shape[1], dtype=torch.float64)
    for region, partial in scan(terms):
        total[_rows(region)] += partial
    return total.clamp_(min=0).float()


def _quantiles(tensor: TensorSpec, scan: Scan, divergences: torch.Tensor, shares: tuple[float, ...]) -> list[float]:
    """Quantiles of the importance, between two elements linearly."""
    n = tensor.numel
    positions = [share * (n - 1) for share in shares]
    ranks = [rank for position in positions for rank in (math.floor(position), math.ceil(position))]
    if n <= FEW:
        importances = torch.cat(list(scan(lambda block: importance(block, divergences).cpu()))).sort().values
        values = [float(importances[rank]) for rank in ranks]
    else:

        def of_importance(measure: Any, regions: Any = None) -> Any:
            def look(block: Block) -> Any:
                return measure(replace(block, task_vectors=[importance(block, divergences)] * len(ranks)))

            return scan(look, regions)

        trims = measure_largest(tensor, of_importance, [n - rank for rank in ranks])
        values = np.array([trim.threshold for trim in trims], dtype=np.int32).view(np.float32).astype(float).tolist()
    return [
        low + (position - math.floor(position)) * (high - low)
        for position, low, high in zip(positions, values[::2], values[1::2], strict=True)
    ]


def _of_rows(values: torch.Tensor, region: Region) -> torch.Tensor:
    """The number of its row for each element of a region, which may begin and end within rows: `[n]`."""
    columns = region.tensor.columns
    rows = torch.arange(region.start // columns, (region.stop - 1) // columns + 1)
    ends = ((rows + 1) * columns).clamp_(max=region.stop)
    return values[rows].repeat_interleave(ends - (rows * columns).clamp_(min=region.start))


def _rows(region: Region) -> slice:
    """Which rows, counted through all matrices, a region of the grid holds: several whole ones, or a piece of one."""
    first = region.start // region.tensor.columns
    return slice(first, first + max(1, region.numel // region.tensor.columns))


def _both(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Model and base of a region of the grid, `[rows, columns]` float64."""
    assert block.base is not None
    columns = min(block.region.tensor.columns, block.region.numel)
    return block.weights[0].view(-1, columns).double(), block.base.view(-1, columns).double()
