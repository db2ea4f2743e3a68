"""AIM in plain float64, and what every weight's input is, found without hooks: what `aim/` is compared with.

Written from the formulas of NUMERICS.md and of the README of the goldens, and from nothing else; imports no code of this
project. Slow on purpose. There are two ways to a weight's input, which share nothing with each other or with `aim/`:

    llama_inputs(folder, tokens), gpt2_inputs(folder, tokens)     # the layers by hand, from the raw weights; no model class
    watch_inputs(folder, tokens)                                  # any model: the matrix products that torch really does

`watch_inputs` knows a weight by its numbers: of each product x @ W.T it looks up the rows of W among the rows and the
columns of everything that is stored. So it finds the stored tensor, its expert, and which of its dimensions is the input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s,
    "sqrt": lambda s: s**0.5,
    "square": lambda s: s * s,
}


# Text


def pick_blocks(
    texts: Sequence[str], encode: Callable[[str], list[int]], *, n_samples: int, block_size: int, seed: int
) -> Tensor:
    """Shuffled by the datasets library itself, stripped, encoded, the long and the empty left out, joined, cut: int64."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": list(texts)}).shuffle(seed=seed)
    kept: list[list[int]] = []
    for row in rows:
        text = row["text"].strip()
        tokens = encode(text) if text else []
        if 0 < len(tokens) <= block_size and len(kept) < n_samples:
            kept.append(tokens)
    joined = torch.tensor([token for tokens in kept for token in tokens], dtype=torch.int64)
    count = len(joined) // block_size
    return joined[: count * block_size].reshape(count, block_size)


# Formulas


@dataclass
class Seen:
    """The rows of a weight's input.

    input_dim: the dimension of the stored tensor that they are multiplied with.
    rows: `[tokens, in]` float64 for each expert of a fused tensor; under None where there is one input.
    """

    input_dim: int
    rows: dict[int | None, list[Tensor]] = field(default_factory=dict)

    def add(self, expert: int | None, x: Tensor) -> None:
        self.rows.setdefault(expert, []).append(x.detach().double().reshape(-1, x.shape[-1]))

    def _each(self, of: Callable[[Tensor], Tensor], experts: int | None, width: int) -> Tensor:
        if experts is None:
            return of(torch.cat(self.rows[None]))
        empty = torch.zeros(0, width, dtype=torch.float64)
        return torch.stack([of(torch.cat([empty, *self.rows.get(expert, [])])) for expert in range(experts)])

    def mean(self, shape: Sequence[int]) -> Tensor:
        """The signed mean per channel, float64; `shape` is the stored tensor's."""
        experts = shape[0] if None not in self.rows else None
        return self._each(lambda x: x.sum(0) / max(1, len(x)), experts, shape[self.input_dim])

    def statistics(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """mean |x| and mean x² per channel, and how many rows there were; `shape` is the stored tensor's."""
        experts, width = (shape[0] if None not in self.rows else None), shape[self.input_dim]
        mean_abs = self._each(lambda x: x.abs().sum(0) / max(1, len(x)), experts, width)
        mean_sq = self._each(lambda x: (x * x).sum(0) / max(1, len(x)), experts, width)
        return mean_abs, mean_sq, self._each(lambda x: torch.tensor(len(x)), experts, width)


def importance(mean_abs: Tensor, scaling: str = "identity") -> Tensor:
    """s, float64 in [0, 1]: mean |x| over the largest of the tensor (of each expert), scaled; 0 where nothing is active."""
    largest = mean_abs.double().amax(dim=-1, keepdim=True)
    return SCALINGS[scaling](mean_abs.double() / torch.where(largest > 0, largest, 1.0))


def keep(s: Tensor, omega: float) -> Tensor:
    """The share of the task vector that each channel keeps: 1 - s (1 - omega)."""
    return 1 - s * (1 - omega)


def along(channels: Tensor, shape: Sequence[int], input_dim: int) -> Tensor:
    """`[in]` or `[experts, in]`, shaped to multiply a tensor of `shape` along `input_dim`."""
    sizes = [1] * len(shape)
    sizes[input_dim] = shape[input_dim]
    if channels.dim() == 2:
        sizes[0] = shape[0]
    return channels.reshape(sizes)


def relax(base: Tensor, merged: Tensor, share: Tensor, input_dim: int) -> Tensor:
    """W_base + (W_merged - W_base) * share, float64; share `[in]` or `[experts, in]`, from `keep`."""
    b = base.double()
    return b + (merged.double() - b) * along(share, base.shape, input_dim)


def direction(mean: Tensor) -> Tensor:
    """The unit vector along a mean, float64; 0 where the mean is 0. `[in]` or `[experts, in]`."""
    mean = mean.double()
    length = (mean * mean).sum(-1, keepdim=True) ** 0.5
    return mean / torch.where(length > 0, length, 1.0)


def protect_mean(base: Tensor, merged: Tensor, mean: Tensor, omega: float, input_dim: int) -> Tensor:
    """W_merged - (1 - omega) (D u) u^T, float64, matrix by matrix; mean `[in]` or `[experts, in]`."""
    b, m, u = base.double(), merged.double(), direction(mean)
    if b.dim() == 3:
        each = [u] * len(b) if u.dim() == 1 else list(u)
        return torch.stack([protect_mean(b[e], m[e], each[e], omega, input_dim - 1) for e in range(len(b))])
    if input_dim == 0:
        return protect_mean(b.T, m.T, u, omega, 1).T
    return m - (1 - omega) * torch.outer((m - b) @ u, u)


def shortened(base: Tensor, merged: Tensor, mean: Tensor, omega: float, input_dim: int) -> Tensor:
    """The whole task vector, scaled to the length that `protect_mean` leaves, matrix by matrix, float64."""
    b, m = base.double(), merged.double()
    d, less = m - b, protect_mean(base, merged, mean, omega, input_dim) - b
    dims = (-2, -1)
    scale = ((less * less).sum(dims, keepdim=True) / (d * d).sum(dims, keepdim=True)) ** 0.5
    return b + d * scale


# The published program, whose every operation rounds


def published_share(sums: Tensor, omega: float, scaling: str = "identity") -> Tensor:
    """1 - imp * (1 - omega) in float32, of the sums that the program keeps."""
    s = sums.float().abs()
    return 1 - SCALINGS[scaling](s / s.max()) * (1 - omega)


def published_relax(base: Tensor, merged: Tensor, share: Tensor) -> Tensor:
    """The delta in bfloat16, the rest in float32, rounded to bfloat16; along the last dimension."""
    delta = merged.bfloat16() - base.bfloat16()
    return (base.bfloat16().float() + delta.float() * share).bfloat16()


def published_merge(base: Tensor, models: Sequence[Tensor], lamb: float) -> Tensor:
    """Task arithmetic's delta, bfloat16 after every operation."""
    total = torch.zeros_like(base)
    for model in models:
        total = total + (model - base) * lamb
    return total


def with_mean_row(table: Tensor) -> Tensor:
    """A bfloat16 table with one more row, the mean of the others, as programs add a token."""
    return torch.cat([table, table.mean(dim=0, keepdim=True)])


# Inputs by hand


def llama_inputs(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The input of every weight of a Llama, `[blocks, tokens, in]` float64 by the weight's name; the embedding has none."""
    config, w = json.loads((folder / "config.json").read_text()), _load_float64(folder)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angles = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))  # [tokens, width]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    found: dict[str, Tensor] = {}
    h = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        found[here + "input_layernorm.weight"] = h
        x = norm(h, here + "input_layernorm.weight")
        found |= {f"{here}self_attn.{part}_proj.weight": x for part in "qkv"}
        q, k, v = (_heads(x @ w[f"{here}self_attn.{part}_proj.weight"].T, width) for part in "qkv")
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        mixed = _attend(turn(q), turn(k), v)
        found[here + "self_attn.o_proj.weight"] = mixed
        h = h + mixed @ w[here + "self_attn.o_proj.weight"].T
        found[here + "post_attention_layernorm.weight"] = h
        x = norm(h, here + "post_attention_layernorm.weight")
        gate, up = (x @ w[f"{here}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        found |= {f"{here}mlp.{part}_proj.weight": x for part in ("gate", "up")}
        found[here + "mlp.down_proj.weight"] = functional.silu(gate) * up
        h = h + (functional.silu(gate) * up) @ w[here + "mlp.down_proj.weight"].T
    found["model.norm.weight"] = h
    found["lm_head.weight"] = norm(h, "model.norm.weight")
    return found


def gpt2_inputs(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The same of a GPT-2, whose matrices are stored `[in, out]`; its head is the embedding."""
    config, w = json.loads((folder / "config.json").read_text()), _load_float64(folder)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def multiply(x: Tensor, name: str) -> Tensor:
        found[f"{name}.weight"] = x
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    found: dict[str, Tensor] = {}
    h = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(config["n_layer"]):
        here = f"transformer.h.{layer}."
        found[here + "ln_1.weight"] = h
        q, k, v = multiply(norm(h, here + "ln_1"), here + "attn.c_attn").chunk(3, dim=-1)
        width = h.shape[-1] // config["n_head"]
        h = h + multiply(_attend(*(_heads(part, width) for part in (q, k, v))), here + "attn.c_proj")
        found[here + "ln_2.weight"] = h
        x = multiply(norm(h, here + "ln_2"), here + "mlp.c_fc")
        h = h + multiply(functional.gelu(x, approximate="tanh"), here + "mlp.c_proj")
    found["transformer.ln_f.weight"] = h
    return found


def _load_float64(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def _heads(x: Tensor, width: int) -> Tensor:
    """`[blocks, tokens, heads * width]` -> `[blocks, heads, tokens, width]`."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, the heads joined again: `[blocks, tokens, heads * width]`."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


# Inputs of any model


def watch_inputs(folder: Path, tokens: Tensor) -> dict[str, Seen]:
    """Run a checkpoint's model in float64, block by block, and see what is multiplied with what.

    Args:
        folder: one file of safetensors, all of whose tensors differ in their first row and column.
        tokens: `[blocks, tokens]` int64.

    Returns: what was seen, by the name of the stored tensor; an embedding too where it is also the head.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    stored = _load_float64(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        model.set_experts_implementation("eager")  # a product for each expert
    found: dict[str, Seen] = {}
    with torch.no_grad(), _wrapped_norms(model, stored, found), _Products(stored, found):
        for block in tokens:
            model(input_ids=block[None], use_cache=False)
    return found


@contextmanager
def _wrapped_norms(model: Any, stored: Mapping[str, Tensor], found: dict[str, Seen]) -> Iterator[None]:
    """Replace `forward` of every module with a one-dimensional weight by one that notes its argument first."""
    names = {_bytes(tensor): name for name, tensor in stored.items() if tensor.dim() == 1}
    wrapped = []

    def noting(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            found.setdefault(name, Seen(0)).add(None, x)
            return forward(x)

        return noted

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            module.forward = noting(names[_bytes(weight)], module.forward)
            wrapped.append(module)
    yield
    for module in wrapped:
        del module.forward


class _Products(TorchDispatchMode):
    """Notes the left side of every matrix product whose right side is made of stored numbers."""

    def __init__(self, stored: Mapping[str, Tensor], found: dict[str, Seen]):
        super().__init__()
        self._found = found
        self._known: dict[bytes, list[tuple[str, int, int | None]]] = {}
        for name, tensor in stored.items():
            for dim in (-1, -2) if tensor.dim() > 1 else ():
                for expert, matrix in enumerate(tensor) if tensor.dim() == 3 else [(None, tensor)]:
                    key = _bytes(matrix.select(-1 if dim == -2 else -2, 0))
                    self._known.setdefault(key, []).append((name, tensor.dim() + dim, expert))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            x, right = args[-2:]
            pairs = [(x, right)] if right.dim() == 2 else zip(x, right, strict=True)
            for one, matrix in pairs:
                for row in matrix.T:
                    for name, dim, expert in self._known.get(_bytes(row), []):
                        self._found.setdefault(name, Seen(dim)).add(expert, one)
        return func(*args, **(kwargs or {}))


def _bytes(vector: Tensor) -> bytes:
    return vector.detach().double().numpy().tobytes()
