"""A pass layer by layer against a pass of the whole model, for every family of architectures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aim.activations import Activations
from checkpoints.errors import InputError
from forward.layers import find_layers
from forward.shelf import SMALL_BYTES, Shelf
from forward.steps import Steps
from tests.aim_runs import ARCHITECTURES, calibrate_on, make_family, random_tokens

TOKENS = random_tokens()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> the folder of a pico base model."""
    return cache(lambda name: make_family(tmp_path_factory.mktemp(name), name, n_models=0).base)


def check_equal(ours: Activations, expected: Activations, tolerance: float) -> None:
    """Raise AssertionError where statistics differ by more than rounding."""
    assert ours.statistics.keys() == expected.statistics.keys()
    assert (ours.silent, ours.input_dims) == (expected.silent, expected.input_dims)
    for name, one in expected.statistics.items():
        found = ours.statistics[name].tensors()
        for key, value in one.tensors().items():
            if key.endswith("tokens"):
                assert torch.equal(found[key], value), name
            elif key != "max_at":
                assert (found[key] - value).abs().max() <= tolerance * value.abs().max(), f"{name}.{key}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_by_layer_is_what_the_whole_model_does(architecture: str, base_of: Callable[[str], Path]) -> None:
    whole = calibrate_on(base_of(architecture), TOKENS, batch_size=3, mode="whole")
    layerwise = calibrate_on(base_of(architecture), TOKENS, batch_size=3, mode="layerwise")
    check_equal(layerwise, whole, 1e-6)
    assert (whole.calibration["mode"], layerwise.calibration["mode"]) == ("whole", "layerwise")
    assert layerwise.calibration["passes"] == 1


def test_in_the_checkpoints_dtype_too(base_of: Callable[[str], Path]) -> None:
    for architecture in ("llama", "gemma3"):
        modes = [
            calibrate_on(base_of(architecture), TOKENS, dtype="auto", mode=mode) for mode in ("whole", "layerwise")
        ]
        assert {one.calibration["dtype"] for one in modes} == {"bfloat16"}
        check_equal(*modes, tolerance=0)


def test_hidden_states_that_do_not_fit_wait_on_disk(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forward.shelf.SMALL_BYTES", 64)
    written = []
    put = Shelf.put

    def counted(self: Shelf, run: Any) -> None:
        put(self, run)
        written.append(len(self._away[id(run)]))

    monkeypatch.setattr(Shelf, "put", counted)
    whole = calibrate_on(base_of("llama"), TOKENS, mode="whole")
    check_equal(calibrate_on(base_of("llama"), TOKENS, mode="layerwise", max_memory=1), whole, 1e-6)
    assert written
    assert all(written)
    assert SMALL_BYTES > 64


def test_hidden_states_of_a_gpu_wait_in_the_machines_memory(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that is taken for another device: what waits has no numbers there, and comes back."""
    monkeypatch.setattr("forward.shelf.SMALL_BYTES", 64)
    monkeypatch.setattr("forward.shelf.is_elsewhere", lambda storage: True)
    emptied: list[bool] = []
    counts: list[int] = []
    put = Shelf.put

    def looked_at(self: Shelf, run: Any) -> None:
        put(self, run)
        emptied.append(
            all(storage.nbytes() == 0 for storage, _, _ in self._away[id(run)]) and bool(self._away[id(run)])
        )
        counts.append(len(self._away[id(run)]))
        assert self.is_in_memory

    monkeypatch.setattr(Shelf, "put", looked_at)
    whole = calibrate_on(base_of("gemma3"), TOKENS, mode="whole")
    check_equal(calibrate_on(base_of("gemma3"), TOKENS, mode="layerwise"), whole, 1e-6)
    assert emptied
    assert all(emptied)
    assert max(counts) > 1  # the embeddings too, which the model's forward holds on to until its end


def test_no_room_for_hidden_states_is_said_before_a_layer_is_read(
    base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forward.shelf.SMALL_BYTES", 64)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(
        InputError, match=r"calibration: the hidden states take 73,728 bytes, and there is room for 1 in"
    ):
        calibrate_on(base_of("llama"), TOKENS, mode="layerwise", max_memory=1)


def test_a_model_that_does_not_fit_is_run_layer_by_layer(base_of: Callable[[str], Path]) -> None:
    assert calibrate_on(base_of("llama"), TOKENS).calibration["mode"] == "whole"
    assert calibrate_on(base_of("llama"), TOKENS, max_memory=10_000).calibration["mode"] == "layerwise"


# The runs


class Loop(nn.Module):
    """Layers of which one is used twice, with an argument that an earlier one has left."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = input_ids.float()
        kept = self.layers[0](x)
        return self.layers[0](self.layers[1](kept)) + kept


def test_layers_may_be_used_again_and_what_they_left_be_kept() -> None:
    torch.manual_seed(0)
    model = Loop()
    inputs = [torch.randint(9, (2, 3)) for _ in range(3)]
    layers = [layer for _, layer in find_layers(model)]
    outputs: dict[int, Tensor] = {}
    model.register_forward_hook(
        lambda module, args, kwargs, output: outputs.update({id(kwargs["input_ids"]): output}), with_kwargs=True
    )
    before = threading.active_count()
    with Steps(model, layers) as steps:
        for one in inputs:
            steps.start(one)
        order = []
        while steps.runs[0].at is not None:
            order.append(steps.runs[0].at)
            for run in steps.runs:
                with torch.no_grad():
                    steps.step(run)
        assert order == [0, 1, 0]
        assert not steps.can_go_on  # the model holds what the first layer gave
    assert threading.active_count() == before
    assert "forward" not in vars(layers[0])
    for one in inputs:
        assert torch.equal(outputs[id(one)], model(input_ids=one))


def test_runs_that_are_left_half_way_end() -> None:
    model = Loop()
    layers = [layer for _, layer in find_layers(model)]
    before = threading.active_count()
    with Steps(model, layers) as steps:
        steps.start(torch.ones(2, 3))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_an_error_of_the_model_comes_out() -> None:
    model = Loop()
    layers = [layer for _, layer in find_layers(model)]
    with Steps(model, layers) as steps:
        run = steps.start(torch.ones(2, 4))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            steps.step(run)
