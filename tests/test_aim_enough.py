"""When the text of a calibration is enough: both halves say the same, and all of it where they do not or nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aim.enough
from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData, TokenBlocks
from aim.enough import Enough, first_check
from aim.watcher import Target, Watcher
from checkpoints.errors import ArgumentError
from tests.aim_runs import calibrate_on, make_family, open_folder, random_tokens


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of a pico base model."""
    return cache(lambda name: make_family(tmp_path_factory.mktemp(name), name, n_models=0).base)


def watcher() -> tuple[Watcher, nn.Module]:
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    return Watcher(model, {"w": Target("0.weight", (0, 1), (3, 2))}), model


def feed(enough: Enough, ours: Watcher, model: nn.Module, blocks: list[list[float]]) -> list[bool]:
    """Run blocks of one row each; what `at` said after each."""
    said = []
    with ours.watching(), torch.no_grad():
        for done, row in enumerate(blocks, 1):
            model(torch.tensor([row], dtype=torch.float32))
            said.append(enough.at(done))
    return said


def test_blocks_after_which_is_looked() -> None:
    ours, _ = watcher()
    assert Enough(ours, 0.02, 512, 93).checks == [4, 8, 16, 32, 64]
    assert Enough(ours, 0.02, 1000, 7).checks == [4]
    assert Enough(ours, 0.02, 3000, 7).checks == [2, 4]
    assert Enough(ours, 0.02, 2048, 7).checks == [2, 4]
    batches = [(one.start, one.stop) for one in Enough(ours, 0.02, 512, 21).batches(0, 3)]
    assert batches == [(0, 2), (2, 4), (4, 7), (7, 8), (8, 11), (11, 14), (14, 16), (16, 19), (19, 21)]
    assert list(Enough(ours, 0.02, 512, 21).passes(4)) == [(4, 8), (8, 16), (16, 21)]
    assert list(Enough(ours, 0.0, 512, 21).passes(0)) == [(0, 21)]


def test_difference_by_hand() -> None:
    """Halves of one block: s is (1, .5) and (.25, 1), so |difference| is (.75, .5)."""
    ours, model = watcher()
    enough = Enough(ours, 0.02, 1024, 2)
    assert feed(enough, ours, model, [[4, 2], [-1, -4]]) == [False, False]
    assert enough.difference == pytest.approx((0.75 + 0.5) / 2)
    ours, model = watcher()
    enough = Enough(ours, 0.2, 1024, 4)
    # Sums of the first half: (5, 6), s (5/6, 1); of the second: (6, 6), s (1, 1). The difference is (1/6, 0).
    assert feed(enough, ours, model, [[4, 2], [-1, -4], [3, 3], [3, -3]]) == [False, False, False, True]
    assert enough.difference == pytest.approx(1 / 12)
    assert enough.as_json() == {"tolerance": 0.2, "difference": 0.08333}


def test_calibration_stops_and_says_so(base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aim.enough, "FIRST_CHECK", 128)
    tokens = random_tokens(blocks=16, block_size=32)
    every = calibrate_on(base_of("llama"), tokens, tolerance=0)
    assert (every.calibration["tokens"], every.calibration["difference"]) == (512, None)
    stopped = calibrate_on(base_of("llama"), tokens, tolerance=0.2)
    assert stopped.calibration["tokens"] == 128
    assert 0 < stopped.calibration["difference"] < 0.2
    expected = calibrate_on(base_of("llama"), tokens[:4], tolerance=0)
    for name, one in expected.statistics.items():
        assert torch.equal(stopped.statistics[name].tokens, one.tokens)
        torch.testing.assert_close(stopped.statistics[name].mean_abs, one.mean_abs, rtol=1e-6, atol=0)
    never = calibrate_on(base_of("llama"), tokens, tolerance=1e-6)
    assert never.calibration["tokens"] == 512
    assert never.calibration["difference"] > 1e-6
    layerwise = calibrate_on(base_of("llama"), tokens, tolerance=0.2, mode="layerwise")
    assert (layerwise.calibration["tokens"], layerwise.calibration["passes"]) == (128, 2)
    assert layerwise.calibration["difference"] == pytest.approx(stopped.calibration["difference"], abs=1e-4)


def test_text_shorter_than_the_first_check_is_said(base_of: Callable[[str], Path]) -> None:
    tokens = random_tokens(blocks=4, block_size=32)
    for tolerance, count in ((None, 1), (0.0, 0)):
        notes: list[str] = []
        data = CalibrationData("given blocks", block_size=32)
        options = CalibrationOptions(dtype="float32", tolerance=tolerance)
        found = calibrate(open_folder(base_of("llama")), data, options, blocks=TokenBlocks(tokens, 4, 0, 0, 0), note=notes.append)  # fmt: skip
        assert (found.calibration["tokens"], found.calibration["difference"]) == (128, None)
        assert len(notes) == count
    assert first_check(32) * 32 == 2048


def test_an_expert_that_only_one_half_of_the_text_reaches_is_not_settled(base_of: Callable[[str], Path]) -> None:
    ours, model = watcher()
    enough = Enough(ours, 0.02, 1024, 2)
    assert feed(enough, ours, model, [[0, 0], [1, 1]]) == [False, False]
    assert enough.difference == 1.0


def test_going_on_with_the_sums_of_the_first_half() -> None:
    rows: list[list[float]] = [[4, 2], [-1, -4], [3, 3], [3, -3]]
    ours, model = watcher()
    first = Enough(ours, 0.2, 1024, 4)
    feed(first, ours, model, rows[:2])
    again, model = watcher()
    second = Enough(again, 0.2, 1024, 4)
    kept: dict[str, Tensor] = first.sums()
    second.restore(kept)
    with again.watching(), torch.no_grad():
        for row in rows[2:]:
            model(torch.tensor([row], dtype=torch.float32))
    assert second.at(4)
    assert second.difference == pytest.approx(1 / 12)


def test_the_tolerance_of_options() -> None:
    assert CalibrationOptions().stops_at == 0.02
    assert CalibrationOptions(numerics="reference").stops_at == 0
    assert CalibrationOptions(tolerance=0).stops_at == 0
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ArgumentError, match="tolerance: expected a number from 0 to below 1"):
            CalibrationOptions(tolerance=wrong)
    with pytest.raises(ArgumentError, match="tolerance: numerics reference runs all of the text"):
        CalibrationOptions(tolerance=0.1, numerics="reference")
