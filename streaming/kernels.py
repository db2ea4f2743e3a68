"""Compiled twins of the loops of `streaming.stream`; what each does is said there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

MAGNITUDE_16, MAGNITUDE_32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF)
INFINITY_BFLOAT16, INFINITY_FLOAT32 = 0x7F80, 0x7F800000

# No fast math: every operation is rounded by itself, in the order that is written here, as torch rounds it.
compiled = numba.njit(nogil=True, cache=True)


def load(raw: torch.Tensor, values: torch.Tensor, base: torch.Tensor | None, look: bool) -> tuple[bool, bool]:
    """See `streaming.stream.load`."""
    bits = bits_of(values)
    if raw.dtype == torch.bfloat16:
        is_finite = _widen(raw.view(torch.int16).numpy().view(np.uint16), bits) < INFINITY_BFLOAT16
    else:
        values.copy_(raw)
        is_finite = largest_magnitude(bits) < INFINITY_FLOAT32
    if base is not None:
        _subtract(values.numpy(), base.numpy())
    return bool(is_finite), look and bool(largest_magnitude(bits))


def round_to(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """See `streaming.stream.round_to`."""
    if dtype == torch.bfloat16 and values.dtype == torch.float32:
        rounded = torch.empty(values.shape, dtype=torch.int16)
        largest = _narrow(bits_of(values), rounded.numpy().view(np.uint16))
        if largest < INFINITY_BFLOAT16:
            return rounded.view(dtype), True
        return values.to(dtype), False  # which knows what to make of a NaN
    rounded = values.to(dtype)
    return rounded, bool(largest_magnitude(bits_of(rounded.float())) < INFINITY_FLOAT32)


def bits_of(values: torch.Tensor) -> Any:
    """The bits of a tensor on the CPU, in place: `[n]` float32 -> `[n]` uint32."""
    return values.numpy().view(np.uint32)


@compiled
def _widen(raw: Any, bits: Any) -> Any:
    """bfloat16 bits to float32 bits; the largest magnitude's bfloat16 bits."""
    largest = np.uint16(0)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
        largest = max(largest, raw[i] & MAGNITUDE_16)
    return largest


@compiled
def _narrow(bits: Any, rounded: Any) -> Any:
    """Round float32 bits to the nearest bfloat16, ties to even; the largest magnitude's bits, which NaN can only exceed."""
    largest = np.uint16(0)
    for i in range(bits.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        nearest = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        rounded[i] = nearest
        largest = max(largest, nearest & MAGNITUDE_16, np.uint16(bits[i] >> np.uint32(16)) & MAGNITUDE_16)
    return largest


@compiled
def largest_magnitude(bits: Any) -> Any:
    """The largest magnitude's bits."""
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & MAGNITUDE_32)
    return largest


@compiled
def _subtract(values: Any, base: Any) -> None:
    for i in range(values.size):
        values[i] = values[i] - base[i]


def _load_each() -> None:
    values = torch.ones(64)
    load(values.bfloat16(), values, values.clone(), True)
    load(values.clone(), values, None, True)


EXAMPLES: dict[str, Callable[[], object]] = {
    "load": _load_each,
    "round_to": lambda: round_to(torch.ones(64), torch.bfloat16),
}
"""See `streaming.twins`."""
