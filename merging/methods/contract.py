"""What a merging method is: a frozen dataclass of its parameters, `measure` and `combine`."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from checkpoints.errors import ArgumentError
from streaming.blocks import Block, Scan, TensorSpec


def parameter(
    *,
    key: str,
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    per_model: bool = False,
) -> Any:
    """A dataclass field that a flag or a recipe key sets.

    Args:
        key: its name in a recipe file (`lambda`); the flag is `--key`, for a per-model one the plural of `weight` too.
        default: for every model alike where `per_model`.
        low, high: the closed range it must lie in; `above`: an open lower bound.
        per_model: one number per model, given as a tuple.
    """
    return dataclasses.field(
        metadata={"key": key, "default": default, "low": low, "high": high, "above": above, "per_model": per_model}
    )


@dataclass(frozen=True)
class Method(ABC):
    """A merging method with its parameters: pure functions over blocks of one tensor.

    `measure` reduces a whole tensor to statistics, reading it as often as it needs through `scan`; `combine` makes one
    block of the output. Both must give results that do not depend on how many elements a block of `combine` holds.
    Both compute in float32 (sums over a tensor in float64) and round nothing: the writer rounds, once.
    """

    space: ClassVar[Literal["task_vectors", "weights"]] = "task_vectors"
    """What `Block` holds: fine-tuned minus base, or the fine-tuned weights themselves."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers, from the field `seed`."""
    additive: ClassVar[bool] = False
    """Whether each task vector is multiplied with a number of its own, which a plan can name."""
    needs_embeddings: ClassVar[bool] = False
    """Whether it must know which tensors are embeddings, for which the model class is built."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata:
                check_range(field, getattr(self, field.name))

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

    @classmethod
    def parameters(cls) -> dict[str, dataclasses.Field[Any]]:
        """Its parameters by recipe key."""
        return {field.metadata["key"]: field for field in dataclasses.fields(cls) if field.metadata}


def check_range(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ArgumentError where a parameter, or one model's, lies outside its range or is no number."""
    meta = field.metadata
    for number in value if meta["per_model"] else (value,):
        if isinstance(number, bool) == isinstance(meta["default"], bool) and (
            isinstance(number, bool)
            or (
                isinstance(number, int | float)
                and math.isfinite(number)
                and meta["low"] <= number <= meta["high"]
                and number > meta["above"]
            )
        ):
            continue
        raise ArgumentError(f"{meta['key']}: expected {_expectation(meta)}, got {number}.")


def _expectation(meta: Any) -> str:
    if isinstance(meta["default"], bool):
        return "true or false"
    if meta["above"] > -math.inf:
        return f"a number above {meta['above']:g}"
    if meta["low"] > -math.inf and meta["high"] == math.inf:
        return f"a finite number, {meta['low']:g} or above"
    if meta["low"] > -math.inf:
        return f"a number in [{meta['low']:g}, {meta['high']:g}]"
    return "a finite number"
