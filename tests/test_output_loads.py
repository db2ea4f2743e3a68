"""Every output loads as its config.json says, or is refused before a byte of it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from tests.pico import copy_tokenizer, make_family
from tests.scene import call

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 300, "max_position_embeddings": 128}  # fmt: skip
# In each a layer's number decides what it is made of.
BY_PLACE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "jamba": {
        "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "pad_token_id": 0,
    },
}  # fmt: skip


def make_model(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **BY_PLACE[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def stack(model: Path, out: Path, *ranges: tuple[int, int], code: int = 0) -> str:
    """Stack layers of a model; what the command says."""
    slices = [{"sources": [{"model": str(model), "layer_range": list(layers)}]} for layers in ranges]
    recipe = out.with_suffix(".json")
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    return call(merge, "--config", recipe, "--save_path", out, "--quiet", code=code).err


def loads_whole(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return not any(report.values())


@pytest.mark.parametrize("kind", BY_PLACE)
def test_layers_in_places_of_another_kind_are_refused(tmp_path: Path, kind: str):
    model = make_model(tmp_path / "model", kind)
    said = stack(model, tmp_path / "out", (0, 2), (0, 4), code=1)
    assert (
        f"the output would not load by its config.json, that of {model} with what changes: nothing would fill model.layers."
        in said
    )
    assert "; nothing would take model.layers." in said
    assert "A layer's place decides what it is made of there." in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_layers_in_places_of_their_kind_are_stacked(tmp_path: Path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    stack(model, tmp_path / "out", (0, 4), (2, 4))
    assert loads_whole(tmp_path / "out")
    family = make_family(tmp_path / "family", "llama", n_models=1)
    stack(family.base, tmp_path / "plain", (0, 2), (0, 2))
    assert loads_whole(tmp_path / "plain")


def test_a_class_that_is_not_known_is_noted(tmp_path: Path):
    family = make_family(tmp_path / "family", "llama", n_models=1)
    config = json.loads((family.base / "config.json").read_text()) | {"model_type": "unheard_of"}
    (family.base / "config.json").write_text(json.dumps(config))
    slices = [{"sources": [{"model": str(family.base), "layer_range": [0, 1]}]}]
    (tmp_path / "recipe.json").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    ended = call(merge, "--config", str(tmp_path / "recipe.json"), "--save_path", str(tmp_path / "out"))
    assert "note: whether the output loads by its config.json was not looked at: " in ended.err


def test_arithmetic_needs_no_class(tmp_path: Path):
    """Tensors whose names do not say that they are weights are merged like any other, or refused like any other."""
    family = make_family(tmp_path / "family", "llama", n_models=2)
    for position, folder in enumerate((family.base, *family.models)):
        config = json.loads((folder / "config.json").read_text()) | {
            "model_type": "unheard_of",
            "architectures": ["Unheard"],
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        tensors |= {
            "model.layers.0.mixer.A_log": torch.full((4,), float(position)),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 2.0),
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    argv = ["--method=task_arithmetic", f"--base_model={family.base}", f"--save_path={tmp_path / 'out'}", "--quiet"]
    call(merge, *argv, f"--models_to_merge={family.models[0]}:0.5,{family.models[1]}:0.25")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == load_file(family.base / "model.safetensors").keys()
    assert out["model.layers.0.mixer.A_log"].tolist() == [0.5 * 1 + 0.25 * 2] * 4
    assert out["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [2.0] * 4
    tensors = load_file(family.models[0] / "model.safetensors")
    del tensors["model.layers.0.mixer.A_log"]
    save_file(tensors, family.models[0] / "model.safetensors", {"format": "pt"})
    ended = call(merge, *argv, "--overwrite", f"--models_to_merge={family.models[0]}", code=1)
    assert (
        f"{family.models[0]}: model.layers.0.mixer.A_log: expected as in {family.base}, got no such tensor" in ended.err
    )
