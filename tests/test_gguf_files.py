"""GGUF files as base or model: what transformers makes of them is merged, and the plan names where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merge
import performAIM
from checkpoints.model import open_model
from checkpoints.reader import read_tensor
from tests.adapter_files import texts
from tests.pico import Family, make_family
from tests.scene import call

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("gguf"), "llama", dtype=torch.float32, n_models=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, folder: Path, *, kind: str = "F32", leave_out: str = "-") -> Path:
    """A Llama checkpoint as llama.cpp stores it: other names, and the rows of queries and keys in pairs."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    tokens |= {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens[index] for index in sorted(tokens)])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if leave_out in name:
            continue
        for projection, count in heads.items():
            if projection in name:
                rows, columns = tensor.shape
                tensor = tensor.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        own = name
        for theirs, ours in NAMES.items():
            own = own.replace(theirs, ours)
        data = tensor.contiguous().numpy()
        if kind == "F32" or tensor.ndim == 1 or tensor.shape[1] % 32:
            writer.add_tensor(own, data)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(own, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(path: Path) -> dict[str, Tensor]:
    weights = open_model(str(path)).weights
    return {name: read_tensor(weights, name) for name in weights.tensors}


def run(out: Path, base: Path, model: Path, *flags: object, code: int = 0) -> str:
    named = ("--base_model", base, "--models_to_merge", model, "--save_path", out)
    ended = call(merge, "--method=task_arithmetic", "--weights=0.5", *named, *flags, code=code)
    return ended.out + ended.err


def test_plain_numbers_come_back(family: Family, tmp_path: Path):
    expected = load_file(family.base / "model.safetensors")
    found = decoded(write_gguf(tmp_path / "base.gguf", family.base))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_quantised_numbers_become_bfloat16(family: Family, tmp_path: Path):
    expected = load_file(family.base / "model.safetensors")
    found = decoded(write_gguf(tmp_path / "base.GGUF", family.base, kind="Q8_0"))
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), tensor, rtol=2**-6, atol=float(tensor.abs().max()) / 100)


def test_merging(family: Family, cache: Path, tmp_path: Path):
    """As base and as model, the merge is that of the folders; the plan names the checkpoint, and a run goes on without it."""
    files = [write_gguf(tmp_path / f"{folder.name}.gguf", folder) for folder in (family.base, family.models[0])]
    run(tmp_path / "expected", family.base, family.models[0])
    assert "GGUF tensors" not in run(tmp_path / "quiet", files[0], files[1], "--quiet", "--dry_run")
    shutil.rmtree(cache)
    plan = run(tmp_path / "out", files[0], files[1], "--dry_run")
    places = sorted((cache / "merge_aim" / "gguf").iterdir())
    assert len(places) == 2
    assert (
        f"note: {files[0]}: read by transformers, into the checkpoint {open_model(str(files[0])).folder}, which can be deleted"
        in plan
    )
    run(tmp_path / "out", files[0], files[1])
    out, expected = (tmp_path / name / "model.safetensors" for name in ("out", "expected"))
    found, wanted = load_file(out), load_file(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    text = "def f(x):\n    return 12 + x"
    ids = [
        AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        for folder in (tmp_path / "out", family.base)
    ]
    assert ids[0] == ids[1]
    shutil.rmtree(cache)
    assert "is complete already" in run(tmp_path / "out", files[0], files[1])
    assert sorted((cache / "merge_aim" / "gguf").iterdir()) == places


def test_relaxing_towards_a_gguf_base(family: Family, tmp_path: Path):
    base, model = write_gguf(tmp_path / "base.gguf", family.base), family.models[0]
    how = ("--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0")
    call(performAIM, "--merged_model", model, "--pretrained_model_name", base, *how, "--save_path", tmp_path / "out")
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", model))
    name = "model.layers.0.mlp.up_proj.weight"
    start = load_file(family.base / "model.safetensors")[name]
    # Of the busiest channel nothing of the change is left at omega 0, of all others a part.
    kept = (found[name] - start).norm(dim=0) / (before[name] - start).norm(dim=0)
    assert kept.min() == 0
    assert 0 < kept.max() < 1
    assert "read by transformers" in json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["notes"][0]


def test_what_cannot_be_read(family: Family, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    part = write_gguf(tmp_path / "part.gguf", family.base, leave_out="layers.1.mlp")
    for file, got in ((broken, ""), (part, "ValueError: no tensor for model.layers.1.mlp.down_proj.weight")):
        said = run(tmp_path / "out", family.base, file, code=1)
        assert f"{file}: expected a GGUF file of a language model that transformers reads, got {got}" in said
        assert "Give the model as it was before it was converted." in said
        assert not list((cache / "merge_aim" / "gguf").iterdir())
    monkeypatch.setattr("checkpoints.gguf_files.find_spec", lambda name: None)
    said = run(tmp_path / "out", family.base, part, code=1)
    assert f"{part}: expected the package gguf, which reads it, got none. Run: pip install 'gguf==0.19.0'." in said
    (tmp_path / "no").write_text("")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no"))
    said = run(tmp_path / "out", family.base, part, code=1)
    assert f"{part}: expected a folder for its checkpoint, got" in said
    assert not (tmp_path / "out").exists()
