"""What a search is for: numbers of a candidate's losses on every document of every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import setting
from reports.bootstrap import Estimate, Verdicts, estimate, hv_gain_difference
from reports.hypervolume import hv_gain

Losses = Mapping[str, Sequence[float]]
"""Task -> the loss of each of its documents, nats per scored token, in the same order for every candidate."""
RESAMPLES = 4000
HYPERVOLUME = "hypervolume"


def mean_loss(losses: Losses) -> float:
    """The mean over tasks of the mean over documents: every task counts the same."""
    return float(np.mean([np.mean(values) for values in losses.values()]))


def worst_loss(losses: Losses) -> float:
    """The mean loss of the task that fares worst."""
    return float(max(np.mean(values) for values in losses.values()))


def probabilities(losses: Losses) -> dict[str, NDArray[np.float64]]:
    """Task -> of each document the geometric mean of its tokens' probabilities, in (0, 1]: a score as an accuracy is one."""
    return {task: np.exp(-np.asarray(values, float)) for task, values in losses.items()}


@dataclass(frozen=True)
class Goal:
    """One number to be made small, or large.

    Attributes:
        name: as a user types it.
        text: what it is, for people.
        is_gain: whether more is better.
    """

    name: str
    text: str
    is_gain: bool = False

    def value(self, losses: Losses, inputs: Sequence[Losses]) -> float:
        """Of a candidate.

        Args:
            losses: its.
            inputs: of the base and of every model, on the same documents.
        """
        if self.name == HYPERVOLUME:
            population = [[float(score.mean()) for score in probabilities(one).values()] for one in inputs]
            return hv_gain(population, [float(score.mean()) for score in probabilities(losses).values()])
        return _PLAIN[self.name](losses)

    def difference(self, losses: Losses, other: Losses, inputs: Sequence[Losses]) -> Estimate:
        """Of a candidate less that of another, and how sure: both on the same resampled documents (paired bootstrap)."""
        if self.name == HYPERVOLUME:
            model, rival, *population = (
                {task: Verdicts.of(score) for task, score in probabilities(one).items()}
                for one in (losses, other, *inputs)
            )
            return hv_gain_difference(model, rival, population, resamples=RESAMPLES)
        value = _PLAIN[self.name](losses) - _PLAIN[self.name](other)
        drawn = [_resampled(one) for one in (losses, other)]
        combine = np.mean if self.name == "loss" else np.max
        draws = combine(drawn[0], axis=0) - combine(drawn[1], axis=0)
        return estimate(value, np.asarray(draws, dtype=np.float64))

    def better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.is_gain else one < other


_PLAIN: dict[str, Callable[[Losses], float]] = {"loss": mean_loss, "worst": worst_loss}
GOALS = {
    "loss": Goal("loss", "mean loss over tasks, nats per token"),
    "worst": Goal("worst", "loss of the worst task, nats per token"),
    HYPERVOLUME: Goal(HYPERVOLUME, "hypervolume gain over the inputs, of mean probabilities per token", is_gain=True),
}


def _resampled(losses: Losses) -> NDArray[np.float64]:
    """Mean losses on resampled documents: `[tasks, resamples]`; the same documents in every call with as many of them."""
    rows = []
    for number, values in enumerate(losses.values()):
        generator = np.random.default_rng([0, number, len(values)])
        drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
        rows.append(np.asarray(values, float)[drawn].mean(axis=1))
    return np.stack(rows)


def read_goals(text: str) -> tuple[Goal, ...]:
    """The goals of `loss` or `loss,worst`. Raises ArgumentError: one that is none, or twice."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in GOALS:
            raise ArgumentError(f"{setting('goal')}: {unknown('goal', name, GOALS)}")
    if len(set(names)) < len(names):
        raise ArgumentError(f"{setting('goal')}: expected each goal once, got {text}. Leave one out.")
    return tuple(GOALS[name] for name in names)


def standing(goal: Goal, difference: Estimate) -> str:
    """What may be said of a difference, by twice its standard error: better, worse, or not distinguishable."""
    if difference.value == 0 or difference.doubtful or difference.stderr is None or math.isnan(difference.stderr):
        return "not distinguishable"
    return "better" if (difference.value > 0) == goal.is_gain else "worse"


def as_json(difference: Estimate) -> dict[str, Any]:
    """A difference for reports."""
    return {
        "value": difference.value,
        "stderr": difference.stderr,
        "interval_95": [difference.low, difference.high],
    }
