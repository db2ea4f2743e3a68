"""The decoder layers of a model, found without knowing its class; and one layer by itself, with what the model calls it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Reached(Exception):
    """The forward pass has come to where it was to stop."""


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers that a model is a stack of: the list of modules with most of its parameters.

    Returns: nothing where no such list has half of all parameters that are no embedding.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def weights(module: nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters() if id(weight) not in tables)

    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return []
    name, layers = max(lists, key=lambda pair: weights(pair[1]))
    head = head_weight(model)
    rest = 0 if head is None or id(head) in tables else head.numel()
    if 2 * weights(layers) < weights(model) - rest:
        return []
    return [(f"{name}.{position}", layer) for position, layer in enumerate(layers)]


def head_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight of the output head; None where the model has none."""
    try:
        return getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # how models without a head answer
        return None


def device_of_tokens(model: nn.Module) -> torch.device:
    """Where a model looks its tokens up: at its embedding, or where its first parameter is, if it has none of the common kind."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # how models with several tables, or none, answer
        weight = next(model.parameters())
    device: torch.device = weight.device
    return device


def call_of(layer: nn.Module, run: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a layer is called with the first time in a run of its model, which stops there; None where it is not called."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return calls[0] if calls else None


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors inside arguments in another dtype; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast(item, dtype) for item in value)
    return value
