"""Task vectors that are alike and large: is the base the one that the models were fine-tuned from?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.pico import make_family
from tests.scene import Scene

ASKS = "The task vectors of all models are nearly the same and large: is BASE the base that they were fine-tuned from?"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, merge, {"--method": "task_arithmetic"})


def warnings(scene: Scene, base: Path, models: list[Path]) -> list[str]:
    """What a merge warns of, quiet or not, as its recipe says it too."""
    said = scene.merge(base, models, "--quiet").err
    found: list[str] = scene.recipe()["warnings"]
    assert said == "".join(f"warning: {one}\n" for one in found)
    return found


def moved(source: Path, target: Path, towards: Path, share: float) -> Path:
    """A model on the way from one to another, as an earlier checkpoint of the same run is."""
    shutil.copytree(source, target)
    start, end = (load_file(folder / "model.safetensors") for folder in (source, towards))
    between = {name: torch.lerp(one.float(), end[name].float(), share).to(one.dtype) for name, one in start.items()}
    save_file(between, target / "model.safetensors", {"format": "pt"})
    return target


def test_fine_tunes_of_another_base(scene: Scene, tmp_path: Path):
    family = make_family(tmp_path / "family", "llama", n_models=2)
    other = make_family(tmp_path / "other", "llama", n_models=1, seed=7).base
    asks = f"{ASKS.replace('BASE', str(other))} Name that one, or merge without a base (linear, slerp)."
    assert asks in warnings(scene, other, family.models)
    assert not any("fine-tuned from" in one for one in warnings(scene, other, family.models[:1]))
    assert not any("fine-tuned from" in one for one in warnings(scene, family.base, family.models))


def test_two_checkpoints_of_one_run_are_not_asked_about(scene: Scene, tmp_path: Path):
    """Alike, and near the base, as a fine-tune is."""
    family = make_family(tmp_path / "family", "llama", n_models=1, dtype=torch.float32, delta=0.05)
    earlier = moved(family.base, tmp_path / "earlier", family.models[0], 0.8)
    found = warnings(scene, family.base, [earlier, family.models[0]])
    report = scene.recipe()["report"]["all"]
    assert min(report["cosine"].values()) > 0.99
    assert max(report["relative_norm"].values()) < 0.1
    assert not any("fine-tuned from" in one for one in found)


def test_models_that_share_little_are_not_asked_about_however_large(scene: Scene, tmp_path: Path):
    family = make_family(tmp_path / "family", "llama", n_models=2, dtype=torch.float32, delta=0.5)
    found = warnings(scene, family.base, family.models)
    report = scene.recipe()["report"]["all"]
    assert min(report["relative_norm"].values()) > 0.1
    assert not any("fine-tuned from" in one for one in found)
