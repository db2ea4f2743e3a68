"""Random masks that depend on nothing but seed, tensor name, model position and element index.

A 32-bit integer hash of the index, keyed by the rest, compared with an integer threshold: no generator, no state,
so any block of any tensor can be drawn by any worker on any device, with the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from streaming.twins import twin


def _signed(value: int) -> int:
    """The int32 with the bits of an unsigned 32-bit number."""
    return value - (1 << 32) if value >= 1 << 31 else value


# The last two multipliers and the shifts between them are those of "lowbias32" (C. Wellons, Hash Function Prospector). The
# product with the golden ratio before them breaks up counting: without it, indices a stride of 4096 apart are correlated.
SPREAD = _signed(0x9E3779B1)
FIRST_MULTIPLIER = _signed(0x21F0AAAD)
SECOND_MULTIPLIER = _signed(0xD35A2D97)
TOP_BIT = -(1 << 31)


def keys(seed: int, tensor: str, model: int, high: int) -> tuple[int, int]:
    """Two 32-bit keys for the elements of one model's tensor whose index has the upper 32 bits `high`."""
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{model}\0{high}".encode()).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:8], "little"))


def hash_indices(start: int, count: int, key: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Hash the indices `start` to `start + count`, which share their upper 32 bits.

        x = index * SPREAD ^ k0;  x ^= x >> 16;  x *= FIRST_MULTIPLIER;  x ^= x >> 15;  x ^= k1;  x *= SECOND_MULTIPLIER

    modulo 2^32, over unsigned numbers.

    Returns: `[count]` int32, uniform, x - 2^31: the order of the unsigned numbers, in signed ones.
    """
    low = start & 0xFFFFFFFF
    values = torch.arange(low, low + count, dtype=torch.int64 if low + count > 1 << 31 else torch.int32, device=device)
    values = values.to(torch.int32).mul_(SPREAD).bitwise_xor_(key[0])
    scratch = torch.empty_like(values)
    _xor_shift_(values, 16, scratch)
    values.mul_(FIRST_MULTIPLIER)
    _xor_shift_(values, 15, scratch)
    # A top bit that is flipped here is flipped after the product, and nothing else: x - 2^31 for free.
    return values.bitwise_xor_(key[1] ^ TOP_BIT).mul_(SECOND_MULTIPLIER)


def _xor_shift_(values: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """values ^= values >> shift, as unsigned numbers: torch's int32 shift is arithmetic, so the sign's copies are masked off."""
    torch.bitwise_right_shift(values, shift, out=scratch)
    values.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def drop_(
    values: torch.Tensor,
    density: float,
    *,
    seed: int,
    tensor: str,
    model: int,
    start: int,
    divisor: float | None = None,
) -> torch.Tensor:
    """Set each element to zero with probability 1 - density, in place.

    Args:
        values: `[n]` float32, the elements `start` to `start + n` of a flattened tensor.
        density: share kept, in [0, 1]; an element is kept where its hash, unsigned, is below round(density * 2^32).
        seed, tensor, model: the recipe's seed, the output tensor's name, the model's position in the recipe.
        divisor: what is kept is divided by it.

    Returns: `values`.
    """
    threshold = round(density * (1 << 32))
    for part, position, key in _runs(values, seed, tensor, model, start):
        keep_below_(values[part], position, key, threshold, divisor)
    return values


@twin("merging.kernels")
def keep_below_(values: torch.Tensor, start: int, key: tuple[int, int], threshold: int, divisor: float | None) -> None:
    """Set to zero, in place, what has an index whose hash, unsigned, is not below a threshold, and divide the rest.

    Args:
        values: `[n]` float32.
        start, key: see `hash_indices`.
        threshold: at most 2^32, which keeps all.
    """
    if threshold < 1 << 32:
        hashed = hash_indices(start, values.numel(), key, values.device)
        kept = torch.lt(hashed, threshold + TOP_BIT, out=hashed).neg_()  # all bits set where kept, none where dropped
        values.view(torch.int32).bitwise_and_(kept)
    if divisor is not None:
        values.div_(divisor)


def drop_unevenly_(
    values: torch.Tensor, kept: torch.Tensor, *, seed: int, tensor: str, model: int, start: int
) -> torch.Tensor:
    """`drop_` with a probability of being kept for each element.

    Args:
        kept: `[n]` float64, in [0, 1]; an element stays where its hash, unsigned, is below round(kept * 2^32).
        values, seed, tensor, model, start: see `drop_`.

    Returns: `values`.
    """
    thresholds = (kept * (1 << 32)).round_().to(torch.int64).add_(TOP_BIT)
    for part, position, key in _runs(values, seed, tensor, model, start):
        hashed = hash_indices(position, part.stop - part.start, key, values.device)
        values[part].mul_(hashed < thresholds[part])
    return values


def _runs(
    values: torch.Tensor, seed: int, tensor: str, model: int, start: int
) -> Iterator[tuple[slice, int, tuple[int, int]]]:
    """A block's elements, the index of the first, and their keys, cut where the upper 32 bits of the index change."""
    position, stop = start, start + values.numel()
    while position < stop:
        high = position >> 32
        end = min(stop, (high + 1) << 32)
        yield slice(position - start, end - start), position, keys(seed, tensor, model, high)
        position = end
