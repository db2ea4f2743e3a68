"""What a search is for: numbers of a candidate's losses on every document of every task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import setting
from evaluation.benchmarks import BENCHMARKS
from reports.bootstrap import Estimate, Verdicts, estimate, hv_gain_difference
from reports.hypervolume import hv_gain

Losses = Mapping[str, Sequence[float]]
"""Task -> the loss of each of its documents, nats per scored token, or under `accuracy:NAME` what each answer to a benchmark is
worth, in [0, 1]; in the same order for every candidate."""
RESAMPLES = 4000
ACCURACY = "accuracy:"
"""Begins the tasks that are items of a benchmark, and the goals that are one benchmark's accuracy."""


def losses_of(measured: Losses) -> Losses:
    """Of what was measured, the losses."""
    return {task: values for task, values in measured.items() if not task.startswith(ACCURACY)}


def accuracies_of(measured: Losses) -> Losses:
    """Of what was measured, what answers to benchmarks are worth, in [0, 1], by the benchmarks' names."""
    return {task.removeprefix(ACCURACY): values for task, values in measured.items() if task.startswith(ACCURACY)}


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
        combine: of the tasks' means: their mean, the largest, or the hypervolume gain.
        measures: losses of documents, or accuracies of benchmarks.
        benchmark: the one that counts; empty for all.
    """

    name: str
    text: str
    is_gain: bool = False
    combine: Literal["mean", "max", "hypervolume"] = "mean"
    measures: Literal["losses", "accuracies"] = "losses"
    benchmark: str = ""

    def value(self, measured: Losses, inputs: Sequence[Losses]) -> float:
        """Of a candidate.

        Args:
            measured: of it.
            inputs: of the base and of every model, on the same documents and items.
        """
        if self.combine == "hypervolume":
            population = [[float(score.mean()) for score in self._scores(one).values()] for one in inputs]
            return hv_gain(population, [float(score.mean()) for score in self._scores(measured).values()])
        means = [np.mean(values) for values in self._part(measured).values()]
        return float(np.mean(means) if self.combine == "mean" else np.max(means))

    def difference(self, measured: Losses, other: Losses, inputs: Sequence[Losses]) -> Estimate:
        """Of a candidate less that of another, and how sure: both on the same resampled documents (paired bootstrap)."""
        if self.combine == "hypervolume":
            model, rival, *population = (
                {task: Verdicts.of(score) for task, score in self._scores(one).items()}
                for one in (measured, other, *inputs)
            )
            return hv_gain_difference(model, rival, population, resamples=RESAMPLES)
        value = self.value(measured, ()) - self.value(other, ())
        drawn = [_resampled(self._part(one)) for one in (measured, other)]
        combine = np.mean if self.combine == "mean" else np.max
        draws = combine(drawn[0], axis=0) - combine(drawn[1], axis=0)
        return estimate(value, np.asarray(draws, dtype=np.float64))

    def better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.is_gain else one < other

    @property
    def of_inputs(self) -> Goal:
        """What inputs are compared by: the same, or the mean where all inputs' gain over the inputs is none."""
        return GOALS["loss" if self.measures == "losses" else "accuracy"] if self.combine == "hypervolume" else self

    def _part(self, measured: Losses) -> Losses:
        """What counts."""
        if self.measures == "losses":
            return losses_of(measured)
        found = accuracies_of(measured)
        return {self.benchmark: found[self.benchmark]} if self.benchmark else found

    def _scores(self, measured: Losses) -> dict[str, NDArray[np.float64]]:
        """Task -> a score of each document or item, in [0, 1]."""
        part = self._part(measured)
        if self.measures == "losses":
            return probabilities(part)
        return {task: np.asarray(values, float) for task, values in part.items()}


GOALS = {
    goal.name: goal
    for goal in (
        Goal("loss", "mean loss over tasks, nats per token"),
        Goal("worst", "loss of the worst task, nats per token", combine="max"),
        Goal(
            "hypervolume",
            "hypervolume gain over the inputs, of mean probabilities per token",
            is_gain=True,
            combine="hypervolume",
        ),
        Goal("accuracy", "mean accuracy over benchmarks", is_gain=True, measures="accuracies"),
        Goal(
            "accuracy_hypervolume",
            "hypervolume gain over the inputs, of accuracies of benchmarks",
            is_gain=True,
            combine="hypervolume",
            measures="accuracies",
        ),
    )
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
    """The goals of `loss`, `loss,worst` or `accuracy:gsm8k`. Raises ArgumentError: one that is none, or twice."""
    names = [part.strip() for part in text.split(",")]
    goals = []
    for name in names:
        benchmark = name.removeprefix(ACCURACY)
        if name.startswith(ACCURACY) and benchmark in BENCHMARKS:
            goals.append(Goal(name, f"accuracy of {benchmark}", is_gain=True, measures="accuracies", benchmark=benchmark))  # fmt: skip
        elif name.startswith(ACCURACY):
            raise ArgumentError(f"{setting('goal')}: {unknown('benchmark', benchmark, BENCHMARKS)}")
        elif name not in GOALS:
            raise ArgumentError(f"{setting('goal')}: {unknown('goal', name, GOALS)}")
        else:
            goals.append(GOALS[name])
    if len(set(names)) < len(names):
        raise ArgumentError(f"{setting('goal')}: expected each goal once, got {text}. Leave one out.")
    return tuple(goals)


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
