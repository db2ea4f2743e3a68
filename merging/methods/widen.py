"""WIDEN: weigh each channel's task vectors by how far its magnitude and its direction moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from merging.methods.contract import Elementwise
from merging.methods.gram import measure_sums
from merging.parameters import parameter
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Element, Formula, Number


@dataclass(frozen=True)
class Widen(Elementwise):
    """Disentangle each matrix into column magnitudes and directions, and weigh the models per column by rank.

        m = column norms of W,  U = W / m;   dm_i = |m_i - m_b|,   dd_i = 1 - cos(U_i, U_b)   per column
        rank within the model (ascending, equal ones by index) / number of columns;  softmax of the ranks over the models;
        `calibration` in its place where a rank exceeds `ratio` times the mean rank
        S_i = mean of the scores of dm and dd;   out = b + sum S_i d_i

    An embedding's channel is a token, so its rows take the place of columns. Vectors are not ranked: the score is the
    softmax over models of |d_i|, and `calibration` where |d_i| > ratio * mean |d_i|.

    Source: arXiv:2408.03092 and its authors' program. Deviations: sums over a column run in float64; a zero column
    gives differences of 0 where the program gives NaN; more than two dimensions are a stack of matrices.
    """

    name: ClassVar[str] = "widen"
    needs_embeddings: ClassVar[bool] = True

    ratio: float = parameter(
        "widen_ratio", "ranks above this multiple of the mean count as important", default=1.0, low=0.0
    )
    calibration: float = parameter("widen_calibration", "score of the important ones", default=1.0, low=0.0)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """Scores of a matrix, `[models, matrices, channels]` float32; of a vector, mean |d_i|, `[models]` float64."""
        if not tensor.numel:
            return torch.empty(0)  # no block will ask for it
        if tensor.is_vector:
            return torch.stack(list(scan(_sum_of_magnitudes))).sum(dim=0) / tensor.numel
        channels = tensor.rows if tensor.is_embedding else tensor.columns
        sums = measure_sums(tensor, scan, _products, "rows" if tensor.is_embedding else "columns")
        return self._scores(*_differences(sums.view(len(sums), tensor.matrices, channels)))

    def _scores(self, magnitudes: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """S from dm and dd, `[models, matrices, channels]` each."""
        return (self._rank_scores(magnitudes) + self._rank_scores(directions)) / 2

    def _rank_scores(self, differences: torch.Tensor) -> torch.Tensor:
        channels = differences.shape[-1]
        order = differences.argsort(dim=-1, stable=True)
        positions = torch.arange(channels, device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(-1, order, positions)
        scores = (ranks.to(torch.float32) / channels).softmax(dim=0)
        # The mean rank is (channels - 1) / 2 exactly; in rounded ranks the middle one could fall on either side of it.
        return scores.masked_fill_(ranks > self.ratio * (channels - 1) / 2, self.calibration)

    def formula(self, tensor: TensorSpec, statistics: torch.Tensor) -> Formula | None:
        """See `Elementwise.formula`; of a vector `combine` knows the scores."""
        if tensor.is_vector:
            return None
        channels = statistics.unsqueeze(
            -1 if tensor.is_embedding else -2
        )  # [models, matrices, rows, columns], one of these 1
        return lambda x: add_weighed(x.base, x.models, list(map(x.channel, channels)))

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        if not block.region.tensor.is_vector:
            return super().combine(block, statistics)
        assert block.base is not None
        return add_weighed(block.base, block.task_vectors, self._vector_scores(block.task_vectors, statistics))

    def _vector_scores(self, task_vectors: list[torch.Tensor], means: torch.Tensor) -> list[torch.Tensor]:
        """Scores of a vector's elements, `[n]` float32 per model."""
        magnitudes = torch.stack(task_vectors).abs_()
        # In float64 and rounded to float32, so that an exp that differs in its last bit between a vector loop and its
        # remainder cannot make the result depend on the block.
        scores = magnitudes.double().softmax(dim=0).float()
        scores.masked_fill_(magnitudes > self.ratio * means.unsqueeze(-1), self.calibration)
        return list(scores)


def _sum_of_magnitudes(block: Block) -> torch.Tensor:
    """Sum of |d_i| per model, `[models]` float64."""
    return torch.stack([values.abs().sum(dtype=torch.float64) for values in block.task_vectors])


def _products(x: Element) -> Sequence[Number]:
    """b^2, then for each model b d_i and d_i^2, in float64."""
    base = x.base.double()
    products = [base * base]
    for vector in x.models:
        wide = vector.double()
        products += [base * wide, wide * wide]
    return products


def add_weighed(base: Number, vectors: Sequence[Number], scores: Sequence[Number]) -> Number:
    """b + sum S_i d_i, from a sum that starts at 0."""
    total = 0.0 + vectors[0] * scores[0]
    for vector, score in zip(vectors[1:], scores[1:], strict=True):
        total = total + vector * score
    return total + base


def _differences(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dm and dd from the sums of `_products`, written so that nothing cancels and no change gives exactly 0.

    With p = |b|^2, q = b.d, r = |d|^2:  |x|^2 = p + 2q + r  and  b.x = p + q, so
    dm = | |x| - |b| | = |2q + r| / (|x| + |b|)   and   dd = 1 - (p + q) / (|b| |x|) = (p r - q^2) / (|b| |x| (|b| |x| + p + q)).
    """
    p, q, r = sums[0], sums[1::2], sums[2::2]
    square = (p + 2 * q + r).clamp_(min=0)
    magnitudes = ((2 * q + r).abs() / (square.sqrt() + p.sqrt())).nan_to_num_(nan=0.0)
    products = (p * square).sqrt()
    same_side = (p * r - q.square()).clamp_(min=0) / (products * (products + p + q))
    directions = torch.where(p + q > 0, same_side, 1 - (p + q) / products)
    return magnitudes, torch.where(products > 0, directions, 0.0)
