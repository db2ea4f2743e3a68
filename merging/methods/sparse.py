"""What trimming and dropping methods share: thin out the task vectors, then add them up, as they are or by elected sign."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from merging.methods.contract import Method
from merging.methods.linear import check_weight_sum, weighted_sum
from merging.methods.signs import elect_and_sum
from merging.methods.task_arithmetic import add_to_base
from merging.parameters import shared
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Element, Formula, Number, Tensors

if TYPE_CHECKING:
    from streaming.buffers import BufferLoop

LEAST_NORM = 1e-7
"""An l1 norm below this is not restored, nor restored to: mergekit's bound."""


class Thinning(NamedTuple):
    """What `measure` finds: what `select` did, and what each thinned task vector is multiplied with, where it is."""

    selection: Any = None
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SparseTaskVectors(Method):
    """Keep a share of each task vector, and add up what is kept.

        d_i <- d_i where it is kept, else 0;   d_i <- d_i * |d_i before|_1 / |d_i|_1  (where `rescale` is true)
        D_i  = w_i d_i
        out  = b + lambda * sum D_i          (`elects`: of the D_i with the sign of sum D_i, 0 counts as +)

    Where `normalize` is true, the sum is divided by the sum of its w_i. A task vector of density 1 stays as it is.
    `rescale` None is the method's own rule: no rescaling, unless it says otherwise.
    """

    elects: ClassVar[bool] = False
    """Whether a sign is elected for each element."""
    restores_norm: ClassVar[bool] = False
    """Whether the l1 norm is restored where `rescale` is None."""
    unmeasured: ClassVar[tuple[str, ...]] = ("weights", "lambda_", "normalize")

    weights: tuple[float, ...] = shared("weight")
    densities: tuple[float, ...] = shared("density")
    lambda_: float = shared("lambda")
    normalize: bool = shared("normalize")
    rescale: bool | None = shared("rescale")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.elects:
            check_weight_sum(self.weights, self.normalize)

    def select(self, tensor: TensorSpec, scan: Scan) -> Any:
        """What `thinned` must know of the whole tensor; None where it needs nothing."""
        return None

    @abstractmethod
    def thinned(self, block: Block, selection: Any) -> Sequence[torch.Tensor]:
        """The block's task vectors, 0 where an element is not kept; those of density 1 are left alone.

        Args:
            selection: what `select` found.
        """

    def thinning(self, tensor: TensorSpec, selection: Any) -> tuple[Callable[[Block], Sequence[torch.Tensor]], Any]:
        """How `measure` thins out each block of a tensor, and what `thinned` is given then: a method for which that is dear notes
        what it keeps, and need not find it twice."""
        return lambda block: self.thinned(block, selection), selection

    @property
    def measures(self) -> bool:
        """See `Method.measures`."""
        return type(self).select is not SparseTaskVectors.select or self._restores

    @property
    def _restores(self) -> bool:
        """Whether the l1 norm of what is thinned is restored."""
        wanted = self.restores_norm if self.rescale is None else self.rescale
        return wanted and any(density < 1.0 for density in self.densities)

    def measure(self, tensor: TensorSpec, scan: Scan) -> Thinning:
        """See `Thinning`; one reading more where l1 norms are restored."""
        selection = self.select(tensor, scan)
        is_thinned = [density < 1.0 for density in self.densities]
        if not (self._restores and tensor.numel):
            return Thinning(selection)
        thin, selection = self.thinning(tensor, selection)

        def norms(block: Block) -> torch.Tensor:
            # A block's sum is float32, so that a tensor of one block has the reference program's bits; blocks add up in float64.
            before = [values.abs().sum() for values in block.task_vectors]
            after = [values.abs().sum() for values in thin(block)]
            return torch.stack([*before, *after]).cpu().double()

        before, after = torch.stack(list(scan(norms))).sum(dim=0).float().chunk(2)
        restored = (before >= LEAST_NORM) & (after >= LEAST_NORM) & torch.tensor(is_thinned)
        return Thinning(selection, tuple(torch.where(restored, before / after, 1.0).tolist()))

    def combine(self, block: Block, statistics: Thinning | None) -> torch.Tensor:
        """See `Method.combine`; without statistics where nothing was measured."""
        selection, factors = statistics or Thinning()
        vectors = self.thinned(block, selection)
        return summing(self, factors, len(vectors))(block, vectors)

    def summed(self, x: Element, vectors: Sequence[Number], factors: Sequence[float] | None) -> Number:
        """The base and what is made of an element's task vectors, which are thinned; see `Thinning`."""
        if factors is not None:
            vectors = [vector * x.number(factor) for vector, factor in zip(vectors, factors, strict=True)]
        weights = list(map(x.number, self.weights))
        if self.elects:
            delta = elect_and_sum(vectors, weights, normalize=self.normalize)
        else:
            delta = weighted_sum(vectors, weights)
            if self.normalize:
                delta = delta / x.number(sum(self.weights))
        return add_to_base(x.base, delta, x.number(self.lambda_))


@functools.lru_cache(maxsize=64)
def summing(method: SparseTaskVectors, factors: tuple[float, ...] | None, count: int) -> BufferLoop:
    """How a method adds up so many task vectors that are thinned."""
    from streaming.buffers import BufferLoop

    return BufferLoop(lambda x: method.summed(x, x.models, factors), count)


class ThinnedByElement(SparseTaskVectors):
    """A method that can say of each element by itself whether it is kept."""

    @abstractmethod
    def thin(self, x: Element, tensor: TensorSpec, selection: Any) -> Sequence[Number]:
        """The task vectors of an element, 0 where it is not kept; those of density 1 are left alone.

        Args:
            tensor: whose element it is.
            selection: what `select` found.
        """

    def thinned(self, block: Block, selection: Any) -> Sequence[torch.Tensor]:
        """See `SparseTaskVectors.thinned`."""
        return self.thin(Tensors(block), block.region.tensor, selection)

    def formula(self, tensor: TensorSpec, statistics: Thinning | None) -> Formula:
        """See `Method.formula`."""
        selection, factors = statistics or Thinning()
        return lambda x: self.summed(x, self.thin(x, tensor, selection), factors)
