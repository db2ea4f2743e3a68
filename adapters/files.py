"""The two files of a peft adapter: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adapters.low_rank import LoraChoice
from adapters.targets import PREFIX, Target, short_names
from checkpoints.safetensors_format import build_header
from checkpoints.source import READ_ELEMENTS, TensorInfo, TensorRef

if TYPE_CHECKING:
    from checkpoints.model import Model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
Slot = tuple[str, str, TensorInfo]
"""Of a tensor of the adapter: the base's tensor, which part of it (`a`, `b` or `whole`), dtype and shape."""


def tensors_of(
    factors: Sequence[Target],
    whole: Sequence[Target],
    infos: Mapping[str, TensorInfo],
    ranks: Mapping[str, int],
    choice: LoraChoice,
) -> dict[str, Slot]:
    """Every tensor of the adapter by peft's name for it, larger dtypes first."""
    adapted = {target.module for target in factors}
    slots: dict[str, Slot] = {}
    for target in factors:
        out, into = reversed(infos[target.name].shape) if target.turned else infos[target.name].shape
        rank, at = ranks[target.name], f"{PREFIX}{target.module}"
        slots[f"{at}.lora_A.weight"] = (target.name, "a", TensorInfo(choice.dtype, (rank, into)))
        slots[f"{at}.lora_B.weight"] = (target.name, "b", TensorInfo(choice.dtype, (out, rank)))
    for target in whole:
        last = target.parameter.rpartition(".")[2]
        inner = ".base_layer" if target.module in adapted else ""
        slots[f"{PREFIX}{target.module}{inner}.{last}"] = (target.name, "whole", infos[target.name])
    return dict(sorted(slots.items(), key=lambda item: (-item[1][2].dtype.itemsize, item[0])))


def pieces_of(
    slots: Mapping[str, Slot], read: Callable[[str], Mapping[str, torch.Tensor]], whole: Mapping[str, TensorRef]
) -> Iterator[bytes | memoryview]:
    """The file, some of it at a time.

    Args:
        slots: from `tensors_of`.
        read: the factors `a` and `b` of a tensor of the base.
        whole: base's tensor -> the one that takes its place.
    """
    yield build_header({name: info for name, (_, _, info) in slots.items()}, {"format": "pt"})[0]
    for tensor, part, info in slots.values():
        if part != "whole":
            yield read(tensor)[part].contiguous().view(torch.uint8).numpy().reshape(-1).data
            continue
        for start in range(0, info.numel, READ_ELEMENTS):
            stop = min(start + READ_ELEMENTS, info.numel)
            raw = whole[tensor].read(start, stop, torch.empty((stop - start) * 8, dtype=torch.uint8))
            yield raw.contiguous().view(torch.uint8).numpy().data


def config_of(
    factors: Sequence[Target],
    whole: Sequence[Target],
    ranks: Mapping[str, int],
    *,
    base: Model,
    modules: Collection[str],
    keeps_ties: bool,
) -> dict[str, Any]:
    """adapter_config.json. Every alpha equals its rank, so that nothing is scaled.

    Args:
        factors, whole: what the adapter has.
        ranks: of each tensor with factors.
        base: that it is for.
        modules: dotted names of all modules that have weights.
        keeps_ties: whether the embedding is stored with the head that is tied to it.
    """
    by_module = {target.module: ranks[target.name] for target in factors}
    most = Counter(by_module.values()).most_common(1)[0][0] if by_module else 1
    pattern = {module.replace(".", r"\."): rank for module, rank in sorted(by_module.items()) if rank != most}
    kept = sorted({target.module for target in whole if not target.as_bias})
    saved = [module for module in kept if module not in by_module]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base.label.rpartition("@")[0] if base.location.revision else base.label,
        "revision": base.location.revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "target_modules": short_names(by_module, modules),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "bias": "all" if any(target.as_bias and target.module not in saved for target in whole) else "none",
        "modules_to_save": short_names(saved, modules) or None,
        "fan_in_fan_out": any(target.turned for target in factors),
        "ensure_weight_tying": keeps_ties,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
