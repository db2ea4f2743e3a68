"""A parameter's value: a constant, a gradient over the layers, or either of them by part of a tensor's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from checkpoints.errors import ArgumentError, unknown

Number = float | int | bool | str
"""One value of a parameter; a word where it takes one of several."""

NOTHING: Any = object()
"""What a value says of a tensor that no filter matches."""


class Accepted(Protocol):
    """What numbers a parameter takes; `merging.parameters.Parameter` is one, AIM's omega another."""

    @property
    def kind(self) -> str:
        """`number`, `whole`, `switch` (yes or no), `rule` (yes, no, or what the method itself does) or `word` (one of several)."""

    @property
    def is_switch(self) -> bool:
        """Whether it takes yes and no."""

    @property
    def expectation(self) -> str:
        """What a value must be, for messages: `a number in [0, 1]`."""

    def check(self, value: Any, *, place: bool = True) -> None:
        """Raise ArgumentError where one value is outside the range; `place`: the message names the parameter."""


@dataclass(frozen=True)
class Value:
    """What mergekit's YAML allows for one parameter.

    Attributes:
        entries: (part of a tensor's name, numbers); the first whose part is in the name counts, None is in every name. One
            number is constant, several are spread evenly over the layers of a slice and interpolated; yes and no step.
    """

    entries: tuple[tuple[str | None, tuple[Number, ...]], ...]

    @classmethod
    def constant(cls, number: Number) -> Value:
        """The same for every tensor."""
        return cls(((None, (number,)),))

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for every tensor."""
        return self.entries[0][0] is None and len(self.entries[0][1]) == 1

    def at(self, tensor: str, t: float) -> Any:
        """What it is for one tensor; NOTHING where no filter matches.

        Args:
            tensor: its name.
            t: where among the layers it is, 0 for the first and 1 for the last.
        """
        for part, numbers in self.entries:
            if matches(part, tensor):
                position = t * (len(numbers) - 1)
                first = int(position)
                if isinstance(numbers[first], bool) or len(numbers) == 1:
                    return numbers[first]
                share = position - first
                low, high = float(numbers[first]), float(numbers[min(first + 1, len(numbers) - 1)])
                return (1 - share) * low + share * high
        return NOTHING

    def filter_of(self, tensor: str) -> str | None:
        """The filter that gives a tensor its number; None where none does."""
        return next((part for part, _ in self.entries if matches(part, tensor)), None)

    def as_json(self) -> Any:
        """As a recipe file has it: a number, a list of them, or a list of `{filter, value}`."""

        def one(numbers: tuple[Number, ...]) -> Any:
            return numbers[0] if len(numbers) == 1 else list(numbers)

        if self.entries[0][0] is None:
            return one(self.entries[0][1])
        return [
            {"value": one(numbers)} if part is None else {"filter": part, "value": one(numbers)}
            for part, numbers in self.entries
        ]


def matches(part: str | None, tensor: str) -> bool:
    """Whether a filter is in a tensor's name; None is in every name."""
    return part is None or part in tensor


def parse_value(content: Any, parameter: Accepted) -> Value:
    """Read a number, a gradient or filters, as a recipe file has them.

    Raises: ArgumentError: it is none of these, or a number is out of the parameter's range.
    """
    if isinstance(content, list) and not content:
        raise ArgumentError("expected a value, got an empty list.")
    entries = content if isinstance(content, list) else [content]
    if not any(isinstance(entry, dict) for entry in entries):
        return Value(((None, _parse_numbers(content, parameter)),))
    parsed = []
    for entry in entries:
        if not isinstance(entry, dict) or "value" not in entry:
            raise ArgumentError("expected a number, a list of numbers, or a list of entries with filter and value.")
        for key in entry.keys() - {"filter", "value"}:
            raise ArgumentError(unknown("key", str(key), ("filter", "value")))
        part = entry.get("filter")
        if part is not None and not isinstance(part, str):
            raise ArgumentError(f"expected a part of a tensor's name as filter, got {describe(part)}.")
        try:
            numbers = _parse_numbers(entry["value"], parameter)
        except ArgumentError as error:
            where = "the filter '" + part + "'" if part else "the rest"
            raise ArgumentError(f"{error.marked.removesuffix('.')} for {where}.") from None
        parsed.append((None if part == "*" else part, numbers))
    return Value(tuple(parsed))


def split_filters(text: str) -> list[tuple[str | None, str]]:
    """Read `mlp=0.2,self_attn=0.6,0.4` as it is typed: (filter, number) in order, None for a number without a filter.

    A comma inside a filter stays: what follows one and has no `=` is part of the next filter, unless it is a number.
    """
    filters: list[tuple[str | None, str]] = []
    begun: list[str] = []
    parts = text.split(",")
    for at, entry in enumerate(parts):
        part, equals, number = entry.rpartition("=")
        if equals:
            filters.append((",".join([*begun, part]).strip(), number.strip()))
            begun = []
        elif at == len(parts) - 1 or (not begun and is_number(entry)):
            filters += [(None, ",".join([*begun, entry]))]
            begun = []
        else:
            begun.append(entry)
    return filters


def is_number(text: str) -> bool:
    """Whether a text is a number, as Python reads one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_numbers(content: Any, parameter: Accepted) -> tuple[Number, ...]:
    """One number, or several over the layers."""
    if parameter.kind == "word" and isinstance(content, list):
        raise ArgumentError(f"expected {parameter.expectation}, got {describe(content)}.")
    numbers = []
    for part in content if isinstance(content, list) and content else [content]:
        number = _number(part, parameter)
        if number is None:
            raise ArgumentError(f"expected {parameter.expectation}, got {describe(part)}.")
        try:
            parameter.check(number, place=False)
        except ArgumentError:
            if not isinstance(part, str):
                raise
            raise ArgumentError(f"expected {parameter.expectation}, got {part:.100}.") from None
        numbers.append(number)
    return tuple(numbers)


def _number(content: Any, parameter: Accepted) -> Number | None:
    """A scalar of a file as a number: YAML reads 1e-5 as text, and mergekit's name of its rule for rescale is l1."""
    if parameter.kind == "word":
        return content if isinstance(content, str) else None
    if isinstance(content, str):
        if parameter.kind == "rule" and content == "l1":
            return True
        try:
            content = float(content)
        except ValueError:
            return None
    if isinstance(content, float) and parameter.kind == "whole" and content.is_integer():
        return int(content)
    if parameter.is_switch and content in (0, 1):
        return bool(content)
    return content if isinstance(content, bool | int | float) else None


def describe(content: Any) -> str:
    """What a part of the file is, for messages."""
    if content is None:
        return "nothing"
    if isinstance(content, dict):
        return "a mapping"
    if isinstance(content, list):
        return (
            "an empty list" if not content else f"a list of {len(content)}" if len(content) > 4 else f"{content!r:.100}"
        )
    return f"{str(content).lower() if isinstance(content, bool) else repr(content):.100}"
