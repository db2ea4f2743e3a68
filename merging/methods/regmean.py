"""RegMean on task vectors: the change that answers each model's own inputs most like that model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from checkpoints.errors import ArgumentError, InputError
from checkpoints.settings import setting
from merging.methods.contract import Method
from merging.methods.linear import weighted_sum
from merging.methods.task_arithmetic import add_to_base
from merging.parameters import parameter, shared
from streaming.blocks import GRID_ELEMENTS, Block, Region, Scan, TensorSpec


@dataclass(frozen=True)
class InputMoments:
    """Second moments of one model's input of one weight, over its own text.

    Attributes:
        rest: mean of x x^T over all tokens but the first of each document, `[in, in]` float64, or `[experts, in, in]`; or of x^2, `[in]` or
            `[experts, in]`; zeros for an expert that saw none.
        first: the same over the first tokens alone; zeros where rows do not tell which they are.
    """

    rest: torch.Tensor
    first: torch.Tensor

    def diagonal(self, stacked: bool) -> InputMoments:
        """Those of x^2; `stacked`: of several experts."""
        if self.rest.ndim == (2 if stacked else 1):
            return self
        return InputMoments(self.rest.diagonal(dim1=-2, dim2=-1), self.first.diagonal(dim1=-2, dim2=-1))


@dataclass(frozen=True)
class RegMean(Method):
    """Add the D that minimises sum_i |X_i (D - d_i)^T|^2, X_i being the inputs of the weight in model i on its own text.

        G_i = mean of x x^T over tokens after the first of a document + first_token_weight * the same over first tokens
        G_i <- gram_scale G_i + (1 - gram_scale) diag G_i        (moments diagonal: diag G_i, and nothing else is taken)
        D   = (sum d_i G_i + r m mean d) (sum G_i + base_weight G_b + r m I)^-1,   m = mean diagonal of sum G_i,   r = ridge
        out = b + lambda * D

    G_b being the base's moments on the texts of all models, for matrices of the layers, d_i `[out, in]`; with lambda 1 and ridge 0 it is RegMean. An expert that no model's text used gets the mean of d_i
    for D. With inputs merged, X_i are those of the weight in layer l of model i behind the merge's first l layers: RegMean++. Everything else (norms, embeddings, the head) is task arithmetic, b + rest_lambda * sum d_i. All of it in float64.

    Source: arXiv:2212.09849, equation 2; inputs merged: arXiv:2508.03121. Deviations: on task vectors, which lambda may scale; a ridge towards the mean; the first token
    of a document, which takes massive activations on itself, has a weight of its own; not the weights' mean but a sum for all
    else; gram_scale 1 (the paper's 0.9 is for models without a base in common).
    """

    name: ClassVar[str] = "regmean"
    needs_data: ClassVar[bool] = True
    min_models: ClassVar[int] = 2
    prepared_with: ClassVar[tuple[str, ...]] = ("first_token_weight", "inputs", "data_tokens")
    prepared_for: ClassVar[Mapping[str, Any]] = {"moments": "full", "base_weight": 1.0}

    lambda_: float = shared("lambda")
    ridge: float = parameter(
        "ridge", "added to the moments' diagonal, in units of its mean; pulls to the mean", default=1e-4, low=0.0
    )
    first_token_weight: float = parameter(
        "first_token_weight",
        "weight of the mean over documents' first tokens beside that over all others",
        default=0.01,
        low=0.0,
    )
    moments: Literal["full", "diagonal"] = parameter(
        "moments",
        "full, or diagonal: of each channel alone, which takes no memory",
        default="full",
        kind="word",
        words=("full", "diagonal"),
    )
    gram_scale: float = parameter(
        "gram_scale",
        "what second moments between different channels are multiplied with; 0 leaves those of each channel alone",
        default=1.0,
        low=0.0,
        high=1.0,
    )
    base_weight: float = parameter(
        "base_weight",
        "of the base's own inputs, over the texts of all models, which D should not answer at all; above 0 the base is run too",
        default=0.0,
        low=0.0,
    )
    inputs: Literal["own", "merged"] = parameter(
        "inputs",
        "own: each model's, as it runs by itself; merged: what the layers that are merged already give, as in RegMean++",
        default="own",
        kind="word",
        words=("own", "merged"),
    )
    rest_lambda: float = parameter(
        "rest_lambda", "what the sum of the task vectors is multiplied with where there are no moments", default=0.7
    )
    data_tokens: int = parameter(
        "data_tokens",
        "tokens of each model's text that are read: its documents in order, until there are so many",
        default=4000,
        kind="whole",
        low=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments == "diagonal" and self.gram_scale != 1.0:
            raise ArgumentError(
                f"gram_scale: {setting('moments', 'diagonal')} has no moments between different channels. Leave it out."
            )

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`: what is done where there are no moments."""
        assert block.base is not None
        return add_to_base(
            block.base, weighted_sum(block.task_vectors, [1.0] * len(block.task_vectors)), self.rest_lambda
        )

    def with_moments(
        self, moments: Sequence[InputMoments], input_dim: int, where: str, base: InputMoments | None = None
    ) -> Projected:
        """What merges a matrix of which the moments of every model's input are known.

        Args:
            moments: of each model.
            base: of the base, where its weight is above 0.
            input_dim: the matrix's dimension that runs over the input channels.
            where: its name, for messages.

        Raises: InputError: moments that are not finite, or that cannot be inverted.
        """
        everyone = [*moments, *([base] if base else [])]
        grams = torch.stack([moments_of.rest + self.first_token_weight * moments_of.first for moments_of in everyone])
        if not bool(grams.isfinite().all()):
            raise InputError(f"{where}: the second moments of its input hold NaN or an infinity. Check the models.")
        if self.moments == "full" and self.gram_scale < 1.0:
            diagonal = torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
            grams = self.gram_scale * grams + (1 - self.gram_scale) * diagonal
        pull = self.base_weight * grams[-1] if base else torch.zeros_like(grams[0])
        grams = grams[: len(moments)]
        if self.moments == "diagonal":
            return Projected(channel_shares(grams, self.ridge, pull), input_dim, self.lambda_, is_diagonal=True)
        projected = projections(grams, self.ridge, pull)
        if projected is None:
            raise InputError(
                f"{where}: the second moments of its input cannot be inverted: the text is too short for {grams.shape[-1]} channels. "
                f"Give more text, or a {setting('ridge')} above 0."
            )
        return Projected(projected, input_dim, self.lambda_)


def projections(grams: torch.Tensor, ridge: float, pull: torch.Tensor) -> torch.Tensor | None:
    """P_i = (G_i + r m / N I) (sum G + pull + r m I)^-1, so that D = sum d_i P_i; without a pull they sum to I.

    Args:
        grams: G_i, `[models, ..., in, in]` float64.
        pull: `[..., in, in]`, the base's, weighted.
        ridge: r >= 0, in units of m, the mean diagonal of the sum.

    Returns: `[models, ..., in, in]` float64: I / N where all moments are 0; None where the sum is singular.
    """
    models, channels = grams.shape[0], grams.shape[-1]
    total = grams.sum(dim=0)
    scale = total.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    silent = scale <= 0
    identity = torch.eye(channels, dtype=grams.dtype, device=grams.device)
    prior = torch.where(silent, 1.0, ridge * scale) * identity
    factor, failed = torch.linalg.cholesky_ex(total + prior + torch.where(silent, 0.0, pull))
    if bool(failed.any()):
        return None
    solved = torch.cholesky_solve(grams + prior / models, factor.expand(grams.shape)).mT  # all of them are symmetric
    return solved if bool(solved.isfinite().all()) else None


def channel_shares(squares: torch.Tensor, ridge: float, pull: torch.Tensor) -> torch.Tensor:
    """What is left of `projections` where all moments are diagonal, of which these are the diagonals: (g_i + r m / N) / (sum g + pull + r m).

    Args:
        squares: g_i, `[models, ..., in]` float64.
        ridge, pull: see `projections`.

    Returns: the same shape: 1 / N for a channel that is 0 in all models, without a ridge.
    """
    total = squares.sum(dim=0)
    prior = ridge * total.mean(dim=-1, keepdim=True)
    silent = total + prior <= 0
    whole = torch.where(silent, 1.0, total + prior + pull)
    return torch.where(silent, 1.0 / len(squares), (squares + prior / len(squares)) / whole)


@dataclass(frozen=True)
class Projected:
    """Merges a matrix by what each model's task vector is multiplied with; a `streaming.stream.Merger`.

    Attributes:
        projections: P_i, `[models, in, in]` float64, or `[models, experts, in, in]` for a stack of matrices; their diagonals where `is_diagonal`.
        input_dim: the tensor's dimension that runs over the input channels.
        lambda_: what the merged task vector is multiplied with.
    """

    space: ClassVar[Literal["task_vectors", "weights"]] = "task_vectors"
    reads_base: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    projections: torch.Tensor
    input_dim: int
    lambda_: float
    is_diagonal: bool = False

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor | None:
        """The merged task vector of the whole tensor, `[matrices, rows, columns]` float64; None where each block has whole rows of inputs."""
        if self.is_diagonal or (self._in_rows(tensor) and tensor.columns <= GRID_ELEMENTS):
            return None
        return self.merged(tensor, scan)

    def merged(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """The merged task vector of the whole tensor, `[matrices, rows, columns]` float64."""
        merged = torch.zeros(tensor.matrices, tensor.rows, tensor.columns, dtype=torch.float64)
        for region, part in scan(lambda block: (block.region, self._answer(block).cpu())):
            matrices, rows, columns = (slice(*bounds) for bounds in _ranges(region))
            if self.is_diagonal:
                merged[matrices, rows, columns] = part
            elif self._in_rows(tensor):
                merged[matrices, rows] += part
            else:
                merged[matrices, :, columns] += part
        return merged

    def formula(self, tensor: TensorSpec, statistics: Any) -> None:
        """See `Merger`: an element depends on its whole matrix."""

    def combine(self, block: Block, statistics: torch.Tensor | None) -> torch.Tensor:
        """See `Merger.combine`."""
        return add_merged(
            block, self._answer(block) if statistics is None else part_of(block, statistics), self.lambda_
        )

    def _answer(self, block: Block) -> torch.Tensor:
        """What a block's task vectors add to the merged one: whole rows where inputs run along them, else whole columns."""
        region = block.region
        in_rows = self._in_rows(region.tensor)
        total: torch.Tensor | None = None
        for values, matrix in zip(block.task_vectors, self.projections, strict=True):
            own = self._of(region, matrix)
            change = region.as_stack(values).double()
            if self.is_diagonal:
                here = own[:, None, slice(*region.column_range)] if in_rows else own[:, slice(*region.row_range), None]
                total = change * here if total is None else total + change * here
                continue
            part = (
                change @ own[:, slice(*region.column_range)]
                if in_rows
                else own[:, slice(*region.row_range)].mT @ change
            )
            total = part if total is None else total + part
        assert total is not None
        return total

    def _of(self, region: Region, matrix: torch.Tensor) -> torch.Tensor:
        """One model's projections of a region's matrices, `[matrices or 1, in, in]`."""
        stacked = matrix.ndim == (2 if self.is_diagonal else 3)
        return matrix[slice(*region.matrix_range)] if stacked else matrix[None]

    def _in_rows(self, tensor: TensorSpec) -> bool:
        return self.input_dim == len(tensor.shape) - 1


def _ranges(region: Region) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return region.matrix_range, region.row_range, region.column_range


def part_of(block: Block, merged: torch.Tensor) -> torch.Tensor:
    """What a block has of a whole tensor's merged task vector."""
    assert block.base is not None
    return merged[tuple(slice(*bounds) for bounds in _ranges(block.region))].to(block.base.device)


def add_merged(block: Block, merged: torch.Tensor, lambda_: float) -> torch.Tensor:
    """The base's block with the merged task vector, `[n]` float32."""
    assert block.base is not None
    return (block.region.as_stack(block.base).double() + lambda_ * merged).float().reshape(-1)
