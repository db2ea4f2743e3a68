"""Safetensors files by themselves, without config.json: merged by their names, and what needs more is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate_model
import merge
import performAIM
from tests.adapter_files import texts
from tests.pico import Family, make_family
from tests.scene import call, names

NO_CONFIG = "is a file of tensors, merged by their names: the output has no config.json and no tokenizer."
NO_CLASS = (
    "expected a folder with config.json, got a file of tensors, of which nothing says how its model computes. Give the folder of the model, "
    "or merge by names alone: without AIM, methods that run models, slices, and settings of head or vocabulary."
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("files"), "llama", dtype=torch.float32, n_models=2)


def tensors_of(seed: int, **more: Tensor) -> dict[str, Tensor]:
    """Names of no class at all."""
    torch.manual_seed(seed)
    return {"down_blocks.0.conv.weight": torch.randn(4, 3, 2), "te/proj": torch.randn(5), "scale": torch.randn(()), **more}  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def run(folder: Path, base: Path, models: list[Path], *flags: object, code: int = 0) -> str:
    inputs = ("--base_model", base, "--models_to_merge", names(models))
    ended = call(merge, "--method=task_arithmetic", "--weights=0.5", *inputs, "--save_path", folder, *flags, code=code)
    return ended.out + ended.err


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A base and two models, beside a config.json that is none of theirs."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    return [
        write(tmp_path / "in" / f"{name}.safetensors", tensors_of(seed)) for seed, name in enumerate(("base", "a", "b"))
    ]


def test_files_merge_by_their_names(files: list[Path], tmp_path: Path):
    said = run(tmp_path / "out", files[0], files[1:])
    assert said.count(f"{files[0]}: {NO_CONFIG}") == 1
    found = load_file(tmp_path / "out" / "model.safetensors")
    base, *others = (load_file(file) for file in files)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, base[name] + sum(0.5 * (other[name] - base[name]) for other in others))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "merge_recipe.json", "model.safetensors"]  # fmt: skip
    # Found complete, verified, and made again from what it says of itself; with no base, and under a link of another name.
    assert "is complete already" in run(tmp_path / "out", files[0], files[1:])
    assert call(merge, "--verify", tmp_path / "out").code == 0
    call(merge, "--config", tmp_path / "out" / "merge_recipe.json", "--save_path", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    linked = tmp_path / "linked.safetensors"
    shutil.copy(files[2], tmp_path / "blob")
    linked.symlink_to(tmp_path / "blob")
    models = ", ".join(f"{{model: {path}, parameters: {{weight: {weight}}}}}" for path, weight in ((files[1], 0.25), (linked, 0.75)))  # fmt: skip
    (tmp_path / "linear.yml").write_text(f"merge_method: linear\nmodels: [{models}]\n")
    call(merge, "--config", tmp_path / "linear.yml", "--save_path", tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    torch.testing.assert_close(mean["te/proj"], 0.25 * others[0]["te/proj"] + 0.75 * others[1]["te/proj"])


def test_a_plan_says_so_and_writes_nothing(files: list[Path], tmp_path: Path):
    assert f"note: {files[0]}: {NO_CONFIG}" in run(tmp_path / "out", files[0], files[1:], "--dry_run")
    assert not (tmp_path / "out").exists()


def test_the_files_of_a_model_merge_as_the_model_does(family: Family, tmp_path: Path):
    """All of them files, or some: the numbers are the same, and a base with a config gives it."""
    own = [folder / "model.safetensors" for folder in (family.base, *family.models)]
    run(tmp_path / "folders", family.base, family.models)
    run(tmp_path / "files", own[0], own[1:])
    said = run(tmp_path / "mixed", family.base, own[1:])
    assert "is a file of tensors" not in said
    expected = load_file(tmp_path / "folders" / "model.safetensors")
    for name in ("files", "mixed"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (tmp_path / "mixed" / "config.json").read_bytes() == (tmp_path / "folders" / "config.json").read_bytes()
    assert not (tmp_path / "files" / "config.json").exists()
    said = run(tmp_path / "base", own[0], family.models)
    assert said.count(NO_CONFIG) == 1
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (
        tmp_path / "files" / "model.safetensors"
    ).read_bytes()


def test_what_does_not_fit(files: list[Path], tmp_path: Path):
    others = {
        "shape": tensors_of(1) | {"te/proj": torch.randn(6)},
        "missing": {"scale": torch.randn(())},
        "quantised": tensors_of(1) | {"down_blocks.0.conv.weight": torch.zeros(4, 3, 2, dtype=torch.int8)},
    }
    paths = {name: write(tmp_path / f"{name}.safetensors", tensors) for name, tensors in others.items()}
    assert "te/proj" in run(tmp_path / "out", files[0], [paths["shape"]], code=1)
    assert "down_blocks.0.conv.weight" in run(tmp_path / "out", files[0], [paths["missing"]], code=1)
    assert "got int8. Use the unquantised model." in run(tmp_path / "out", files[0], [paths["quantised"]], code=1)
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 20)
    said = run(tmp_path / "out", files[0], [tmp_path / "damaged.safetensors"], code=1)
    assert f"{tmp_path / 'damaged.safetensors'}: damaged.safetensors:" in said
    write(tmp_path / "empty.safetensors", {})
    said = run(tmp_path / "out", files[0], [tmp_path / "empty.safetensors"], code=1)
    assert f"{tmp_path / 'empty.safetensors'}: expected tensors, got none. Download it again." in said
    assert not (tmp_path / "out").exists()


def test_what_needs_a_class_is_refused(family: Family, files: list[Path], tmp_path: Path):
    base, model = family.base / "model.safetensors", family.models[0]
    calibration = ("--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0.2")
    aim = ("--merged_model", model, "--pretrained_model_name", base, *calibration, "--save_path", tmp_path / "out")
    said = call(performAIM, *aim, code=1).err
    assert said.count(f"{base}: {NO_CLASS}") == 1
    assert "problems:" not in said
    said = run(tmp_path / "out", base, [model], *calibration, code=1)
    assert said.count(NO_CLASS) == 1
    said = run(tmp_path / "out", base, [model], "--tie_word_embeddings", "no", code=1)
    assert said.count(NO_CLASS) == 1
    source = f"{{models: [{{model: {model}, layer_range: [0, 1]}}]}}".replace("models", "sources")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\nslices:\n- {source}\n")
    said = call(merge, "--config", recipe, "--save_path", tmp_path / "out", code=1).err
    assert said.count(NO_CLASS) == 1
    for flags in (("--tokenizer_source", "union"), ("--pad_to_multiple_of", "64")):
        said = run(tmp_path / "out", base, [model], *flags, code=2)
        assert f"{' '.join(flags)}: {base} is a file of tensors, which has no tokenizer. Leave it out." in said
    said = call(evaluate_model, "--model", files[0], "--save_path", tmp_path / "x.json", code=1).err
    assert f"{files[0]}: expected a folder, got a file. Give the folder it lies in" in said
    assert not (tmp_path / "out").exists()


def test_relaxing_a_file_towards_a_folder(family: Family, tmp_path: Path):
    """The base is what AIM runs: what is relaxed may be tensors alone."""
    how = ("--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0.2")
    found = []
    for number, model in enumerate((family.models[0], family.models[0] / "model.safetensors")):
        out = tmp_path / f"out{number}"
        call(performAIM, "--merged_model", model, "--pretrained_model_name", family.base, *how, "--save_path", out)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert NO_CONFIG in json.loads((tmp_path / "out1" / "merge_recipe.json").read_text())["notes"][0]
