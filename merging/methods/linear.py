"""Linear: the weighted mean of the models ("model soup")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting
from merging.methods.contract import Elementwise, Method
from merging.parameters import shared
from streaming.blocks import TensorSpec
from streaming.elements import Element, Formula, Number


def weighted_sum(vectors: Sequence[Number], weights: Sequence[Number | float]) -> Number:
    """sum w_i v_i, in the order of the models, of numbers of an element or of tensors `[n]` float32."""
    total = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total = total + vector * weight
    return total


@dataclass(frozen=True)
class Linear(Elementwise):
    """Average the weights.

        out = sum w_i x_i / sum w_i        (not divided where `normalize` is false)

    The base gives config, tokenizer and vocabulary, and no numbers.

    Source: arXiv:2203.05482 (uniform soup); mergekit's `linear`. Deviation: float32 inside.
    """

    name: ClassVar[str] = "linear"
    space: ClassVar[Literal["task_vectors", "weights"]] = "weights"
    reads_base: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    weights: tuple[float, ...] = shared("weight")
    normalize: bool = shared("normalize", default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight_sum(self.weights, self.normalize)

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula:
        """See `Elementwise.formula`."""

        def merged(x: Element) -> Number:
            total = weighted_sum(x.models, list(map(x.number, self.weights)))
            return total / x.number(sum(self.weights)) if self.normalize else total

        return merged

    @classmethod
    def without_base(cls) -> type[Method] | None:
        """See `Method.without_base`."""
        return cls


def check_weight_sum(weights: tuple[float, ...], normalize: bool) -> None:
    """Raise ArgumentError where weights that add up to nothing would be divided by their sum."""
    if normalize and abs(sum(weights)) < 1e-8:
        raise ArgumentError(
            f"weight: {', '.join(f'{w:g}' for w in weights)} add up to 0, which {setting('normalize')} divides by. Add {setting('normalize', 'false')}."
        )
