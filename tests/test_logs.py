"""--log_file and --allow_non_finite, through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
import performAIM
from tests.scene import call

INPUTS = Path(__file__).parent / "goldens" / "inputs"
MERGE = ["--method=task_arithmetic", "--base_model=in/base", "--models_to_merge=in/math,in/code", "--save_path=out"]
RELAX = ["--merged_model=in/math", "--pretrained_model_name=in/base", "--save_path=out"]
CALIBRATION = [f"--calibration_data={INPUTS / 'calib.jsonl.gz'}", "--n_samples=8", "--block_size=64"]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(INPUTS, tmp_path / "in")
    monkeypatch.chdir(tmp_path)


def log() -> list[dict]:
    return [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]


def spoil(model: str, value: float) -> None:
    path = Path("in", model, "model.safetensors")
    tensors = load_file(path)
    tensors[UP][3, 5] = value
    save_file(tensors, path, {"format": "pt"})


def test_the_log_of_a_merge():
    call(merge, *MERGE, "--log_file=run.jsonl", "--report=full")
    events = log()
    assert [event["event"] for event in events[:2]] == ["start", "plan"]
    assert events[0]["command"][:2] == ["python", "merge.py"]
    assert events[1]["recipe"]["merge_method"] == "task_arithmetic"
    tensors = [event for event in events if event["event"] == "tensor"]
    assert len(tensors) == events[1]["tensors"]
    base, math, merged = (load_file(f"{name}/model.safetensors")[UP].float() for name in ("in/base", "in/math", "out"))
    (seen,) = next(event["seen"] for event in tensors if event["name"] == UP)
    assert seen["sampled"] == base.numel()
    assert seen["base_norm"] == pytest.approx(float(base.norm()), rel=1e-4)
    assert seen["task_vector_norms"]["in/math"] == pytest.approx(float((math - base).norm()), rel=1e-4)
    assert seen["change_norm"] == pytest.approx(float((merged - base).norm()), rel=2e-2)
    assert all(event["seconds"] >= 0 for event in tensors)
    assert events[-1] | {"time": ""} == {"time": "", "event": "end", "result": "complete"}


def test_the_log_of_a_relaxation_and_of_a_failure():
    call(performAIM, *RELAX, *CALIBRATION, "--log_file=run.jsonl")
    events = log()
    seen = {event["name"]: event["seen"] for event in events if event["event"] == "tensor"}
    assert seen[UP][0]["relaxed_mean_change"] > 0
    assert seen["model.embed_tokens.weight"] == []
    call(performAIM, *RELAX, *CALIBRATION, "--log_file=run.jsonl", "--omega=0.1", code=2)
    end = log()[-1]
    assert end["event"] == "end"
    assert "not empty" in end["error"]
    assert len(log()) > len(events)  # a log is gone on with


def test_warnings_are_logged():
    shutil.copytree("in/base", "in/same")
    call(merge, *MERGE, "--models_to_merge=in/same", "--log_file=run.jsonl", "--quiet")
    warnings = [event["message"] for event in log() if event["event"] == "warning"]
    assert warnings == [
        "in/same equals the base: its task vector is zero throughout.",
        "All models equal the base, and so does the output.",
    ]


def test_a_log_that_cannot_be_written():
    ended = call(merge, *MERGE, "--log_file=nowhere/run.jsonl", code=2)
    assert "--log_file nowhere/run.jsonl: cannot be written: No such file" in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_let_through_where_asked(value):
    spoil("math", value)
    ended = call(merge, *MERGE, code=1)
    message = ended.err
    assert f"in/math: {UP}: element" in message
    assert "--allow_non_finite" in message
    ended = call(merge, *MERGE, "--allow_non_finite")
    assert f"warning: {UP}: 1 elements that are NaN or infinite were written." in ended.err
    merged = load_file("out/model.safetensors")
    assert not merged[UP][3, 5].isfinite()
    assert int((~merged[UP].isfinite()).sum()) == 1
    recipe = json.loads(Path("out/merge_recipe.json").read_text())
    assert recipe["warnings"] == [f"{UP}: 1 elements that are NaN or infinite were written."]


def test_overflow_is_let_through_where_asked():
    spoil("math", 60000.0)
    spoil("code", 60000.0)
    flags = [*MERGE, "--dtype=float16"]
    ended = call(merge, *flags, code=1)
    assert "is not finite in float16" in ended.err
    ended = call(merge, *flags, "--allow_non_finite", "--omega=1", *CALIBRATION)
    assert f"{UP}: 1 elements" in ended.err


def test_a_copied_tensor_that_is_not_finite():
    spoil("base", torch.nan)
    call(merge, *MERGE, f"--exclude={UP}", code=1)
    ended = call(merge, *MERGE, f"--exclude={UP}", "--allow_non_finite")
    assert f"warning: {UP}: 1 elements" in ended.err
