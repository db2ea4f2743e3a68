"""Inputs of several dtypes in one merge, and float8 weights with their scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from checkpoints.model import open_model
from checkpoints.reader import read_tensor
from tests.adapter_files import make_adapter, texts
from tests.in_memory import patch_grid
from tests.pico import Family, make_family, refusal_of
from tests.scene import call, names

BLOCK, RAGGED = [8, 16], [10, 20]  # which divide the sizes, and which do not
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("dtypes"), "llama", dtype=torch.float32, n_models=3)


def cast(source: Path, target: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def merged(folder: Path, base: Path, models: list[Path], *flags: object) -> dict[str, Tensor]:
    shutil.rmtree(folder, ignore_errors=True)
    inputs = ("--base_model", base, "--models_to_merge", names(models))
    call(merge, "--method=task_arithmetic", "--weights=0.5", *inputs, "--save_path", folder, "--report", "none", *flags)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_of_three_dtypes(family: Family, tmp_path: Path, stored: torch.dtype):
    """Each is read as it is stored; the sum is rounded once, to the base's dtype."""
    base = cast(family.base, tmp_path / "base", stored)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    models = [cast(folder, tmp_path / folder.name, dtype) for folder, dtype in zip(family.models, dtypes, strict=True)]
    found = merged(tmp_path / "out", base, models)
    inputs = [load_file(folder / "model.safetensors") for folder in (base, *models)]
    for name, tensor in found.items():
        start, *others = (one[name].double() for one in inputs)
        expected = start + 0.5 * sum(other - start for other in others)
        assert tensor.dtype == stored
        torch.testing.assert_close(tensor.double(), expected, rtol=torch.finfo(stored).eps, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- float8


def in_blocks(weight: Tensor, block: list[int]) -> tuple[Tensor, Tensor]:
    """A scale for each block: the weight over it, and the scales."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    quantised = torch.empty(weight.shape, dtype=FLOAT8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[where].abs().max() / 448
            quantised[where] = (weight[where] / scales[i, j]).to(FLOAT8)
    return quantised, scales


def by_scale(scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (weight / scale).to(FLOAT8), scale


KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "blocks": ("weight_scale_inv", {"quant_method": "fp8", "weight_block_size": BLOCK}, lambda w: in_blocks(w, BLOCK)),
    "ragged blocks": (
        "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": RAGGED}, lambda w: in_blocks(w, RAGGED),
    ),
    "tensor": (
        "weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"},
        lambda weight: by_scale(weight.abs().max() / 448, weight),
    ),
    "tensor of one": (
        "weight_scale", {"quant_method": "modelopt"}, lambda weight: by_scale((weight.abs().max() / 448)[None], weight),
    ),
    "channel": (
        "weight_scale", {"quant_method": "fbgemm_fp8"},
        lambda weight: by_scale(weight.abs().amax(1, keepdim=True).bfloat16() / 448, weight),
    ),
}  # fmt: skip


def quantise(source: Path, target: Path, kind: str) -> dict[str, Tensor]:
    """Write the linear layers of a model in float8; what they stand for, in float64."""
    suffix, config, split = KINDS[kind]
    shutil.copytree(source, target)
    stands_for, stored = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stands_for[name], stored[name] = tensor.bfloat16().double(), tensor.bfloat16()
        if "_proj" not in name:
            continue
        stored[name], scale = split(tensor.float())
        stored[name.removesuffix("weight") + suffix] = scale
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        spread = scale.double()
        if "weight_block_size" in config:
            rows, columns = config["weight_block_size"]
            spread = spread.repeat_interleave(rows, 0)[: len(tensor)]
            spread = spread.repeat_interleave(columns, 1)[:, : tensor.shape[1]]
        stands_for[name] = stored[name].double() * spread
    save_file({key: one.contiguous() for key, one in stored.items()}, target / "model.safetensors", {"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config, "dtype": "bfloat16"}))
    return stands_for


@pytest.mark.parametrize("kind", KINDS)
def test_float8_weights_are_the_numbers_they_stand_for(family: Family, tmp_path: Path, kind: str):
    expected = quantise(family.base, tmp_path / "base", kind)
    model = open_model(str(tmp_path / "base"))
    assert model.weights.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = read_tensor(model.weights, name)
        torch.testing.assert_close(found.double(), tensor, rtol=2**-23, atol=0)
        assert model.weights.tensors[name].plain_dtype == torch.bfloat16


def test_any_run_of_elements(family: Family, tmp_path: Path):
    quantise(family.base, tmp_path / "base", "ragged blocks")
    weights = open_model(str(tmp_path / "base")).weights
    name = "model.layers.0.mlp.down_proj.weight"
    whole = read_tensor(weights, name).flatten()
    for size in (1, 7, 48, 100, 500):
        buffer = torch.empty(8 * size, dtype=torch.uint8)
        for start in range(0, len(whole), size):
            stop = min(start + size, len(whole))
            assert torch.equal(weights.read(name, start, stop, buffer), whole[start:stop])


def test_float8_in_blocks_is_what_transformers_loads(family: Family, tmp_path: Path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    expected = quantise(family.base, tmp_path / "base", "blocks")
    wanted = FineGrainedFP8Config(dequantize=True, weight_block_size=tuple(BLOCK))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=wanted, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_float8_models(family: Family, tmp_path: Path, kind: str):
    """A quantised base and a quantised model with a plain one: the output is plain, and loads."""
    from transformers import AutoModelForCausalLM

    base = quantise(family.base, tmp_path / "base", kind)
    one = quantise(family.models[0], tmp_path / "one", kind)
    two = load_file(family.models[1] / "model.safetensors")
    found = merged(tmp_path / "out", tmp_path / "base", [tmp_path / "one", family.models[1]])
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = base[name] + 0.5 * (one[name] - base[name]) + 0.5 * (two[name].double() - base[name])
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-7)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    notes = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["notes"]
    assert notes == [
        f"{tmp_path / name}: its float8 weights are multiplied with their scales." for name in ("base", "one")
    ]
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def test_no_block_changes_a_bit(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quantise(family.base, tmp_path / "base", "ragged blocks")
    whole = merged(tmp_path / "out", tmp_path / "base", family.models)
    patch_grid(monkeypatch, 100)
    small = merged(tmp_path / "out", tmp_path / "base", family.models)
    assert all(torch.equal(small[name], tensor) for name, tensor in whole.items())


def test_relaxing_towards_a_float8_base(family: Family, tmp_path: Path):
    """The statistics are those of the numbers that it stands for; an adapter may lie on it, too."""
    expected = quantise(family.base, tmp_path / "base", "channel")
    plain = Path(shutil.copytree(family.base, tmp_path / "plain"))
    save_file({k: v.bfloat16() for k, v in expected.items()}, plain / "model.safetensors", {"format": "pt"})
    how = ["--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32", "--omega", "0.2"]
    found = []
    for number, base in enumerate((tmp_path / "base", plain)):
        names = ["--merged_model", family.models[0], "--pretrained_model_name", base]
        call(performAIM, *names, *how, "--calibration_dtype", "float32", "--save_path", tmp_path / f"out_{number}")
        found.append(load_file(tmp_path / f"out_{number}" / "model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=2**-6, atol=2**-10)
    adapter = make_adapter(tmp_path / "lora", plain, r=2, target_modules=["q_proj"])
    adapted = merged(tmp_path / "out", family.base, [Path(f"{tmp_path / 'base'}+{adapter}")])
    assert adapted["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- refusals


def spoilt(family: Family, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """What is said of a float8 model whose tensors are changed."""
    quantise(family.base, folder, "blocks")
    return refusal_of(folder, change)


SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"


def test_scales_that_do_not_fit(family: Family, tmp_path: Path):
    said = spoilt(family, tmp_path / "a", lambda tensors: tensors.pop(SCALE))
    assert f"{SCALE} beside it, got none. Use the unquantised model." in said
    said = spoilt(family, tmp_path / "b", lambda tensors: tensors.update({SCALE: torch.ones(5, 2)}))
    assert f"{SCALE}: expected scales for shape [48, 32], got [5, 2]." in said
    said = spoilt(family, tmp_path / "c", lambda tensors: tensors.update({SCALE: torch.ones(3)}))
    assert f"{SCALE}: expected scales for shape [48, 32], got [3]." in said
