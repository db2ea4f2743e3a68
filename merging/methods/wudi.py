"""WUDI: change the sum of the task vectors until each model's own directions are answered as that model answers them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting
from merging.methods.whole_matrix import WholeMatrix
from merging.parameters import parameter, shared

LEAST_EIGENVALUE = 1e-8
"""Of C in the spectral solver, absolute: the task vectors have length 1 there."""


@dataclass(frozen=True)
class Wudi(WholeMatrix):
    """Bring the sum of the task vectors of a matrix nearer to the D that minimises sum_i |(D - d_i) d_i^T|^2 / |d_i|^2.

        C  = sum d_i^T d_i / |d_i|^2,   B = sum d_i d_i^T d_i / |d_i|^2,   s = sum d_i        (d_i `[out, in]`, |d_i| of Frobenius)
        D  = s + (B - s C) phi(C),      out = b + lambda * D
        ridge:     phi(C) = (C + mu I)^-1,   mu = ridge * tr C / in
        spectral:  phi(C) = V diag(p) V^T with the eigenvectors of C;   p = (1 - exp(-t l)) / l,   l = max(eigenvalue, 1e-8),
                   for the ceil(rank_share * in) largest, 0 for the rest
        out = b + rest_lambda * sum d_i        (vectors, embeddings, the head)

    The gradient of that sum is 2 (D C - B): ridge stops at mu, spectral is gradient descent from s for a time t. Where N out < in, the same from
    the Gram of the stacked task vectors: with A the d_i / |d_i| below each other, C = A^T A and A phi(A^T A) = phi(A A^T) A.

    Source: WUDI, arXiv:2503.08099 (300 steps of Adam); `spectral` is SWUDI, arXiv:2606.07289; `ridge` is our own and no published method.
    Deviations: rest_lambda.
    """

    name: ClassVar[str] = "wudi"
    min_models: ClassVar[int] = 2

    lambda_: float = shared("lambda")
    solver: Literal["ridge", "spectral"] = parameter(
        "solver",
        "ridge, which is our own, or spectral, the published SWUDI",
        default="ridge",
        kind="word",
        words=("ridge", "spectral"),
    )
    ridge: float = parameter(
        "ridge",
        "of the solver ridge: where to stop, in units of the mean eigenvalue; the larger, the nearer to the sum",
        default=1.0,
        low=1e-6,
    )
    t: float = parameter("t", "of the solver spectral: how long it descends, 0 for the sum", default=300.0, low=0.0)
    rank_share: float = parameter(
        "rank_share",
        "of the solver spectral: share of the directions that may change, those of the largest eigenvalues",
        default=0.85,
        low=0.0,
        high=1.0,
    )
    rest_lambda: float = parameter(
        "rest_lambda",
        "what the sum of the task vectors is multiplied with in vectors, embeddings and the head",
        default=0.7,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = ("t", "rank_share") if self.solver == "ridge" else ("ridge",)
        for key in unused:
            if getattr(self, key) != self.parameters()[key][0].default:
                raise ArgumentError(f"{setting(key)}: {setting('solver', self.solver)} does not use it. Leave it out.")

    def gather(self, task_vectors: torch.Tensor) -> torch.Tensor:
        """See `WholeMatrix.gather`: all of them."""
        return task_vectors

    def merge_matrices(self, gathered: torch.Tensor) -> torch.Tensor:
        """See `WholeMatrix.merge_matrices`."""
        models, matrices, rows, columns = gathered.shape
        if models * rows < columns:
            return self._by_rows(gathered)
        total, wanted = (gathered.new_zeros(matrices, rows, columns, dtype=torch.float64) for _ in range(2))
        gram = gathered.new_zeros(matrices, columns, columns, dtype=torch.float64)
        for task_vector in gathered:  # one at a time in float64
            unit, length = _unit(task_vector)
            own = unit.mT @ unit
            gram += own
            total += task_vector
            wanted += length * (unit @ own)
        return total + self._solve(gram, wanted - total @ gram, columns)

    def _by_rows(self, gathered: torch.Tensor) -> torch.Tensor:
        """The same where the stacked task vectors have fewer rows than columns."""
        columns = gathered.shape[-1]
        units, lengths = zip(*(_unit(task_vector) for task_vector in gathered), strict=True)
        total = gathered.sum(dim=0, dtype=torch.float64)
        stacked = torch.cat(units, dim=-2)
        wanted = torch.cat([length * (unit @ unit.mT) for unit, length in zip(units, lengths, strict=True)], dim=-1)
        return total + self._solve(stacked @ stacked.mT, wanted - total @ stacked.mT, columns) @ stacked

    def _solve(self, gram: torch.Tensor, residual: torch.Tensor, columns: int) -> torch.Tensor:
        """residual phi(gram).

        Args:
            gram: C or A A^T, `[matrices, n, n]` float64.
            residual: `[matrices, rows, n]`.
            columns: of the matrices, which C has.
        """
        if self.solver == "spectral":
            values, vectors = torch.linalg.eigh(gram)
            values.clamp_(min=LEAST_EIGENVALUE)
            factors = -torch.expm1(-self.t * values) / values
            # Ascending: the largest are the last.
            factors[..., : max(0, values.shape[-1] - math.ceil(self.rank_share * columns))] = 0.0
            found: torch.Tensor = residual @ (vectors * factors.unsqueeze(-2)) @ vectors.mT
            return found
        mu = self.ridge * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / columns
        # Where no model changes anything, there is nothing to solve.
        gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(mu > 0, mu, 1.0).unsqueeze(-1))
        return torch.cholesky_solve(residual.mT, torch.linalg.cholesky(gram)).mT


def _unit(task_vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d / |d| of matrices `[matrices, rows, columns]` in float64, 0 where d is, and |d|, `[matrices, 1, 1]`."""
    values = task_vector.double()
    length = torch.linalg.vector_norm(values, dim=(-2, -1), keepdim=True)
    return values.div_(torch.where(length > 0, length, 1.0)), length
