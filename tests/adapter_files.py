"""Adapters that peft saves, checkpoints under other names, calibration text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def make_adapter(folder: Path, base: Path, *, seed: int = 0, relative_base: str | None = None, **config: Any) -> Path:
    """A random adapter, saved by peft; what `modules_to_save` holds is changed, too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def without_prefix(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}  # masks, as they were stored once
    save_file(short, target / "model.safetensors", {"format": "pt"})
    return target


def texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"merging models {i} in tests"}) + "\n" for i in range(99)))
    return path
