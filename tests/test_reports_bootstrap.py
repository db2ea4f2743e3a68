"""The paired bootstrap: against every resample there is, against formulas, and that it is paired."""

from itertools import product

import numpy as np
import pytest

from reports import Verdicts, bootstrap
from reports.bootstrap import Estimate
from reports.hypervolume import hv_gain


def model(**scores):
    return {name: Verdicts.of(verdicts) for name, verdicts in scores.items()}


def random_model(seed, items=40, chance=0.5, names="abcdef"):
    draw = np.random.default_rng(seed)
    return {name: Verdicts.of(draw.random(items) < chance) for name in names}


def all_resamples(values):
    """The mean of every one of the n^n resamples."""
    return np.array([np.mean(chosen) for chosen in product(values, repeat=len(values))])


def test_against_every_resample():
    a, b = [1, 0, 1, 1], [1, 1, 0, 0]
    means = all_resamples(np.subtract(a, b))  # 256 resamples, paired
    found = bootstrap.mean_difference(model(x=a), model(x=b))
    assert found.value == 0.25
    assert found.stderr == pytest.approx(means.std(), rel=0.02)
    assert (found.low, found.high) == (np.quantile(means, 0.025), np.quantile(means, 0.975)) == (-0.5, 1.0)


def test_mean_over_benchmarks():
    """Benchmarks are resampled independently: variances add up, whatever their sizes."""
    a, b = model(x=[1, 0, 1, 1], y=[0, 1] * 50), model(x=[1, 1, 0, 0], y=[0] * 100)
    found = bootstrap.mean_difference(a, b)
    assert found.value == (0.25 + 0.5) / 2
    variance = all_resamples([0, -1, 1, 1]).var() + 0.25 / 100
    assert found.stderr == pytest.approx(np.sqrt(variance) / 2, rel=0.02)


def test_the_same_items_for_all_models():
    one = random_model(0)
    assert bootstrap.mean_difference(one, one) == Estimate(0.0, 0.0, 0.0, 0.0)
    alone = bootstrap.resample("a", [one["a"]], resamples=50)
    together = bootstrap.resample("a", [random_model(1)["a"], one["a"]], resamples=50)
    assert np.array_equal(alone[:, 0], together[:, 1])


def test_other_items_for_another_benchmark_or_seed():
    verdicts = [random_model(0)["a"]]
    drawn = [
        bootstrap.resample(name, verdicts, resamples=50, seed=seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_chunks_change_nothing(monkeypatch):
    verdicts = [random_model(0)["a"], random_model(1)["a"]]
    whole = bootstrap.resample("a", verdicts, resamples=101)
    monkeypatch.setattr(bootstrap, "CHUNK", 300)
    assert np.array_equal(bootstrap.resample("a", verdicts, resamples=101), whole)


def test_score_of_two_parts():
    """IFEval: the mean of the share of prompts and of the share of instructions, which prompts have different numbers of."""
    ifeval = Verdicts(np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 3.0]]), np.arange(2))
    assert ifeval.score == (1 / 2 + 3 / 5) / 2
    drawn = set(bootstrap.resample("ifeval", [ifeval], resamples=100)[:, 0].tolist())
    assert drawn == {1.0, (1 / 2 + 3 / 5) / 2, (0 + 2 / 6) / 2}


def test_hv_gain():
    one, population = random_model(0, chance=0.8), [random_model(1), random_model(2)]
    found = bootstrap.hv_gain(one, population, resamples=2000)
    scores = [[each[name].score for name in each] for each in (one, *population)]
    assert found.value == hv_gain(scores[1:], scores[0])
    drawn = bootstrap.resample_all([one, *population], resamples=2000)
    gains = np.array([hv_gain(draw[1:], draw[0]) for draw in drawn])
    assert found.stderr == gains.std(ddof=1)
    assert found.low == np.quantile(gains, 0.025) < found.value < found.high


def test_hv_gain_difference():
    one, other, population = random_model(0, chance=0.8), random_model(3, chance=0.7), [random_model(1)]
    found = bootstrap.hv_gain_difference(one, other, population, resamples=500)
    gains = [bootstrap.hv_gain(each, population, resamples=500).value for each in (one, other)]
    assert found.value == gains[0] - gains[1]
    assert bootstrap.hv_gain_difference(one, one, population, resamples=500) == Estimate(0.0, 0.0, 0.0, 0.0)
    reverse = bootstrap.hv_gain_difference(other, one, population, resamples=500)
    assert (reverse.value, reverse.low) == (-found.value, pytest.approx(-found.high))


def test_doubtful():
    assert [Estimate(value, 1.0).doubtful for value in (-2.0, -1.9, 0.0, 1.9, 2.0)] == [False, True, True, True, False]
    assert Estimate(0.0, 0.0).doubtful
    assert not Estimate(0.0).doubtful


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([model(a=[1, 0]), model(a=[1])], "a: expected verdicts of all models on the same items"),
        ([model(a=[1, 0]), model(b=[1, 0])], "expected the same benchmarks"),
        ([model(a=[])], "a: expected verdicts on at least one item"),
        ([{}], "expected the same benchmarks of all models, at least one"),
    ],
)
def test_refuses(models, says):
    with pytest.raises(ValueError, match=says):
        bootstrap.resample_all(models, resamples=10)
