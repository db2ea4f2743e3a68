"""What lies beside the weights comes along: files of tokenizers and code that no list names, and modules behind the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import merge
from tests.fake_hub import FakeHub
from tests.pico import Family, add_code, make_family
from tests.scene import Scene, call, names


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "family", "llama", n_models=2)


@pytest.fixture
def scene(family: Family, tmp_path: Path) -> Scene:
    models = {"--base_model": family.base, "--models_to_merge": names(family.models)}
    return Scene(tmp_path, merge, {"--method": "linear", **models})


def test_files_that_no_list_names_are_copied_and_the_rest_is_listed_once(scene: Scene, family: Family):
    copied = {
        "tekken.json": "{}",
        "small_layers.py": "x = 1\n",
        "video_preprocessor_config.json": "{}",
        "assets/logo.svg": "<svg/>",
    }
    left_out = [
        "checkpoint-9/trainer_state.json",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "optimizer.pt",
        "scheduler.pt",
    ]
    for name in (*copied, *left_out):
        (family.base / name).parent.mkdir(exist_ok=True)
        (family.base / name).write_text(copied.get(name, "no copy"))
    said = scene.run().err
    assert (
        said.count(f"note: {family.base}: files of its folder that the output does not get: {', '.join(left_out)}.")
        == 1
    )
    for name, text in copied.items():
        assert (scene.out / name).read_text() == text
    assert not any((scene.out / name).exists() for name in left_out)
    recipe = scene.recipe()
    assert set(copied) <= recipe["side_files"].keys()
    call(merge, "--verify", scene.out)


def test_code_of_a_model_with_its_helpers_loads(scene: Scene, family: Family):
    """A class whose file imports another one."""
    from transformers import AutoModelForCausalLM

    add_code(family)
    scene.run("--trust_remote_code", "--quiet")
    loaded = AutoModelForCausalLM.from_pretrained(scene.out, trust_remote_code=True)
    assert type(loaded).__name__ == "SmallForCausalLM"


def test_the_same_files_come_from_the_hub(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (family.base / "tekken.json").write_text("{}")
    (family.base / "1_Pooling").mkdir()
    (family.base / "1_Pooling" / "config.json").write_text("{}")
    shutil.copytree(family.base, tmp_path / "repo")
    (tmp_path / "repo" / "optimizer.pt").write_text("not downloaded")
    with FakeHub({"org/base": tmp_path / "repo"}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        argv = ["--method=linear", "--base_model", "org/base", "--models_to_merge", str(family.models[0])]
        call(merge, *argv, "--save_path", str(tmp_path / "out"), "--quiet")
        assert not any("optimizer" in str(request) for request in hub.requests)
    assert (tmp_path / "out" / "tekken.json").is_file()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
