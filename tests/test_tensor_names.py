"""Models whose tensors have other names than the base's: matched by the parameter that they become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge
import performAIM
from tests.adapter_files import texts, without_prefix
from tests.pico import make_family
from tests.scene import call


@pytest.mark.parametrize("short", ["base", "model", "merged"])
def test_a_prefix_that_one_of_them_lacks(tmp_path: Path, short: str):
    """GPT-2 as it was published has no `transformer.`; what comes out has the names of the model that gives the config."""
    family = make_family(tmp_path, "gpt2", n_models=2)
    base, models = family.base, family.models
    how = ["--method", "ties", "--density", "0.5", "--report", "none"]
    call(
        merge,
        *how,
        "--base_model",
        base,
        "--models_to_merge",
        f"{models[0]},{models[1]}",
        "--save_path",
        tmp_path / "merged",
    )
    calibration = ["--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0.2"]
    names = ["--merged_model", tmp_path / "merged", "--pretrained_model_name", base]
    call(performAIM, *names, *calibration, "--save_path", tmp_path / "relaxed")
    others = {name: tmp_path / name for name in ("merged", "relaxed")}
    if short == "base":
        base = without_prefix(base, tmp_path / "short")
    if short == "model":
        models = [without_prefix(models[0], tmp_path / "short"), models[1]]
    again = tmp_path / "again"
    call(merge, *how, "--base_model", base, "--models_to_merge", f"{models[0]},{models[1]}", "--save_path", again)
    merged = without_prefix(again, tmp_path / "short") if short == "merged" else tmp_path / "merged"
    names = ["--merged_model", merged, "--pretrained_model_name", base]
    call(performAIM, *names, *calibration, "--save_path", tmp_path / "relaxed_again")
    for ours, theirs in ((again, others["merged"]), (tmp_path / "relaxed_again", others["relaxed"])):
        expected = load_file(theirs / "model.safetensors")
        found = load_file(ours / "model.safetensors")
        is_short = (short, ours) in (("base", again), ("merged", tmp_path / "relaxed_again"))
        assert found.keys() == {name.removeprefix("transformer.") if is_short else name for name in expected}
        for name, tensor in expected.items():
            assert torch.equal(found[name.removeprefix("transformer.") if is_short else name], tensor), name
    notes = json.loads(
        ((again if short != "merged" else tmp_path / "relaxed_again") / "merge_recipe.json").read_text()
    )["notes"]
    assert any("tensors have other names there, such as" in note for note in notes)
