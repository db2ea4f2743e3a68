"""RegMean on task vectors: the change that answers each model's own inputs most like that model does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from checkpoints.errors import ArgumentError, InputError
from checkpoints.settings import setting
from merging.methods.contract import Method
from merging.methods.linear import weighted_sum
from merging.methods.task_arithmetic import add_to_base
from merging.parameters import parameter, shared
from streaming.blocks import Block, Region, Scan, TensorSpec

ROUNDINGS = 16
"""Where a channel has less of a second moment beside the channels before it, in roundings of its own for each channel of the matrix,
it has none: singular matrices have up to half of one."""


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
    ) -> Prepared:
        """What merges a matrix of which the moments of every model's input are known.

        Args:
            moments: of each model.
            base: of the base, where its weight is above 0.
            input_dim: the matrix's dimension that runs over the input channels.
            where: its name, for messages.

        Raises: InputError: moments that are not finite; those that cannot be inverted are found when a matrix is measured.
        """
        everyone = [*moments, *([base] if base else [])]
        grams = torch.stack([moments_of.rest + self.first_token_weight * moments_of.first for moments_of in everyone])
        if not bool(grams.isfinite().all()):
            raise InputError(f"{where}: the second moments of its input hold NaN or an infinity. Check the models.")
        if self.moments == "full" and self.gram_scale < 1.0:
            diagonal = torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
            grams = self.gram_scale * grams + (1 - self.gram_scale) * diagonal
        pull = self.base_weight * grams[-1] if base else None
        grams = grams[: len(moments)]
        if self.moments == "diagonal":
            return Shared(input_dim, self.lambda_, channel_shares(grams, self.ridge, pull))
        total = grams.sum(dim=0)
        scale = total.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        if pull is not None:
            pull = torch.where(scale > 0, pull, 0.0)  # what no text has used keeps the mean
            total = total + pull
        system = System(total, scale)
        return Solved(input_dim, self.lambda_, grams, pull, system, self.ridge, where)


@dataclass(frozen=True)
class System:
    """What D solves, all but the ridge: (D - mean d) (total + r m I) = sum (d_i - mean d) G_i - mean d pull.

    The right side depends on no ridge. Where no text has used a matrix, it is 0, and D the mean.

    Attributes:
        total: sum G_i + pull, `[..., in, in]` float64.
        scale: m, the mean diagonal of sum G_i, `[..., 1, 1]`.
    """

    total: torch.Tensor
    scale: torch.Tensor

    def factor(self, ridge: float, where: str) -> torch.Tensor:
        """The Cholesky factor of total + r m I, `[..., in, in]`; of I where all moments are 0. Raises InputError where it is singular,
        or is not by its roundings alone."""
        prior = torch.where(self.scale > 0, ridge * self.scale, 1.0)
        identity = torch.eye(self.total.shape[-1], dtype=self.total.dtype, device=self.total.device)
        matrix = self.total + prior * identity
        factor: torch.Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        left = factor.diagonal(dim1=-2, dim2=-1) ** 2
        least = ROUNDINGS * len(identity) * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1)
        if bool(failed.any()) or not bool((left > least).all()):
            raise InputError(
                f"{where}: the second moments of its input cannot be inverted: the text is too short for {len(identity)} channels. "
                f"Give more text, or a {setting('ridge')} above {ridge:g}."
            )
        return factor


def channel_shares(squares: torch.Tensor, ridge: float, pull: torch.Tensor | None) -> torch.Tensor:
    """What D has of each d_i where all moments are diagonal, of which these are the diagonals: (g_i + r m / N) / (sum g + pull + r m).

    Args:
        squares: g_i, `[models, ..., in]` float64.
        ridge: r >= 0, in units of m, the mean of sum g.
        pull: `[..., in]`, the base's, weighted; None for none.

    Returns: the same shape as g: 1 / N for a channel that is 0 in all models, without a ridge.
    """
    total = squares.sum(dim=0)
    prior = ridge * total.mean(dim=-1, keepdim=True)
    silent = total + prior <= 0
    whole = torch.where(silent, 1.0, total + prior + (0.0 if pull is None else pull))
    return torch.where(silent, 1.0 / len(squares), (squares + prior / len(squares)) / whole)


@dataclass(frozen=True)
class Prepared(ABC):
    """Merges a matrix of whose inputs all is known; a `streaming.stream.Merger`.

    Attributes:
        input_dim: the tensor's dimension that runs over the input channels.
        lambda_: what the merged task vector is multiplied with.
    """

    space: ClassVar[Literal["task_vectors", "weights"]] = "task_vectors"
    reads_base: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = False
    measures: ClassVar[bool] = True

    input_dim: int
    lambda_: float

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """See `Merger.measure`."""
        return None

    def formula(self, tensor: TensorSpec, statistics: Any) -> None:
        """See `Merger.formula`: an element depends on more than its own numbers."""
        return None

    @abstractmethod
    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Merger.combine`."""

    def is_in_rows(self, tensor: TensorSpec) -> bool:
        """Whether the input channels run along the rows."""
        return self.input_dim == len(tensor.shape) - 1


@dataclass(frozen=True)
class Shared(Prepared):
    """By diagonal moments: each channel has a share of each task vector.

    Attributes:
        shares: `[models, in]` float64, or `[models, experts, in]` for a stack of matrices.
    """

    shares: torch.Tensor

    def combine(self, block: Block, statistics: None) -> torch.Tensor:
        """See `Merger.combine`."""
        region = block.region
        total: torch.Tensor | None = None
        for change, of_model in zip(_changes(block), self.shares, strict=True):
            own = _of_region(region, of_model, 1)
            here = (
                own[:, None, slice(*region.column_range)]
                if self.is_in_rows(region.tensor)
                else own[:, slice(*region.row_range), None]
            )
            total = change * here if total is None else total + change * here
        assert total is not None
        return _add_to_base(block, total, self.lambda_)


@dataclass(frozen=True)
class Solved(Prepared):
    """By full moments: D is solved for the whole matrix.

    Attributes:
        grams: G_i, `[models, in, in]` float64, or `[models, experts, in, in]` for a stack of matrices.
        pull: the base's, weighted, `[in, in]` or `[experts, in, in]`; None for none.
        system: what D solves.
        ridge: with which it is solved.
        where: the name of a matrix that has these moments, for messages.
    """

    grams: torch.Tensor
    pull: torch.Tensor | None
    system: System
    ridge: float
    where: str

    @cached_property
    def factor(self) -> torch.Tensor:
        """See `System.factor`; once for all matrices of one input."""
        return self.system.factor(self.ridge, self.where)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """D without the mean of the task vectors, `[matrices, rows, columns]` float64."""
        return solve(self.answers(tensor, scan), self.factor, is_in_rows=self.is_in_rows(tensor))

    def combine(self, block: Block, statistics: torch.Tensor) -> torch.Tensor:
        """See `Merger.combine`."""
        return add_solved(block, statistics, self.lambda_)

    def answers(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """The right side of the system, which no ridge changes: `[matrices, rows, columns]` float64."""
        answers = torch.zeros(tensor.matrices, tensor.rows, tensor.columns, dtype=torch.float64)
        for region, part in scan(lambda block: (block.region, self._answer(block).cpu())):
            matrices, rows, columns = (slice(*bounds) for bounds in _ranges(region))
            if self.is_in_rows(tensor):
                answers[matrices, rows] += part
            else:
                answers[matrices, :, columns] += part
        return answers

    def _answer(self, block: Block) -> torch.Tensor:
        """What a block adds to whole rows where inputs run along them, else to whole columns."""
        region = block.region
        is_in_rows = self.is_in_rows(region.tensor)
        inputs = slice(*(region.column_range if is_in_rows else region.row_range))
        changes = _changes(block)
        mean = _mean(changes)
        factors = [(change - mean, gram) for change, gram in zip(changes, self.grams, strict=True)]
        if self.pull is not None:
            factors.append((-mean, self.pull))
        total: torch.Tensor | None = None
        for change, gram in factors:
            own = _of_region(region, gram, 2)
            part = change @ own[:, inputs] if is_in_rows else own[:, :, inputs] @ change
            total = part if total is None else total + part
        assert total is not None
        return total


def solve(answers: torch.Tensor, factor: torch.Tensor, *, is_in_rows: bool) -> torch.Tensor:
    """D without the mean of the task vectors, `[matrices, rows, columns]` float64, from both sides of its system; see `Solved`."""
    factor = factor if factor.ndim == answers.ndim else factor[None]
    there = answers.to(factor.device)
    return (torch.cholesky_solve(there.mT, factor).mT if is_in_rows else torch.cholesky_solve(there, factor)).cpu()


def add_solved(block: Block, solved: torch.Tensor, lambda_: float) -> torch.Tensor:
    """The base's block with lambda times D, of which the whole tensor's is known but for the mean of the task vectors: `[n]` float32."""
    part = solved[tuple(slice(*bounds) for bounds in _ranges(block.region))]
    mean = _mean(_changes(block))
    return _add_to_base(block, mean + part.to(mean.device), lambda_)


def _changes(block: Block) -> list[torch.Tensor]:
    """The task vectors, `[matrices, rows, columns]` float64."""
    return [block.region.as_stack(values).double() for values in block.task_vectors]


def _mean(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(changes)).mean(dim=0)


def _of_region(region: Region, moments: torch.Tensor, ndim: int) -> torch.Tensor:
    """One model's moments of a region's matrices, `[matrices or 1, ...]`; `ndim`: that those of one matrix have."""
    return moments[slice(*region.matrix_range)] if moments.ndim > ndim else moments[None]


def _add_to_base(block: Block, merged: torch.Tensor, lambda_: float) -> torch.Tensor:
    assert block.base is not None
    return (block.region.as_stack(block.base).double() + lambda_ * merged).float().reshape(-1)


def _ranges(region: Region) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return region.matrix_range, region.row_range, region.column_range
