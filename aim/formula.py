"""The formula: from a channel's activation to how far its weights go back to the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting

Scaling = Literal["identity", "sqrt", "square"]
Control = Literal["none", "uniform", "permuted"]

SCALINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda s: s,
    "sqrt": torch.sqrt,
    "square": torch.square,
}


def normalise(importance: torch.Tensor, scaling: Scaling = "identity") -> torch.Tensor:
    """s = scaling(importance / max(importance)), in [0, 1].

    Args:
        importance: `[in]` or `[experts, in]` float32, mean |activation| per input channel, >= 0; the maximum is taken per row.

    Raises: ValueError: negative, not finite, or all zero.
    """
    if not bool(importance.isfinite().all()) or bool((importance < 0).any()):
        raise ValueError("importance: expected finite numbers >= 0")
    largest = importance.amax(dim=-1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError("importance: expected a channel that is active, got zeros only")
    return SCALINGS[scaling](importance / largest)


def factors(s: torch.Tensor, omega: float) -> torch.Tensor:
    """f = 1 - s * (1 - omega): the share of the task vector that is kept per channel.

    Args:
        s: `[..., in]` float32 in [0, 1], from `normalise`.
        omega: in [0, 1]; 1 keeps everything, 0 nothing on the most active channel.

    Raises: ArgumentError: omega outside [0, 1].
    """
    if not 0.0 <= omega <= 1.0:
        raise ArgumentError(f"{setting('omega')}: expected a number in [0, 1], got {omega}.")
    return 1.0 - s * (1.0 - omega)


def without_channels(f: torch.Tensor, control: Control, *, seed: int, tensor: str) -> torch.Tensor:
    """The controls, which relax as much and know nothing of the channels.

    Args:
        f: `[..., in]` float32, from `factors`.
        control: `uniform`: every channel gets the mean factor of the tensor (of each expert); `permuted`: the factors in an
            order drawn from `seed` and the tensor's name; `none`: f as it is.
    """
    if control == "uniform":
        return f.mean(dim=-1, keepdim=True).expand_as(f).contiguous()
    if control == "permuted":
        key = int.from_bytes(hashlib.sha256(f"{seed}\0{tensor}".encode()).digest()[:8], "little") >> 1
        return f[..., torch.randperm(f.shape[-1], generator=torch.Generator().manual_seed(key))]
    return f


def relax(base: torch.Tensor, merged: torch.Tensor, importance: torch.Tensor, omega: float) -> torch.Tensor:
    """Pull a merged weight back to the base on the input channels the base relies on.

        out[o, i] = base[o, i] + (merged - base)[o, i] * (1 - s[i] * (1 - omega)),   s = importance / max(importance)

    Args:
        base: `[out, in]` float32, the pretrained weight (`[in]` for a norm).
        merged: `[out, in]` float32.
        importance: `[in]` float32, mean |activation| per input channel, >= 0.
        omega: in [0, 1]; 1 returns `merged`, 0 restores the base on the most active channel, both exactly.

    Returns: `[out, in]` float32; the writer rounds, this function never does.
    Raises: ValueError: shapes differ; importance negative, not finite or all zero. ArgumentError: omega outside [0, 1].
    Source: arXiv:2502.02421.
    """
    if base.shape != merged.shape or base.shape[-1:] != importance.shape:
        raise ValueError(
            f"expected base and merged of one shape [..., in] and importance [in], got {list(base.shape)}, {list(merged.shape)} and {list(importance.shape)}"
        )
    return torch.lerp(base, merged, factors(normalise(importance), omega).expand_as(base))


def relax_like_the_reference(base: torch.Tensor, merged: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The published program's rounding: both models and the delta in bfloat16, then base + delta * factor in float32.

    Args:
        base, merged: float32.
        factor: broadcast to them, float32.

    Returns: float32, to be rounded to bfloat16 by the writer.
    Source: the AIM authors' program, commit e7eccd5.
    """
    start = base.bfloat16()
    delta = merged.bfloat16() - start
    return start.float() + delta.float() * factor
