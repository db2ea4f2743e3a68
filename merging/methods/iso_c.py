"""Iso-C: the sum of the task vectors, with all singular values of a matrix made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from merging.methods.whole_matrix import WholeMatrix
from merging.parameters import parameter, shared

LEAST_SHARE = 1e-12
"""Of the largest eigenvalue of the Gram: smaller ones are rounding (singular values below 1e-6 of the largest)."""


@dataclass(frozen=True)
class IsoC(WholeMatrix):
    """Give all directions of the summed task vectors of a matrix the same strength.

        D = sum d_i = U S V^T
        out = b + lambda * mean(S) U V^T        (for matrices; b + rest_lambda * sum d_i for vectors, embeddings, the head)

    From the eigenvectors of the Gram of D along its shorter side, in float64: U V^T = D (D^T D)^-1/2 or (D D^T)^-1/2 D.

    Source: arXiv:2502.04959. Deviations: rest_lambda; singular values below 1e-6 of the largest have no direction in float32
    differences, so they stay 0 (they count in the mean).
    """

    name: ClassVar[str] = "iso_c"

    lambda_: float = shared("lambda")
    rest_lambda: float = parameter(
        "rest_lambda",
        "what the sum of the task vectors is multiplied with in vectors, embeddings and the head",
        default=0.7,
    )

    def gather(self, task_vectors: torch.Tensor) -> torch.Tensor:
        """See `WholeMatrix.gather`: their sum, float64."""
        return task_vectors.sum(dim=0, keepdim=True, dtype=torch.float64)

    def merge_matrices(self, gathered: torch.Tensor) -> torch.Tensor:
        """See `WholeMatrix.merge_matrices`."""
        total = gathered[0]
        return equal_strengths(total) if total.shape[-1] <= total.shape[-2] else equal_strengths(total.mT).mT


def equal_strengths(total: torch.Tensor) -> torch.Tensor:
    """mean(S) U V^T of matrices U S V^T, `[matrices, rows, columns]` float64 with no more columns than rows."""
    squares, vectors = torch.linalg.eigh(total.mT @ total)
    squares.clamp_(min=0.0)
    inverse = torch.where(squares > LEAST_SHARE * squares[..., -1:], squares.rsqrt(), 0.0)
    inverse *= squares.sqrt().mean(dim=-1, keepdim=True)
    found: torch.Tensor = total @ (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    return found
