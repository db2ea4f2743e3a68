"""Paired comparisons of merges by document: domains weigh the same, whatever their number of documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Losses = Mapping[str, Sequence[float]]
"""Domain -> a number for each document."""


@dataclass(frozen=True)
class Difference:
    """Of two merges, nats per answer token.

    Attributes:
        value: the mean over domains of the mean difference over documents.
        stderr: its standard error over documents; that of other trainings is not in it.
    """

    value: float
    stderr: float

    @property
    def p(self) -> float:
        """Two-sided, by the normal distribution; 1 where nothing differs."""
        return math.erfc(abs(self.value) / self.stderr / math.sqrt(2)) if self.stderr else float(not self.value)


def mean(losses: Losses) -> float:
    """The mean over domains of the mean over documents."""
    return sum(sum(values) / len(values) for values in losses.values()) / len(losses)


def difference(losses: Losses, other: Losses) -> Difference:
    """`losses` minus `other`, document by document."""
    pairs = {domain: [a - b for a, b in zip(losses[domain], other[domain], strict=True)] for domain in losses}
    variance = 0.0
    for values in pairs.values():
        centre = sum(values) / len(values)
        variance += sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values)
    return Difference(mean(pairs), math.sqrt(variance) / len(pairs))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values that hold for all comparisons together (Holm 1979): sorted, times the number of those left, never falling."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted
