"""How sure a difference is: the paired bootstrap over a benchmark's items.

    from reports import Verdicts, bootstrap

    a = {"gsm8k": Verdicts.of([1, 0, 1, 1]), "math": Verdicts.of([0, 0, 1])}   # one model: verdicts on the same items in the
    b = {"gsm8k": Verdicts.of([1, 0, 0, 1]), "math": Verdicts.of([0, 1, 1])}   # same order for every model
    bootstrap.mean_difference(a, b)          # Estimate(value, stderr, low, high)
    bootstrap.hv_gain(a, population=[b])

Every resample draws as many items as a benchmark has, with replacement, and the same ones for all models: what is hard for one
model is mostly hard for another, so that a difference is far surer than two independent standard errors say.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reports.hypervolume import hv_gains

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22
"""Draws of items at once."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What one model earned on the items of one benchmark.

        score = mean over parts of (sum over items of earned / sum over items of possible)

    An accuracy has one part, of which every item may earn 1. IFEval has two: prompts, 1 each, and their instructions.

    Attributes:
        earned, possible: `[items, parts]` float64.
        rows: `[items]`, which row of the benchmark's data each item is.
    """

    earned: Floats
    possible: Floats
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, scores: ArrayLike) -> Verdicts:
        """Of an accuracy: `[items]` in [0, 1], in the order of the rows."""
        earned = np.asarray(scores, float)[:, None]
        return cls(earned, np.ones_like(earned), np.arange(len(earned)))

    @property
    def score(self) -> float:
        """The benchmark's score, a fraction."""
        return float((self.earned.sum(axis=0) / self.possible.sum(axis=0)).mean())


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is: its standard error and the bounds of its 95 % interval, None where nothing is known."""

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def doubtful(self) -> bool:
        """Whether it is 0 or less than two standard errors from it."""
        return self.stderr is not None and (abs(self.value) < 2 * self.stderr or self.value == 0)


Model = Mapping[str, Verdicts]


def estimate(value: float, draws: Floats | None) -> Estimate:
    """The estimate that resampled values give: their standard deviation, and the percentiles of the interval."""
    if draws is None:
        return Estimate(value)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(draws.std(ddof=1)), float(low), float(high))


def resample(
    benchmark: str, verdicts: Sequence[Verdicts], *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Scores of models on resampled items of one benchmark.

    Args:
        benchmark: its name, which with the seed decides what is drawn: two calls draw the same items.
        verdicts: one for each model, all on the same rows.

    Returns: `[resamples, models]` fractions.
    Raises: ValueError: no verdicts, or on other rows.
    """
    if not verdicts or not len(verdicts[0].rows):
        raise ValueError(f"{benchmark}: expected verdicts on at least one item")
    if any(not np.array_equal(verdict.rows, verdicts[0].rows) for verdict in verdicts):
        raise ValueError(f"{benchmark}: expected verdicts of all models on the same items in the same order")
    items = len(verdicts[0].rows)
    earned = np.stack([verdict.earned for verdict in verdicts], axis=1)  # [items, models, parts]
    possible = np.stack([verdict.possible for verdict in verdicts], axis=1)
    generator = np.random.default_rng([seed, zlib.crc32(benchmark.encode())])
    scores = np.empty((resamples, len(verdicts)))
    for start in range(0, resamples, max(1, CHUNK // items)):
        stop = min(start + max(1, CHUNK // items), resamples)
        drawn = generator.integers(items, size=(stop - start, items)) + items * np.arange(stop - start)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        shares = (counts @ earned.reshape(items, -1)) / (counts @ possible.reshape(items, -1))
        scores[start:stop] = shares.reshape(stop - start, *earned.shape[1:]).mean(axis=2)
    return scores


def resample_all(models: Sequence[Model], *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """`resample` of every benchmark: `[resamples, models, benchmarks]`, in the order of the first model's benchmarks.

    Raises: ValueError: the models have other benchmarks, or verdicts on other rows.
    """
    names = list(models[0])
    if not names or any(set(model) != set(names) for model in models):
        raise ValueError("expected the same benchmarks of all models, at least one")
    draws = [resample(name, [model[name] for model in models], resamples=resamples, seed=seed) for name in names]
    return np.stack(draws, axis=2)


def mean_difference(model: Model, other: Model, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean score over benchmarks of one model minus that of another, as fractions. Raises ValueError as `resample_all`."""
    draws = resample_all([model, other], resamples=resamples, seed=seed).mean(axis=2)
    value = np.mean([model[name].score - other[name].score for name in model])
    return estimate(float(value), draws[:, 0] - draws[:, 1])


def hv_gain(model: Model, population: Sequence[Model], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Hypervolume gain of a model over a population (see `hypervolume.hv_gain`). Raises ValueError as `resample_all`."""
    return _hv_gain([model], population, resamples, seed)


def hv_gain_difference(
    model: Model, other: Model, population: Sequence[Model], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Hypervolume gain of one model minus that of another over the same population. Raises ValueError as `resample_all`."""
    return _hv_gain([model, other], population, resamples, seed)


def _hv_gain(models: Sequence[Model], population: Sequence[Model], resamples: int, seed: int) -> Estimate:
    """The first model's gain, less the second one's where there is one."""
    everyone = [*models, *population]
    drawn = resample_all(everyone, resamples=resamples, seed=seed)
    observed = np.array([[[model[name].score for name in models[0]] for model in everyone]])
    gains = [
        np.subtract.reduce([hv_gains(scores[:, len(models) :], scores[:, index]) for index in range(len(models))])
        for scores in (observed, drawn)
    ]
    return estimate(float(gains[0][0]), gains[1])
