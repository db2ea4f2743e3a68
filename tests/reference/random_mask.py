"""The random masks of DARE, an element at a time in plain integers: what the engine's masks are compared with.

    key = sha256(f"{seed}\\x00{tensor_name}\\x00{model_position}\\x00{index >> 32}")
    k0, k1 = the first two little-endian uint32 of key
    x = (index mod 2^32) * 0x9E3779B1       every product mod 2^32
    x = x ^ k0
    x = (x ^ x >> 16) * 0x21F0AAAD          logical shifts
    x = (x ^ x >> 15 ^ k1) * 0xD35A2D97
    kept = x < round(density * 2^32)

The first factor is that of Fibonacci hashing, the other two are of a `lowbias32` function of the hash-prospector
project. Only the high bits of x decide, so the shift that ends such functions is left out: it leaves the upper 15 as
they are. The multiplication that comes first instead is needed: without it elements some thousands apart are
correlated by up to 2 %.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

SPREAD, FIRST, SECOND = 0x9E3779B1, 0x21F0AAAD, 0xD35A2D97
MODULUS = 1 << 32


def keys(seed: int, tensor_name: str, model_position: int, high_word: int) -> tuple[int, int]:
    """k0 and k1 of the elements whose index is in [high_word * 2^32, (high_word + 1) * 2^32)."""
    text = f"{seed}\x00{tensor_name}\x00{model_position}\x00{high_word}"
    return struct.unpack("<II", hashlib.sha256(text.encode("utf-8")).digest()[:8])


def random_word(seed: int, tensor_name: str, model_position: int, index: int) -> int:
    """The number in [0, 2^32) that decides about one element."""
    k0, k1 = keys(seed, tensor_name, model_position, index >> 32)
    x = (index % MODULUS) * SPREAD % MODULUS
    x ^= k0
    x = (x ^ x >> 16) * FIRST % MODULUS
    return (x ^ x >> 15 ^ k1) * SECOND % MODULUS


def is_kept(seed: int, tensor_name: str, model_position: int, index: int, density: float) -> bool:
    """Whether the element at this flat index of the whole tensor is kept."""
    return random_word(seed, tensor_name, model_position, index) < round(density * MODULUS)


def random_words(seed: int, tensor_name: str, model_position: int, count: int, start: int = 0) -> np.ndarray:
    """`random_word` of `count` consecutive indices from `start` on: uint32, the same numbers faster."""
    words = np.empty(count, dtype=np.uint32)
    done = 0
    while done < count:
        index = start + done
        step = min(count - done, MODULUS - index % MODULUS)  # the key changes where the high word does
        k0, k1 = (np.uint32(key) for key in keys(seed, tensor_name, model_position, index >> 32))
        x = np.arange(index % MODULUS, index % MODULUS + step, dtype=np.uint64).astype(np.uint32)
        x *= np.uint32(SPREAD)
        x ^= k0
        x ^= x >> np.uint32(16)
        x *= np.uint32(FIRST)
        x ^= x >> np.uint32(15)
        x ^= k1
        x *= np.uint32(SECOND)
        words[done : done + step] = x
        done += step
    return words


def keep_mask(
    seed: int, tensor_name: str, model_position: int, shape: Sequence[int], density: float, start: int = 0
) -> Tensor:
    """The mask of a whole tensor, or of a block of it that begins at flat index `start`: bool, True = kept."""
    words = random_words(seed, tensor_name, model_position, prod(shape), start)
    return torch.from_numpy(words.astype(np.uint64) < round(density * MODULUS)).reshape(tuple(shape))
