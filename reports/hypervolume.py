"""Hypervolume gain, the AIM paper's one number for a merge: how much it adds to what the models before it reached."""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

_HYPERVOLUME = moocore.Hypervolume(ref=0.0, maximise=True)


def hv_gain(population: ArrayLike, model: ArrayLike) -> float:
    """How much a model adds to the hypervolume of a population, as a length.

        gain = (HV(population and model) - HV(population)) ** (1 / benchmarks),  reference point 0

    Exactly 0 where a model of the population is at least as good on every benchmark: there the two volumes are equal, and the
    sixth root would make 0.002 of a rounding error of 1e-16.

    Args:
        population: `[models, benchmarks]` accuracies as fractions, at least one model.
        model: `[benchmarks]`, likewise.

    Raises: ValueError: shapes do not fit; a number outside [0, 1].
    Source: arXiv:2502.02421; the volume is moocore's.
    """
    return float(hv_gains(np.asarray(population, float)[None], np.asarray(model, float)[None])[0])


def hv_gains(populations: NDArray[np.float64], models: NDArray[np.float64]) -> NDArray[np.float64]:
    """`hv_gain` of many draws: `[draws, models, benchmarks]` and `[draws, benchmarks]` -> `[draws]`."""
    if populations.ndim != 3 or not populations.shape[1] or populations.shape[::2] != models.shape:
        raise ValueError(
            f"expected [draws, models, benchmarks] and [draws, benchmarks], got {populations.shape} and {models.shape}"
        )
    if not all(((array >= 0) & (array <= 1)).all() for array in (populations, models)):
        raise ValueError("expected accuracies as fractions in [0, 1]")
    adds = ~np.any(np.all(populations >= models[:, None], axis=2), axis=1)
    gains = np.zeros(len(models))
    both = np.concatenate([populations, models[:, None]], axis=1)
    gains[adds] = [_HYPERVOLUME(both[draw]) - _HYPERVOLUME(populations[draw]) for draw in np.flatnonzero(adds)]
    root: NDArray[np.float64] = np.maximum(gains, 0.0) ** (1 / models.shape[1])
    return root
