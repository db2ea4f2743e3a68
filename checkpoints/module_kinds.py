"""What a parameter of a model is, and which of its dimensions is the input, by the module that holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoints.placements import Kind


def classify(model: Any, parameter: str) -> tuple[Kind, int | None]:
    """What a parameter is, by the class of the module that holds it, and which of its dimensions is the input."""
    from transformers.pytorch_utils import Conv1D

    path, _, leaf = parameter.rpartition(".")
    module, n_dims = model.get_submodule(path), model.get_parameter(parameter).ndim
    is_own = not type(module).__module__.startswith("torch.nn.")
    is_leaf = next(module.children(), None) is None
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return "embedding", None
    if leaf == "weight" and isinstance(module, nn.Linear):
        return "linear", 1
    if leaf == "weight" and isinstance(module, Conv1D):
        return "conv1d", 0
    if n_dims > 2 and isinstance(module, nn.modules.conv._ConvNd):
        return "convolution", None
    # Set by transformers on every module of experts that its `ALL_EXPERTS_FUNCTIONS` can run.
    if n_dims == 3 and hasattr(module, "is_transposed"):
        return "experts", 1 if module.is_transposed else 2
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias", None
    # Of torch's own one-dimensional weights, batch and group norms and PReLU have their channels elsewhere.
    if n_dims == 1 and leaf == "weight" and is_leaf and (is_own or isinstance(module, nn.LayerNorm | nn.RMSNorm)):
        return "norm", 0
    if n_dims == 2 and is_own and (is_leaf or leaf == "weight") and _multiplies_input(module, leaf):
        return "linear", 1
    return "other", None


def _multiplies_input(module: nn.Module, leaf: str) -> bool:
    """Does this module, which is no nn.Linear, act as one? The routers of experts do. Tried out on the meta device.

    Args:
        module: on the meta device, in float32 (so that a cast to float32 is no copy).
        leaf: name of its parameter, `[out, in]`.
    """
    weight = module.get_parameter(leaf)
    tokens = torch.empty(2, weight.shape[1], device="meta")
    products = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args[1].shape == weight.shape:
                storages = [tensor.untyped_storage()._cdata for tensor in (*args[:2], tokens, weight)]
                products.append(storages[:2] == storages[2:])
            return func(*args, **(kwargs or {}))

    try:
        with Watch(), torch.no_grad():
            module(tokens)
    except Exception:  # it wants other inputs, or data; what it did before that still counts
        pass
    return any(products)
