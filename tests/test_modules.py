"""Weights and code beside the model: modules behind it are merged by the same method, Python files come along where they may run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from checkpoints.writer import CheckpointWriter
from tests.adapter_files import make_adapter
from tests.aim_runs import write_texts
from tests.fake_hub import FakeHub
from tests.pico import Family, add_code, make_family


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "family", "llama", n_models=2)


def run(family: Family, out: Path, *flags: str) -> int:
    names = ",".join(map(str, family.models))
    argv = ["--method=linear", "--base_model", str(family.base), "--models_to_merge", names, "--save_path", str(out)]
    return merge.main([*argv, *flags])


DENSE = "2_Dense/model.safetensors"


def add_modules(folder: Path, weight: Tensor, *, pickled: bool = False) -> None:
    """Make a model one of sentence-transformers': pooling, and a dense layer with this weight."""
    for part in ("1_Pooling", "2_Dense"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    (folder / "modules.json").write_text("[]")
    tensors = {"linear.weight": weight, "linear.bias": weight[0].clone()}
    if pickled:
        torch.save(tensors, folder / "2_Dense" / "pytorch_model.bin")
    else:
        save_file(tensors, folder / DENSE)


def test_weights_of_modules_are_merged_like_the_model_s(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the same method, into the same file, whatever format they came in; verified, described and recognised with the rest."""
    weights = [torch.randn(4, 8) for _ in range(3)]
    for number, (folder, weight) in enumerate(zip((family.base, *family.models), weights, strict=True)):
        add_modules(folder, weight, pickled=number < 2)
    expected = (weights[1] + weights[2]) / 2
    assert run(family, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "2_Dense" not in said
    out = load_file(tmp_path / "out" / DENSE)
    assert out.keys() == {"linear.weight", "linear.bias"}
    assert torch.allclose(out["linear.weight"], expected)
    assert torch.allclose(out["linear.bias"], expected[0])
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "2_Dense" / "pytorch_model.bin").exists()
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert recipe["outputs"].keys() == {"model.safetensors", DENSE}
    assert [DENSE in one["files"] for one in recipe["inputs"]] == [False, False, True]
    assert any("2_Dense" in layer for layer in recipe["report"]["layers"])
    # Verified with the rest: digest and numbers.
    assert merge.main(["--verify", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / DENSE).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    assert merge.main(["--verify", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out' / DENSE}: its bytes are not those that the run wrote." in capsys.readouterr().err
    # Filters, shards and dtypes are the model's.
    assert run(family, tmp_path / "one", "--exclude=^2_Dense/", "--max_shard_size=20kB", "--dtype=float16") == 0
    one = load_file(tmp_path / "one" / DENSE)
    assert torch.equal(one["linear.weight"], weights[0].half())
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not any("Dense" in name for name in index["weight_map"])
    assert merge.main(["--verify", str(tmp_path / "one")]) == 0


def test_modules_that_a_model_lacks_has_more_of_or_in_another_shape(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    add_modules(family.base, torch.eye(4))
    add_modules(family.models[0], torch.full((4, 4), 3.0))
    assert run(family, tmp_path / "lacking") == 0
    said = capsys.readouterr().err
    assert (
        said.count(f"note: {family.models[1]}: has no 2_Dense/; the weights there count as those of {family.base}.")
        == 1
    )
    out = load_file(tmp_path / "lacking" / DENSE)["linear.weight"]
    assert torch.equal(out, (torch.eye(4) + 3) / 2)
    # What only a model has is left out.
    (family.models[1] / "3_Dense").mkdir()
    save_file({"linear.weight": torch.eye(4)}, family.models[1] / "3_Dense" / "model.safetensors")
    assert run(family, tmp_path / "more") == 0
    assert f"note: {family.models[1]}: 3_Dense/ is left out, as {family.base} has none." in capsys.readouterr().err
    assert not (tmp_path / "more" / "3_Dense").exists()
    # Another shape, a tensor that is missing, one too many.
    other = {"linear.weight": torch.ones(2, 4), "more": torch.ones(1)}
    save_file(other, family.models[0] / DENSE)
    assert run(family, tmp_path / "unfit") == 1
    said = capsys.readouterr().err
    advice = "Give models fine-tuned from this base."
    one = family.models[0]
    assert f"{one}: 2_Dense/linear.weight: expected shape [4, 4] as in {family.base}, got [2, 4]. {advice}" in said
    assert f"{one}: 2_Dense/linear.bias: expected as in {family.base}, got no such tensor. {advice}" in said
    assert f"{one}: 2_Dense/more: expected no such tensor, as {family.base} has none, got one. {advice}" in said
    (family.models[0] / DENSE).write_bytes(b"no file of weights")
    assert run(family, tmp_path / "damaged") == 1
    assert f"{one}: {DENSE}: expected" in capsys.readouterr().err


def test_modules_in_an_aim_run_and_in_performaim(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Stay as merged, with the reason; an adapter's model has its base's."""
    for folder, weight in zip((family.base, *family.models), torch.randn(3, 4, 4), strict=True):
        add_modules(folder, weight)
    text = ["--calibration_data", str(write_texts(tmp_path)), "--n_samples=4", "--block_size=64"]
    assert run(family, tmp_path / "merged") == 0
    assert run(family, tmp_path / "together", "--omega=0.3", *text) == 0
    why = "2_Dense/linear.weight (outside of the model, which calibration runs)"
    assert f"1 x {why}" in capsys.readouterr().out
    argv = ["--pretrained_model_name", str(family.base), "--merged_model", str(tmp_path / "merged"), "--omega=0.3"]
    assert performAIM.main([*argv, "--save_path", str(tmp_path / "aim"), *text]) == 0
    assert f"1 x {why}" in capsys.readouterr().out
    folders = [tmp_path / name for name in ("merged", "together", "aim")]
    merged, together, relaxed = (load_file(folder / DENSE)["linear.weight"] for folder in folders)
    assert torch.equal(together, merged)
    assert torch.equal(relaxed, merged)
    assert merge.main(["--verify", str(tmp_path / "aim")]) == 0
    adapter = make_adapter(tmp_path / "lora", family.base, r=2, target_modules=["q_proj"])
    argv = ["--method=task_arithmetic", "--base_model", str(family.base), "--models_to_merge", str(adapter)]
    assert merge.main([*argv, "--save_path", str(tmp_path / "adapted"), "--quiet"]) == 0
    adapted, base = (load_file(folder / DENSE)["linear.weight"] for folder in (tmp_path / "adapted", family.base))
    assert torch.equal(adapted, base)


def test_an_interrupted_run_goes_on_with_modules(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Interrupted in the middle of a module's file: the same bytes, and what is there of it is not made again."""
    for folder, weight in zip((family.base, *family.models), torch.randn(3, 4, 4), strict=True):
        add_modules(folder, weight)
    assert run(family, tmp_path / "whole", "--quiet") == 0
    expected = (tmp_path / "whole" / DENSE).read_bytes()
    written: list[str] = []
    write = CheckpointWriter.write

    def fail_at_its_weight(self: CheckpointWriter, name: str, start: int, values: Tensor) -> None:
        if name == "2_Dense/linear.weight":
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, start, values)

    monkeypatch.setattr(CheckpointWriter, "write", fail_at_its_weight)
    assert run(family, tmp_path / "out", "--quiet", "--workers=1") == 130
    monkeypatch.setattr(
        CheckpointWriter, "write", lambda self, name, *rest: (written.append(name), write(self, name, *rest))[1]
    )
    before = len(written)
    assert "2_Dense/linear.bias" in written
    assert run(family, tmp_path / "out", "--quiet") == 0
    assert not set(written[:before]) & set(written[before:])
    assert (tmp_path / "out" / DENSE).read_bytes() == expected
    assert merge.main(["--verify", str(tmp_path / "out")]) == 0


def test_modules_from_the_hub(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A dry run reads their headers; a run fetches them with the other weights."""
    add_modules(family.base, torch.eye(4))
    add_modules(family.models[0], torch.full((4, 4), 3.0))
    with FakeHub({"org/base": family.base, "org/one": family.models[0]}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        argv = ["--method=linear", "--base_model", "org/base", "--models_to_merge", "org/one", "--quiet"]
        argv += ["--save_path", str(tmp_path / "out")]
        assert merge.main([*argv, "--dry_run"]) == 0
        assert not list((tmp_path / "cache").rglob("*/2_Dense/*.safetensors"))
        assert merge.main(argv) == 0
    assert torch.equal(load_file(tmp_path / "out" / DENSE)["linear.weight"], torch.full((4, 4), 3.0))


def test_code_from_the_hub_is_copied_where_it_may_run_and_missed_aloud_where_not(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    add_code(family)
    names = ("configuration_small.py", "modeling_small.py", "small_layers.py")
    with FakeHub({"org/base": family.base}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        argv = ["--method=linear", "--base_model", "org/base", "--models_to_merge", str(family.models[0])]
        assert merge.main([*argv, "--save_path", str(tmp_path / "without")]) == 0
        said = capsys.readouterr().err
        assert (
            "warning: org/base: config.json: expected the model's own code in configuration_small.py, modeling_small.py, got no such file, and "
            "the output does not load without. Add --trust_remote_code, which fetches it and lets it run, if you know and trust it."
            in said
        )
        assert not any((tmp_path / "without" / name).exists() for name in names)
        assert merge.main([*argv, "--save_path", str(tmp_path / "with"), "--trust_remote_code"]) == 0
        assert "the model's own code" not in capsys.readouterr().err
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (family.base / name).read_bytes()
