"""The formulas: from the base's activations to how far weights go back to the base, by channel or along the mean input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting
from streaming.sums import row_sums

Scaling = Literal["identity", "sqrt", "square", "after_first", "after_first_sqrt", "after_first_square"]
Control = Literal["none", "uniform", "permuted", "random", "without_top"]
Protect = Literal["channels", "mean"]
CONTROLS: dict[str, tuple[str, ...]] = {
    "channels": ("none", "uniform", "permuted", "without_top"),
    "mean": ("none", "uniform", "permuted", "random"),
}
"""What is protected -> the controls that there are."""

SCALINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda s: s,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "after_first": lambda s: s,
    "after_first_sqrt": torch.sqrt,
    "after_first_square": torch.square,
}
"""What becomes of the importance; `after_first`: that over all tokens but the first of each block."""
AFTER_FIRST = "after_first"
"""How the scalings begin that leave the first tokens out."""
OUTLIER = 10.0
"""A channel is an outlier where its s is this many times the median of its tensor."""


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
            order drawn from `seed` and the tensor's name; the others: f as it is.
    """
    if control == "uniform":
        return f.mean(dim=-1, keepdim=True).expand_as(f).contiguous()
    return f[..., _order(f.shape[-1], seed, tensor)] if control == "permuted" else f


def drop_top(s: torch.Tensor) -> torch.Tensor:
    """s with 0, so that they stay as merged, for the channels that stand out: of `OUTLIER` times the median or more, else the largest.

    The control `without_top`: whatever AIM gains is these channels' doing where it gains nothing without them.

    Args:
        s: `[in]` or `[experts, in]` float32 in [0, 1].
    """
    largest, median = s.amax(dim=-1, keepdim=True), s.median(dim=-1, keepdim=True).values
    return torch.where((s >= OUTLIER * median) | (s == largest), 0.0, s)


def _order(channels: int, seed: int, tensor: str) -> torch.Tensor:
    """An order of channels, `[in]` int64."""
    return torch.randperm(channels, generator=_generator(seed, tensor))


def _generator(seed: int, tensor: str) -> torch.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{tensor}".encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(key)


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


def direction(mean: torch.Tensor) -> torch.Tensor:
    """u = mean / |mean|, `[..., in]` float64 of length 1; zeros where the mean is 0.

    Args:
        mean: `[in]` or `[experts, in]`, the signed mean of an input; the length is taken per row.

    Raises: ValueError: not finite.
    """
    if not bool(mean.isfinite().all()):
        raise ValueError("mean: expected finite numbers")
    exact = mean.double()
    largest = exact.abs().amax(dim=-1, keepdim=True)
    scaled = exact / torch.where(largest > 0, largest, 1.0)  # whose squares neither overflow nor vanish
    length = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1.0)


def other_direction(u: torch.Tensor, control: Control, *, seed: int, tensor: str) -> torch.Tensor:
    """The direction of a control that takes as many directions away, and knows nothing of the mean input.

    Args:
        u: `[..., in]` float64, from `direction`; a row of zeros stays.
        control: `permuted`: u with its channels in an order drawn from `seed` and the tensor's name; `random`: a direction that is
            drawn so, all being as likely; the others: u as it is.
    """
    if control == "permuted":
        return u[..., _order(u.shape[-1], seed, tensor)]
    if control == "random":
        drawn = direction(torch.randn(u.shape, dtype=torch.float64, generator=_generator(seed, tensor)))
        return torch.where(u.any(dim=-1, keepdim=True), drawn, 0.0)
    return u


def protect_mean(base: torch.Tensor, merged: torch.Tensor, mean: torch.Tensor, omega: float) -> torch.Tensor:
    """Take the task vector's answer to the base's mean input back to the share omega, and leave every other direction.

        out = merged - (1 - omega) (D u) u^T,   D = merged - base,   u = mean / |mean|

    Args:
        base: `[out, in]` float32, the pretrained weight.
        merged: `[out, in]` float32.
        mean: `[in]`, the signed mean of the weight's input in the base; 0 throughout takes nothing back.
        omega: in [0, 1]; 1 returns `merged` exactly; 0 gives the mean input the base's answer, to rounding.

    Returns: `[out, in]` float32; the writer rounds, this function never does.
    Raises: ValueError: shapes differ; mean not finite. ArgumentError: omega outside [0, 1].
    Source: none, it is this project's own; see docs/aim.md.
    """
    if base.shape != merged.shape or base.shape[-1:] != mean.shape:
        raise ValueError(
            f"expected base and merged of one shape [out, in] and mean [in], got {list(base.shape)}, {list(merged.shape)} and {list(mean.shape)}"
        )
    if not 0.0 <= omega <= 1.0:
        raise ArgumentError(f"{setting('omega')}: expected a number in [0, 1], got {omega}.")
    u = direction(mean)
    return take_back(merged, answers(merged - base, u), u, omega)


def answers(change: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """D u, `[..., out]` float64; 0 for an output whose task vector is not finite, so that it stays as merged.

    Args:
        change: `[..., out, in]` float32 or float64, D.
        u: `[..., in]` float64.
    """
    # By elements and not as a product of matrices, whose sums depend on how many rows there are.
    return row_sums(change.double() * u[..., None, :]).nan_to_num(0.0, 0.0, 0.0)


def take_back(merged: torch.Tensor, answer: torch.Tensor, u: torch.Tensor, omega: float) -> torch.Tensor:
    """merged - (1 - omega) answer u^T, `[..., out, in]` float32; answer `[..., out]` and u `[..., in]` float64."""
    rows = (answer * (1.0 - omega)).float()[..., :, None]
    return torch.addcmul(merged, rows, u.float()[..., None, :], value=-1.0)


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
