"""Classes that nobody knows, and bases that are not whole: what is said, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.pico import make_family


def test_stacks_need_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Embeddings are known by their names, which is said; two models, so that it can be seen whose they are."""
    family = make_family(tmp_path / "family", "llama", n_models=2)
    for folder in family.models:
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
        (folder / "config.json").write_text(json.dumps(config))
    one, two = family.models
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]}]} for model in (one, two)]
    (tmp_path / "recipe.json").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    assert merge.main(["--config", str(tmp_path / "recipe.json"), "--save_path", str(tmp_path / "out")]) == 0
    assert (
        f"note: {one}: transformers does not know its class, so names tell what comes before the layers: model.embed_tokens.weight from the "
        "first slice, lm_head.weight, model.norm.weight from the last." in capsys.readouterr().err
    )
    out = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(model / "model.safetensors") for model in (one, two))
    for name, source in (
        ("model.embed_tokens.weight", first),
        ("model.norm.weight", second),
        ("lm_head.weight", second),
    ):
        assert torch.equal(out[name], source[name])
    assert torch.equal(out["model.layers.3.mlp.up_proj.weight"], second["model.layers.1.mlp.up_proj.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_base_that_is_not_whole_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All models lack a norm: the output would get random numbers there, as they do. A whole one is not spoken of."""
    family = make_family(tmp_path / "family", "llama", n_models=2)
    argv = [
        "--method=linear",
        f"--base_model={family.base}",
        f"--models_to_merge={family.models[0]},{family.models[1]}",
    ]
    assert merge.main([*argv, f"--save_path={tmp_path / 'whole'}"]) == 0
    assert "are not a whole" not in capsys.readouterr().err
    for folder in (family.base, *family.models):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.stray.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert merge.main([*argv, f"--save_path={tmp_path / 'out'}"]) == 0
    assert (
        f"warning: {family.base}: its files are not a whole LlamaForCausalLM, which config.json names: nothing would fill model.norm.weight; "
        "nothing would take model.stray.weight. The output loads as that does." in capsys.readouterr().err
    )


def test_widen_knows_embeddings_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    family = make_family(tmp_path / "family", "llama", n_models=2)
    for folder in (family.base, *family.models):
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
        (folder / "config.json").write_text(json.dumps(config))
    argv = ["--method=widen", f"--base_model={family.base}", f"--save_path={tmp_path / 'out'}"]
    assert merge.main([*argv, f"--models_to_merge={family.models[0]},{family.models[1]}"]) == 0
    assert (
        f"note: {family.base}: transformers does not know its class, so names tell what widen takes for embeddings: model.embed_tokens.weight."
        in capsys.readouterr().err
    )
