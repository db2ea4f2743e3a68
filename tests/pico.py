"""Pico models: families of random checkpoints small enough to build inside a test, and odd checkpoints made by hand.

    family = make_family(tmp_path, "qwen3")                # a base and three fine-tunes of it, bf16, with a tokenizer
    AutoModelForCausalLM.from_pretrained(family.models[0])

    write_checkpoint(tmp_path / "odd", {"w": torch.ones(3, 4)}, shards=2, weights="bin")

Files are written by transformers, safetensors and torch, never by code of this project.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.errors import InputError
from checkpoints.model import open_model

TOKENIZER = Path(__file__).parent / "goldens" / "inputs" / "base"
VOCABULARY = 300  # tokens of that tokenizer
LLAMA_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
GROUPED = LLAMA_LIKE | {"num_key_value_heads": 2}
WITH_HEAD_DIM = GROUPED | {"head_dim": 8}

# architecture -> (model_type of transformers, config). Everything else is that model type's default.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": False}),
    "mistral": ("mistral", GROUPED | {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", WITH_HEAD_DIM | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", WITH_HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": ("gemma3_text", WITH_HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512}),
    "gpt_neox": ("gpt_neox", LLAMA_LIKE | {"rotary_pct": 0.5, "tie_word_embeddings": False}),
    "phi3": ("phi3", GROUPED | {"tie_word_embeddings": False, "pad_token_id": 0}),
    "olmo2": ("olmo2", GROUPED | {"tie_word_embeddings": False}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
MERGE_ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "olmo2", "mixtral")


@dataclass(frozen=True)
class Family:
    """Folders of a base model and of the models fine-tuned from it."""

    base: Path
    models: list[Path]


def make_family(
    folder: Path,
    architecture: str,
    dtype: torch.dtype = torch.bfloat16,
    n_models: int = 3,
    seed: int = 0,
    delta: float = 0.02,
    max_shard_size: str = "5GB",
) -> Family:
    """Save a random base model and `n_models` fine-tunes of it, all with the same tokenizer.

    A fine-tune is the base plus random deltas, rounded to `dtype`, with what real ones have: every tensor has its own
    scale (a third to three times `delta`), many deltas are 0, and a part of the embedding's rows is untouched.

    Args:
        folder: gets `base`, `model_0`, `model_1` ...
        architecture: a key of ARCHITECTURES.
        dtype: of the stored weights.
        seed: of all weights; the same seed gives the same files.
        delta: standard deviation of a tensor's delta over that of the base's tensor, about.
        max_shard_size: as in `save_pretrained`; "20KB" makes several files and an index.
    Returns: the folders.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = ARCHITECTURES[architecture]
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    positions = {} if model_type in ("gpt2", "bloom", "falcon") else {"max_position_embeddings": 512}
    config = AutoConfig.for_model(model_type, **(sizes | positions | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = {name: _base_weight(name, parameter, seed) for name, parameter in model.named_parameters()}
    embedding = model.get_input_embeddings().weight

    def save(name: str, weights: Mapping[str, Tensor]) -> Path:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(weights[key])
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        copy_tokenizer(folder / name)
        return folder / name

    def fine_tuned(position: int) -> dict[str, Tensor]:
        return {
            name: base[name] + _random_delta(name, base[name], seed, position, delta, parameter is embedding)
            for name, parameter in model.named_parameters()
        }

    saved_base = save("base", base)
    return Family(saved_base, [save(f"model_{position}", fine_tuned(position)) for position in range(n_models)])


def copy_tokenizer(folder: Path) -> None:
    """Put the byte-level BPE tokenizer of 300 tokens into a checkpoint's folder."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    *,
    weights: str = "safetensors",
    index: bool | None = None,
    tokenizer: bool = False,
) -> Path:
    """Write arbitrary tensors as a checkpoint, with the plain safetensors library or with torch.save.

    Args:
        folder: made if need be.
        tensors: names and tensors, dealt to the shards in this order, as evenly as it goes.
        config: config.json; a minimal one by default.
        shards: number of weight files. One is called model.safetensors (pytorch_model.bin), several
            model-00001-of-00003.safetensors and so on, as transformers names them.
        weights: "safetensors" or "bin" (pickled).
        index: whether to write the index; by default only beside several files.
        tokenizer: whether to add the tokenizer's files.
    Returns: `folder`.
    """
    assert weights in ("safetensors", "bin"), f"weights: expected 'safetensors' or 'bin', got {weights!r}"
    folder.mkdir(parents=True, exist_ok=True)
    config = config if config is not None else {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    stem = "model" if weights == "safetensors" else "pytorch_model"
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}.{weights}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{weights}"
        own = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        part = {name: tensors[name].contiguous() for name in own}
        if weights == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if index if index is not None else shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{weights}.index.json").write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer:
        copy_tokenizer(folder)
    return folder


def _generator(*parts: object) -> torch.Generator:
    """A generator of its own for each tensor, so that no tensor depends on the order of the others."""
    return torch.Generator().manual_seed(zlib.crc32(repr(parts).encode()))


def _base_weight(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Matrices of standard deviation 1 / sqrt(inputs), norms around what they were initialised to, small biases."""
    noise = torch.randn(parameter.shape, generator=_generator(seed, name))
    is_matrix = parameter.dim() >= 2
    weight = noise * parameter.shape[-1] ** -0.5 if is_matrix else parameter.detach().float() + 0.1 * noise
    return weight.to(parameter.dtype)


def _random_delta(name: str, base: Tensor, seed: int, position: int, delta: float, is_embedding: bool) -> Tensor:
    """What a fine-tune adds to a tensor: a quarter of the elements stays, of the embedding a third of the rows too."""
    generator = _generator(seed, name, position)
    scale = delta * 3.0 ** (2 * torch.rand((), generator=generator) - 1)
    noise = torch.randn(base.shape, generator=generator) * scale * base.float().square().mean().sqrt()
    noise[torch.rand(base.shape, generator=generator) < 0.25] = 0
    if is_embedding:
        noise[torch.rand(base.shape[0], generator=generator) < 1 / 3] = 0
    return noise  # float32, so base + noise is rounded once, when it is copied into the model


def add_code(family: Family) -> None:
    """Make the models of a class of their own, whose file imports another one."""
    for folder in (family.base, *family.models):
        (folder / "configuration_small.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass SmallConfig(LlamaConfig):\n    model_type = 'small_of_mine'\n"
        )
        (folder / "small_layers.py").write_text("def same(value):\n    return value\n")
        (folder / "modeling_small.py").write_text(
            "from transformers import LlamaForCausalLM\n\nfrom .configuration_small import SmallConfig\nfrom .small_layers import same\n\n\n"
            "class SmallForCausalLM(LlamaForCausalLM):\n    config_class = same(SmallConfig)\n"
        )
        code = {
            "AutoConfig": "configuration_small.SmallConfig",
            "AutoModelForCausalLM": "modeling_small.SmallForCausalLM",
        }
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "small_of_mine", "architectures": ["SmallForCausalLM"], "auto_map": code}
        (folder / "config.json").write_text(json.dumps(config))


def refusal_of(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """What opening a model says after its tensors were changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        open_model(str(folder))
    return str(caught.value)
