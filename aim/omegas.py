"""omega for every tensor: one number, or numbers by filter."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints.errors import ArgumentError


@dataclass(frozen=True)
class Omega:
    """Which omega a tensor gets.

    Attributes:
        rest: for every tensor no filter matches.
        filters: (part of a tensor's name, omega); the first that matches counts.
    """

    rest: float
    filters: tuple[tuple[str, float], ...] = ()

    def of(self, tensor: str) -> float:
        """The omega of the tensor of this name."""
        return next((omega for part, omega in self.filters if part in tensor), self.rest)

    def filter_of(self, tensor: str) -> str | None:
        """The filter that gives it; None for the rest."""
        return next((part for part, _ in self.filters if part in tensor), None)

    def __str__(self) -> str:
        return ",".join([*(f"{part}={omega:g}" for part, omega in self.filters), f"{self.rest:g}"])


def parse_omega(text: str) -> Omega:
    """Read `0.4`, or `mlp=0.2,self_attn=0.6,0.4`, whose last bare number is for the rest.

    Raises: ArgumentError: no number, outside [0, 1], no bare number at the end.
    """
    *filtered, rest = text.split(",")
    if "=" in rest:
        raise ArgumentError(
            f"--omega: expected a number for the rest at the end, got {text!r}. Write for instance {text},1.0."
        )
    filters = []
    for entry in filtered:
        part, equals, number = entry.partition("=")
        if not equals or not part.strip():
            raise ArgumentError(
                f"--omega: expected FILTER=NUMBER before the last number, got {entry!r}. For several omegas use --omegas."
            )
        filters.append((part.strip(), _number("--omega", number)))
    return Omega(_number("--omega", rest), tuple(filters))


def parse_omegas(text: str) -> tuple[Omega, ...]:
    """Read `0,0.2,0.4`: a sweep, each with a checkpoint of its own. Raises ArgumentError: as above, or one named twice."""
    omegas = tuple(Omega(_number("--omegas", number)) for number in text.split(","))
    if len({str(omega) for omega in omegas}) < len(omegas):
        raise ArgumentError(f"--omegas: expected different numbers, got {text}.")
    return omegas


def _number(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentError(f"{flag}: expected a number in [0, 1], got {text!r}.") from None
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{flag}: expected a number in [0, 1], got {text}.")
    return number
