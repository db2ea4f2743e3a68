"""What a merging method is: a frozen dataclass of its parameters, `measure` and `combine`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from merging.parameters import Parameter
from streaming.blocks import Block, Scan, TensorSpec
from streaming.elements import Formula, Tensors


@dataclass(frozen=True)
class Method(ABC):
    """A merging method with its parameters: pure functions over blocks of one tensor.

    `measure` reduces a whole tensor to statistics, reading it as often as it needs through `scan`; `combine` makes one
    block of the output. Both must give results that do not depend on how many elements a block of `combine` holds.
    Both compute in float32 (sums over a tensor in float64) and round nothing: the writer rounds, once.
    """

    name: ClassVar[str] = ""
    """What users call it. A class in `merging/methods` that gives itself a name is a method of `merge.py --method NAME`."""
    space: ClassVar[Literal["task_vectors", "weights"]] = "task_vectors"
    """What `Block` holds: fine-tuned minus base, or the fine-tuned weights themselves."""
    reads_base: ClassVar[bool] = True
    """Whether `Block` holds the base too."""
    whole_rows: ClassVar[bool] = False
    """Whether a block must hold whole rows, where a row has at most `GRID_ELEMENTS`; longer ones come in pieces."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers, from the field `seed`."""
    additive: ClassVar[bool] = False
    """Whether each task vector is multiplied with a number of its own, which a plan can name."""
    needs_embeddings: ClassVar[bool] = False
    """Whether it must know which tensors are embeddings, for which the model class is built."""
    needs_data: ClassVar[bool] = False
    """Whether each model brings text of its own task, on which it is run for what the method wants to know."""
    prepared_with: ClassVar[tuple[str, ...]] = ()
    """Parameters that what is found out on the text depends on: one value for all candidates of a search."""
    prepared_for: ClassVar[Mapping[str, Any]] = {}
    """Parameters, each with the value under which what is found out serves every other value too."""
    unmeasured: ClassVar[tuple[str, ...]] = ()
    """Fields that `measure` does not look at: methods that differ in these alone have the same statistics."""
    min_models: ClassVar[int] = 1
    """How many models it merges at least, the base not counted."""
    max_models: ClassVar[int | None] = None
    """And at most."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "combine" in vars(cls) and "formula" not in vars(cls):
            cls.formula = Method.formula  # type: ignore[method-assign]  # what it inherits speaks of another `combine`

    def __post_init__(self) -> None:
        for parameter, field in self.parameters().values():
            value = getattr(self, field)
            for number in value if parameter.per_model else (value,):
                parameter.check(number)

    @property
    def measures(self) -> bool:
        """Whether `measure` may read the tensor, which one process then merges whole."""
        return type(self).measure is not Method.measure

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """Reduce one tensor to the statistics that `combine` needs; None where it needs none."""
        return None

    @abstractmethod
    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """Merge one block.

        Args:
            block: see `Block`; its task vectors or weights may be overwritten, its base not.
            statistics: what `measure` returned for this tensor.

        Returns: `[block.region.numel]` float32; may be one of the block's own tensors, the base excepted.
        """

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula | None:
        """What `combine` makes of one element, where it can be said of one; see `Elementwise`."""
        return None

    @classmethod
    def parameters(cls) -> dict[str, tuple[Parameter, str]]:
        """Recipe key -> the parameter, and the name of the field that holds it; a tuple where each model has a value."""
        declared = ((field.metadata["parameter"], field.name) for field in dataclasses.fields(cls) if field.metadata)
        return {parameter.key: (parameter, name) for parameter, name in declared}

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """The method of a recipe that names no base model; None where it needs one."""
        return None


class Elementwise(Method):
    """A method that makes each element of the output from the base's and the models', and from what it has measured.

    Its formula is written once (`streaming.elements`): with tensors it is `combine`; large merges on a CPU compile it to one loop
    that also reads, widens, checks, relaxes and rounds.
    """

    @abstractmethod
    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula | None:
        """The merged number of an element; None where it takes more than the element's numbers, which `combine` then does.

        Args:
            statistics: what `measure` returned for this tensor.
        """

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Method.combine`."""
        merged = self.formula(block.region.tensor, statistics)
        assert merged is not None, f"{type(self).__name__}: expected a formula, or a combine of its own"
        return merged(Tensors(block))
