"""Small models that stand in for those that pages name: the AIM paper's on the hub, `org/...`, and a chat model with a token of its own.

The paper's stand-ins are small; what their config.json says, how their weights are stored and which token they add is as on the hub: a
base saved by transformers 4.37 and three fine-tunes saved by versions between 4.29 and 4.33.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapter_files import make_adapter
from tests.fake_hub import FakeHub
from tests.token_models import write_json, write_sentence_piece

FAMILY = Path(__file__).resolve().parent.parent / "examples/family"
BASE = "unsloth/llama-2-13b"
INSTRUCT = "WizardLMTeam/WizardLM-13B-V1.2"
MATH = "vanillaOVO/WizardMath-13B-V1.0"
CODE = "layoric/llama-2-13b-code-alpaca"

WIDTH, LAYERS, ROWS = 32, 2, 60
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": WIDTH,
    "initializer_range": 0.02, "intermediate_size": 48, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
# What else each one's config.json says, in the words of the version that wrote it.
CONFIGS: dict[str, dict[str, Any]] = {
    BASE: {
        "_name_or_path": "unsloth/llama-2-13b", "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096,
        "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "unsloth_version": "2024.9", "vocab_size": ROWS,
    },
    INSTRUCT: {
        "_name_or_path": "/trained_models/13Bv2_497_2048_default_shuffle", "max_position_embeddings": 4096, "pad_token_id": 0,
        "torch_dtype": "float16", "transformers_version": "4.29.2", "vocab_size": ROWS + 1,
    },
    MATH: {
        "_name_or_path": "/trained_models/gsm8k-math_13b", "max_position_embeddings": 2048, "max_sequence_length": 4096, "pad_token_id": 0,
        "torch_dtype": "float16", "transformers_version": "4.29.2", "vocab_size": ROWS + 1,
    },
    CODE: {
        "_name_or_path": "NousResearch/Llama-2-13b-hf", "max_position_embeddings": 4096, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rope_scaling": None, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "vocab_size": ROWS,
    },
}  # fmt: skip
ADDED = {INSTRUCT: ["[PAD]"], MATH: ["[PAD]"]}


def make_tensors(seed: int, rows: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors: random, or a fine-tune of `start`."""
    torch.manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{one}_proj.weight": (WIDTH, WIDTH) for one in "qkvo"}
        shapes |= {f"{name}.mlp.{one}_proj.weight": (48, WIDTH) for one in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (WIDTH, 48)
        shapes |= {f"{name}.{one}_layernorm.weight": (WIDTH,) for one in ("input", "post_attention")}
    shapes["model.norm.weight"] = (WIDTH,)
    made = {}
    for name, shape in shapes.items():
        values = 0.02 * torch.randn(shape) if start else 0.2 * torch.randn(shape)
        if name in start:
            values[: len(start[name])] += start[name].float()
        made[name] = values
    return made


def make_paper_models(folder: Path) -> dict[str, Path]:
    """The paper's base and its three fine-tunes: hub name -> folder."""
    folders = {name: folder / name for name in CONFIGS}
    start: dict[str, Tensor] = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        target = folders[name]
        target.mkdir(parents=True)
        write_sentence_piece(target, ADDED.get(name, []))
        write_json(target / "config.json", SHAPE | config)
        write_json(
            target / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        )
        tensors = make_tensors(seed, config["vocab_size"], start)
        if name == BASE:
            start = {key: tensor.bfloat16() for key, tensor in tensors.items()}
            save_file(start, target / "model.safetensors", {"format": "pt"})
            continue
        # As transformers 4.29 wrote it: pickles in shards, with the rotary buffers that loading recomputes.
        halves = {key: tensor.half() for key, tensor in tensors.items()}
        rotary = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)}
        files = {"pytorch_model-00001-of-00002.bin": halves, "pytorch_model-00002-of-00002.bin": rotary}
        for file, content in files.items():
            torch.save(content, target / file)
        index = {key: file for file, content in files.items() for key in content}
        write_json(target / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    shutil.copy(folders[MATH] / "tokenizer.model", folders[CODE] / "tokenizer.model")
    return folders


ORG = {"org/base": "base", "org/math": "math", "org/code": "code"}
"""Hub name that pages use for "a model on the hub" -> the tiny family's."""
HUB = (*CONFIGS, *ORG, "org/")


def make_hub(folder: Path) -> FakeHub:
    """A hub with all of them, and `org/math-lora`, an adapter of `org/base`."""
    models = make_paper_models(folder) | {name: FAMILY / "models" / ours for name, ours in ORG.items()}
    models["org/math-lora"] = make_adapter(folder / "math-lora", FAMILY / "models/base")
    path = models["org/math-lora"] / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"})
    return FakeHub(models)


def make_chat(folder: Path) -> Path:
    """The family's model for instructions with one more token, `<|im_end|>`, in its tokenizer and its embedding."""
    shutil.copytree(FAMILY / "models/instruct", folder)
    tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": rows, "content": "<|im_end|>"})
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "config.json", config | {"vocab_size": rows + 1})
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name].mean(0, keepdim=True).bfloat16()])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
