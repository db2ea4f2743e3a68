"""One input of an output, base or fine-tuned, and what does not fit of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from checkpoints.model import Model
from checkpoints.pieces import Assembled, Origin
from checkpoints.problems import Problems
from checkpoints.source import TensorInfo, TensorRef, dtype_name
from checkpoints.tensor_names import kind_of


class Mismatches:
    """What does not fit of one model's tensors; what is wrong with forty layers alike becomes one problem.

    Args:
        label: how messages name the model.
        advice: the last sentence of each, which says what to do.
    """

    def __init__(self, label: str, advice: str):
        self.label = label
        self.advice = advice
        self._tensors: dict[tuple[str, str], list[str]] = {}

    def add(self, name: str, problem: str) -> None:
        """Add what is wrong with a tensor; a whole message after its name."""
        self._tensors.setdefault((kind_of(name), problem), []).append(name)

    def add_missing(self, name: str, owner: str) -> None:
        """A tensor that the model `owner` has and this one lacks."""
        self.add(name, f"expected as in {owner}, got no such tensor. {self.advice}")

    def add_extra(self, name: str, owner: str) -> None:
        """A tensor that the model `owner` lacks and this one has."""
        self.add(name, f"expected no such tensor, as {owner} has none, got one. {self.advice}")

    def add_shape(self, name: str, expected: TensorInfo, got: TensorInfo, owner: str) -> None:
        """A tensor of another shape than the model `owner` has it in."""
        self.add(name, f"expected shape {list(expected.shape)} as in {owner}, got {list(got.shape)}. {self.advice}")

    def add_dtype(self, name: str, expected: TensorInfo, got: TensorInfo, owner: str) -> None:
        """A tensor of another kind of number than the model `owner` has it in."""
        self.add(
            name,
            f"expected {dtype_name(expected.dtype)} as in {owner}, got {dtype_name(got.dtype)}. {self.advice}",
        )

    def report_to(self, problems: Problems) -> None:
        """Add one problem for each kind of tensor and each thing that is wrong."""
        for (kind, problem), names in self._tensors.items():
            more = f" and {len(names) - 1} more {kind}" if len(names) > 1 else ""
            problems.add(f"{self.label}: {names[0]}{more}: {problem}")


@dataclass(frozen=True)
class AlignedModel:
    """One input under the output's names.

    Attributes:
        model: as it was opened.
        advice: what to do where it does not fit: the last sentence of a refusal.
        stored: its tensors that take part, by the names in its files.
        tensors: output name -> its tensor in the output's shape; what the model does not store is not in it.
        own_names: output name -> the name in its files, where that is another.
        problems: what does not fit, and what a user should know of it.
    """

    model: Model
    advice: str
    stored: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    own_names: Mapping[str, str] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.model.label

    def origins(self, name: str) -> tuple[Origin, ...]:
        """What an output tensor is in this model's files, where that is no tensor of its name; see `Assembled.origins`."""
        source = self.tensors[name].source
        if isinstance(source, Assembled):
            return source.origins(name)
        return (Origin(self.own_names[name]),) if name in self.own_names else ()

    def with_tensors(self, tensors: Mapping[str, TensorRef]) -> AlignedModel:
        """This model with some of its tensors read from elsewhere."""
        return replace(self, tensors={**self.tensors, **tensors})


def same_kind_of_number(first: TensorInfo, other: TensorInfo) -> bool:
    """Whether both hold floating-point numbers, or neither."""
    return first.dtype.is_floating_point == other.dtype.is_floating_point
