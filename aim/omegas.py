"""omega for every tensor: one number, or numbers by filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting
from streaming.values import Value, describe, parse_value, split_filters


class _Share:
    """What an omega must be; a `streaming.values.Accepted`."""

    kind = "number"
    is_switch = False
    expectation = "a number in [0, 1]"

    def check(self, value: Any, *, place: bool = True) -> None:
        """Raise ArgumentError where it is outside [0, 1]."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ArgumentError(f"{'omega: ' if place else ''}expected {self.expectation}, got {describe(value)}.")


SHARE = _Share()


@dataclass(frozen=True)
class Omega:
    """Which omega a tensor gets.

    Attributes:
        rest: for every tensor no filter matches.
        filters: (part of a tensor's name, omega); the first that matches counts.
    """

    rest: float
    filters: tuple[tuple[str, float], ...] = ()

    @property
    def value(self) -> Value:
        """The same as any parameter's value."""
        return Value((*((part, (omega,)) for part, omega in self.filters), (None, (self.rest,))))

    def of(self, tensor: str) -> float:
        """The omega of the tensor of this name."""
        return float(self.value.at(tensor, 0.0))

    def filter_of(self, tensor: str) -> str | None:
        """The filter that gives it; None for the rest."""
        return self.value.filter_of(tensor)

    def as_json(self) -> Any:
        """As merge_recipe.json has it: a number, `mlp=0.2,0.4`, or entries where a filter would be torn apart as text."""
        if not self.filters:
            return self.rest
        is_plain = all(not set(part) & {",", "="} for part, _ in self.filters)
        return str(self) if is_plain else self.value.as_json()

    def __str__(self) -> str:
        return ",".join([*(f"{part}={_shortest(omega)}" for part, omega in self.filters), _shortest(self.rest)])


def _shortest(number: float) -> str:
    """The shortest text that means this very number: `0.4`, `1`."""
    text = f"{number:g}"
    return text if float(text) == number else repr(float(number))


def read_omega(content: Any) -> Omega:
    """Read a number, entries of `{filter, value}` or the text `mlp=0.2,self_attn=0.6,0.4`; the last is for the rest.

    Raises: ArgumentError: no number, outside [0, 1], nothing for the rest.
    """
    place = setting("omega")
    if isinstance(content, str):
        content = _entries(content)
    try:
        value = parse_value(content, SHARE)
    except ArgumentError as error:
        raise ArgumentError(f"{place}: {error.marked}") from None
    if any(len(numbers) > 1 for _, numbers in value.entries):
        raise ArgumentError(
            f"{place}: expected one number for each filter, got several. For several checkpoints use {setting('omegas')}."
        )
    *filtered, (last, (rest,)) = value.entries
    if last is not None or any(part is None for part, _ in filtered):
        raise ArgumentError(f"{place}: expected one entry for the rest, without a filter and at the end. Add it.")
    return Omega(float(rest), tuple((str(part), float(number)) for part, (number,) in filtered))


def _entries(text: str) -> Any:
    """What a recipe file would have for a typed omega. Raises ArgumentError."""
    place = setting("omega")
    *filtered, (last, rest) = split_filters(text)
    if last is not None:
        raise ArgumentError(
            f"{place}: expected a number for the rest at the end, got {text!r}. Write for instance {text},1.0."
        )
    for part, number in filtered:
        if not part:
            raise ArgumentError(
                f"{place}: expected FILTER=NUMBER before the last number, got {number if part is None else '=' + number!r}. "
                f"For several omegas use {setting('omegas')}."
            )
    return [*({"filter": part, "value": number} for part, number in filtered), {"value": rest}] if filtered else rest


def read_omegas(content: Any) -> tuple[Omega, ...]:
    """Read `[0, 0.2, 0.4]` or the text `0,0.2,0.4`: a sweep, each with a checkpoint of its own.

    Raises: ArgumentError: no numbers in [0, 1], or one named twice.
    """
    place = setting("omegas")
    shown = content
    if isinstance(content, str):
        content = content.split(",")
    numbers = content if isinstance(content, list) else [content]
    try:
        value = parse_value(numbers, SHARE)
    except ArgumentError as error:
        raise ArgumentError(f"{place}: {error.marked}") from None
    if len(value.entries) > 1 or value.entries[0][0] is not None:
        raise ArgumentError(f"{place}: expected numbers in [0, 1], got filters, which {setting('omega')} takes.")
    omegas = tuple(Omega(float(number)) for number in value.entries[0][1])
    if len(set(omegas)) < len(omegas):
        raise ArgumentError(f"{place}: expected different numbers, got {shown}.")
    return omegas
