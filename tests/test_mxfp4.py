"""MXFP4 weights of gpt-oss: their values by hand, as transformers decodes them, merged, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from checkpoints.model import open_model
from checkpoints.mxfp4 import Mxfp4Weights
from checkpoints.reader import open_checkpoint, read_tensor
from tests.adapter_files import texts
from tests.in_memory import patch_grid
from tests.pico import VOCABULARY, copy_tokenizer, refusal_of
from tests.scene import call

QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GATE = "model.layers.1.mlp.experts.gate_up_proj"


def make_gpt_oss(folder: Path, seed: int, *, packed: bool) -> Path:
    """A tiny gpt-oss of random weights; with `packed`, its experts are random MXFP4 numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)
    if packed:
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(115, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, "quantization_config": QUANTISED}))
    return folder


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model as it is read here."""
    weights = open_model(str(folder)).weights
    return {name: read_tensor(weights, name) for name in weights.tensors}


def write(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_values_by_hand(tmp_path: Path):
    """One expert of two rows and 32 columns: every code in the first row, low four bits first, and two factors."""
    codes = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x20, 0, 0, 0, 0, 0, 0, 0x60]
    blocks = torch.tensor([codes, [0x07] + [0] * 15], dtype=torch.uint8).view(1, 2, 1, 16)
    scales = torch.tensor([128, 0], dtype=torch.uint8).view(1, 2, 1)
    weights = Mxfp4Weights(open_checkpoint(write(tmp_path / "m", w_blocks=blocks, w_scales=scales), "m"))
    found = read_tensor(weights, "w")
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, 32, 2)
    first = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6, 0, 1] + [0] * 13 + [4]
    assert found[0, :, 0].tolist() == [2 * value for value in first]
    assert found[0, :, 1].tolist() == [6 * 2.0**-127] + [0] * 31
    assert torch.signbit(found[0, 8, 0])


def test_any_run_of_elements(tmp_path: Path):
    weights = open_model(str(make_gpt_oss(tmp_path / "m", 0, packed=True))).weights
    whole = read_tensor(weights, GATE).flatten()
    for size in (1, 127, 128, 1000, 5000, 12288):
        buffer = torch.empty(8 * size, dtype=torch.uint8)
        for start in range(0, len(whole), size if size > 1 else 97):
            stop = min(start + size, len(whole))
            assert torch.equal(weights.read(GATE, start, stop, buffer), whole[start:stop])


def test_it_is_what_transformers_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    folder = make_gpt_oss(tmp_path / "m", 0, packed=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    expected, found = theirs.state_dict(), decoded(folder)
    assert found.keys() == expected.keys()
    assert found[GATE].shape == (3, 32, 128)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def merged(out: Path, base: Path, models: list[Path]) -> dict[str, Tensor]:
    named = ["--base_model", base, "--models_to_merge", ",".join(map(str, models))]
    call(merge, "--method=task_arithmetic", "--weights=0.5", *named, "--save_path", out, "--report", "none")
    return load_file(out / "model.safetensors")


def test_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A packed base and a packed model with a plain one: the output is plain bfloat16, loads, and no block changes a bit."""
    from transformers import AutoModelForCausalLM

    base, one, two = (
        make_gpt_oss(tmp_path / name, seed, packed=packed) for seed, name, packed in ((0, "base", True), (1, "one", True), (2, "two", False))
    )  # fmt: skip
    found = merged(tmp_path / "out", base, [one, two])
    start, *others = (decoded(folder) for folder in (base, one, two))
    assert found.keys() == start.keys() == others[1].keys()
    for name, tensor in found.items():
        expected = start[name].double() + sum(0.5 * (other[name].double() - start[name]) for other in others)
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    notes = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["notes"]
    assert notes == [
        f"{folder}: its MXFP4 weights are decoded to bfloat16, as loading without kernels for them does."
        for folder in (base, one)
    ]
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    patch_grid(monkeypatch, 100)
    small = merged(tmp_path / "small", base, [one, two])
    assert all(torch.equal(small[name], tensor) for name, tensor in found.items())


def test_relaxing_towards_a_packed_base(tmp_path: Path):
    """The base's experts are those numbers when it is run, too."""
    packed = make_gpt_oss(tmp_path / "packed", 0, packed=True)
    plain, model = make_gpt_oss(tmp_path / "plain", 0, packed=False), make_gpt_oss(tmp_path / "model", 1, packed=False)
    save_file(decoded(packed), plain / "model.safetensors", {"format": "pt"})
    how = ["--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0.2"]
    found = []
    for number, base in enumerate((packed, plain)):
        call(performAIM, "--merged_model", model, "--pretrained_model_name", base, *how, "--calibration_dtype", "float32", "--save_path", tmp_path / f"o{number}")  # fmt: skip
        found.append(load_file(tmp_path / f"o{number}" / "model.safetensors"))
    before = load_file(model / "model.safetensors")
    assert not torch.equal(found[0][GATE], before[GATE])
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def spoilt(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """What is said of a packed model whose tensors are changed."""
    make_gpt_oss(folder, 0, packed=True)
    return refusal_of(folder, change)


def test_scales_that_do_not_fit(tmp_path: Path):
    said = spoilt(tmp_path / "a", lambda tensors: tensors.pop(f"{GATE}_scales"))
    assert (
        said
        == f"{tmp_path / 'a'}: {GATE}_blocks: expected {GATE}_scales beside it, got none. Use the unquantised model."
    )
    said = spoilt(
        tmp_path / "b", lambda tensors: tensors.update({f"{GATE}_scales": torch.zeros(3, 128, 2, dtype=torch.uint8)})
    )
    assert (
        said
        == f"{tmp_path / 'b'}: {GATE}_blocks: expected shape [experts, rows, groups, 16] and uint8 scales [experts, rows, groups], "
        "got [3, 128, 1, 16] and [3, 128, 2]. Use the unquantised model."
    )
    said = spoilt(tmp_path / "c", lambda tensors: tensors.update({GATE: torch.zeros(3, 32, 128)}))
    assert (
        said
        == f"{tmp_path / 'c'}: {GATE}: expected it once, got it as {GATE} and as {GATE}_blocks. Remove one of them."
    )
