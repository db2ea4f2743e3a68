"""Random masks that depend on nothing but seed, tensor name, model position and element index.

A 32-bit integer hash of the index (`streaming.elements.hash_of`), keyed by the rest, compared with an integer threshold: no
generator, no state, so any block of any tensor can be drawn by any worker on any device, with the same result.
"""

from __future__ import annotations

import functools
import hashlib

from streaming.elements import TOP_BIT, Element, Number, as_signed, where


def keys(seed: int, tensor: str, model: int, high: int) -> tuple[int, int]:
    """Two 32-bit keys for the elements of one model's tensor whose index has the upper 32 bits `high`."""
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{model}\0{high}".encode()).digest()
    return as_signed(int.from_bytes(digest[:4], "little")), as_signed(int.from_bytes(digest[4:8], "little"))


def drop(x: Element, vector: Number, density: float, *, seed: int, tensor: str, model: int) -> Number:
    """An element's number, or 0 with probability 1 - density.

    Args:
        density: share kept, in [0, 1]; an element is kept where its hash, unsigned, is below round(density * 2^32).
        seed, tensor, model: the recipe's seed, the output tensor's name, the model's position in the recipe.
    """
    threshold = round(density * (1 << 32))
    if threshold == 1 << 32:
        return vector
    kept = x.draw(functools.partial(keys, seed, tensor, model)) < x.integer(threshold + TOP_BIT)
    return where(kept, vector, 0.0)
