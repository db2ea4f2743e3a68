"""Models that are no plain decoders: encoders, sequence to sequence, vision and language. They merge; AIM says what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from tests.pico import copy_tokenizer
from tests.scene import call, names

TEXT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2}
T5 = {
    "vocab_size": 300,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": TEXT,
    "RobertaForSequenceClassification": TEXT,
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": {
        "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
    },
    "LlavaForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
        "vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 299,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8},
        "vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    },
}  # fmt: skip


def make_models(folder: Path, name: str) -> tuple[Path, list[Path]]:
    """A base and two fine-tunes of it, every weight changed."""
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**MODELS[name])).to(torch.bfloat16)
    made = []
    for target in ("base", "one", "two"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / target)
        copy_tokenizer(folder / target)
        made.append(folder / target)
    return made[0], made[1:]


def merge_half(folder: Path, base: Path, models: list[Path], *flags: object) -> dict[str, Tensor]:
    """The base and half of every change."""
    inputs = ("--base_model", base, "--models_to_merge", names(models))
    call(merge, "--method=task_arithmetic", "--weights=0.5", *inputs, "--save_path", folder / "out", *flags)
    return load_file(folder / "out" / "model.safetensors")


def check(found: Mapping[str, Tensor], base: Path, models: list[Path], merged: Callable[[str], bool]) -> None:
    start, *others = (load_file(path / "model.safetensors") for path in (base, *models))
    assert found.keys() == start.keys()
    for name, tensor in start.items():
        change = sum((other[name].float() - tensor.float() for other in others), torch.zeros(tensor.shape))
        expected = tensor.float() + 0.5 * change if merged(name) else tensor
        assert torch.equal(found[name], expected.to(tensor.dtype)) or torch.allclose(
            found[name].float(), expected.float(), rtol=2**-7, atol=2**-12
        ), name
        assert torch.equal(found[name], tensor) == (not merged(name) or not change.any()), name


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_merges(tmp_path: Path, name: str):
    import transformers

    base, models = make_models(tmp_path, name)
    check(merge_half(tmp_path, base, models), base, models, lambda tensor: True)
    loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded).__name__ == name


@pytest.mark.parametrize("name", [name for name in MODELS if "vision_config" in MODELS[name]])
def test_the_language_tower_alone(tmp_path: Path, name: str):
    """The rest comes from the base, and need not fit in the other models: one without it, one with another vision tower."""
    base, models = make_models(tmp_path, name)

    def of_language(tensor: str) -> bool:
        return "language_model" in tensor

    check(merge_half(tmp_path, base, models, "--only", "language_model"), base, models, of_language)
    tensors = load_file(models[0] / "model.safetensors")
    save_file({key: one for key, one in tensors.items() if of_language(key)}, models[0] / "model.safetensors")
    wider = {key: one if of_language(key) else one.repeat(2, *[1] * (one.ndim - 1)) for key, one in tensors.items()}
    save_file(wider, models[1] / "model.safetensors", {"format": "pt"})
    start = load_file(base / "model.safetensors")
    found = merge_half(tmp_path, base, models, "--only", "language_model", "--overwrite")
    assert all(torch.equal(found[key], one) != of_language(key) for key, one in start.items())
    names = ",".join(map(str, models))
    call(
        merge,
        "--method=linear",
        "--base_model",
        base,
        "--models_to_merge",
        names,
        "--save_path",
        tmp_path / "no",
        code=1,
    )


def test_an_expression_that_fits_nothing(tmp_path: Path):
    base, models = make_models(tmp_path, "BertForMaskedLM")
    flags = ("--method=linear", "--base_model", base, "--models_to_merge", models[0], "--save_path", tmp_path / "out")
    ended = call(merge, *flags, "--only", "language_model", code=2)
    assert "--only: 'language_model' is found in no tensor's name" in ended.err
    ended = call(merge, *flags, "--only", "(", code=2)
    assert "--only: expected a regular expression, got '('" in ended.err


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("Gemma3", "Llava"))])
def test_aim_says_what_it_cannot_calibrate(tmp_path: Path, name: str):
    base, models = make_models(tmp_path, name)
    ended = call(performAIM, "--pretrained_model_name", base, "--merged_model", models[0], "--save_path", tmp_path / "out",
        "--calibration_data", tmp_path / "texts.jsonl", code=1)  # fmt: skip
    said = ended.err
    assert (
        f"{base}: expected a causal language model, got {name}, which AIM cannot calibrate. Merge without AIM" in said
    )


def test_more_tokens_for_the_language_tower(tmp_path: Path):
    """The size of the vocabulary stands in `text_config`."""
    import transformers
    from transformers import AutoTokenizer

    name = "LlavaForConditionalGeneration"
    base, models = make_models(tmp_path, name)
    grown = getattr(transformers, name).from_pretrained(models[0])
    grown.resize_token_embeddings(301, mean_resizing=False)
    grown.save_pretrained(models[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(models[0])
    merge_half(tmp_path, base, models)
    loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.get_text_config().vocab_size == loaded.get_output_embeddings().weight.shape[0] == 301
