"""The settings that a model is run with are those that were measured fastest, and measuring changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import forward.tuning
from checkpoints.process import WAITING, wait_passively
from forward.loading import load
from forward.tuning import Choice, choose, is_worth_timing, threads
from tests.aim_runs import calibrate_on, make_family, open_folder, random_tokens

TOKENS = random_tokens()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of a pico base model in bfloat16."""
    return cache(lambda name: make_family(tmp_path_factory.mktemp(name), name, n_models=0).base)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Choice], float]], list[Choice]]:
    """Have settings be as fast as a function says; gives what is asked."""

    def install(rate: Callable[[Choice], float]) -> list[Choice]:
        asked: list[Choice] = []

        def measure(self: object, choice: Choice) -> float:
            asked.append(choice)
            return rate(choice)

        monkeypatch.setattr(forward.tuning.Trial, "measure", measure)
        return asked

    return install


def test_each_setting_is_taken_where_it_is_clearly_faster(
    base_of: Callable[[str], Path], fastest: Callable[[Callable[[Choice], float]], list[Choice]]
) -> None:
    model = load(open_folder(base_of("llama")))
    start = Choice("bfloat16", 8)
    fastest(lambda one: 100.0 * (one.dtype == "float32") + 10 * (one.threads == 4) + 20 * one.batch_size + 1)
    best, rates = choose(model, TOKENS, start, dtype=True, batch=True)
    assert best == Choice("float32", 8, 4)  # 110 with 4 threads is not clearly more than 121
    assert rates[str(best)] == 181
    fastest(lambda one: 1.05 if one != start else 1.0)
    assert choose(model, TOKENS, start, dtype=True, batch=True)[0] == start
    fastest(lambda one: 2.0 if one.attention == "eager" else 1.0)
    assert choose(model, TOKENS, start, dtype=True, batch=True)[0].attention == "eager"
    asked = fastest(lambda one: 1.0)
    choose(model, TOKENS, Choice("float32", 1), dtype=True, batch=False)
    assert {one.dtype for one in asked} == {"float32"}  # never a coarser one
    assert {one.batch_size for one in asked} == {1}


def test_attention_with_capped_logits_is_not_tried_otherwise(
    base_of: Callable[[str], Path], fastest: Callable[[Callable[[Choice], float]], list[Choice]]
) -> None:
    asked = fastest(lambda one: 1.0)
    choose(load(open_folder(base_of("gemma2"))), TOKENS, Choice("bfloat16", 1), dtype=True, batch=True)
    assert {one.attention for one in asked} == {None}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral", "gpt2", "falcon"])
def test_measuring_leaves_the_model_as_it_was(architecture: str, base_of: Callable[[str], Path]) -> None:
    model = load(open_folder(base_of(architecture)))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    count, attention = torch.get_num_threads(), model.config._attn_implementation
    best, rates = choose(model, TOKENS, Choice("bfloat16", 2), dtype=True, batch=True)
    assert len(rates) >= 6
    assert all(rate > 0 for rate in rates.values())
    assert rates[str(best)] >= rates[str(Choice("bfloat16", 2))]
    assert all(
        torch.equal(one, before[name]) and one.dtype == before[name].dtype for name, one in model.state_dict().items()
    )
    assert (torch.get_num_threads(), model.config._attn_implementation) == (count, attention)


def test_a_choice_is_taken_recorded_and_equal_to_the_flags(
    base_of: Callable[[str], Path],
    fastest: Callable[[Callable[[Choice], float]], list[Choice]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = calibrate_on(base_of("gemma3"), TOKENS, dtype=None)
    assert (plain.calibration["dtype"], plain.calibration["batch_size"]) == ("bfloat16", 1)  # not worth timing
    monkeypatch.setattr(forward.tuning, "WORTH_FLOPS", 0.0)
    fastest(lambda one: 100.0 * (one.dtype == "float32") + 20 * one.batch_size)
    for mode in ("whole", "layerwise"):
        chosen = calibrate_on(base_of("gemma3"), TOKENS, dtype=None, mode=mode)
        assert (chosen.calibration["dtype"], chosen.calibration["batch_size"]) == ("float32", 4)
        named = calibrate_on(base_of("gemma3"), TOKENS, dtype="float32", batch_size=4, mode=mode)
        for name, one in named.statistics.items():
            assert torch.equal(chosen.statistics[name].mean_abs, one.mean_abs)
    asked = fastest(lambda one: 1.0)
    reference = calibrate_on(base_of("llama"), TOKENS, dtype=None, numerics="reference")
    assert (reference.calibration["dtype"], asked) == ("bfloat16", [])


def test_short_work_is_not_timed(base_of: Callable[[str], Path]) -> None:
    model = load(open_folder(base_of("llama")))
    size = sum(one.numel() for one in model.parameters())
    assert not is_worth_timing(model, 1000)
    assert is_worth_timing(model, int(forward.tuning.WORTH_FLOPS / size))


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with threads(before + 1):
            inside.append(torch.get_num_threads())
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    environment = {"HOME": "/root"}
    wait_passively(environment)
    assert environment == {"HOME": "/root", **WAITING}
    environment = {"OMP_WAIT_POLICY": "active"}
    wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "active"}
    program = "import os, sys\nfrom checkpoints.process import own_process\nwith own_process(): print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key not in WAITING}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "passive False\n"
