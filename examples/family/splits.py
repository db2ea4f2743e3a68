"""Which split an item belongs to: decided by a hash of its content, so that no two splits can share an item.

    split_of("gsm8k buys_gives 4 3 2")     # "train", "validation", "test_0" or "test_1", the same on every machine

The shares and the salt are frozen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "validation", "test_0", "test_1"]
SHARES: dict[Split, int] = {"train": 70, "validation": 10, "test_0": 10, "test_1": 10}
"""Split -> percent of all items."""
SALT = "family 1"
"""Frozen with the generators: another salt would be another division."""


@dataclass(frozen=True)
class Item:
    """One question with its answer.

    Attributes:
        key: the content that decides the split: what is asked, without names, wording and other decoration.
        row: in the schema of the benchmark that it imitates.
        prompt: what evaluation gives a model, to the letter.
        answer: a right completion, without the end-of-sequence token.
    """

    key: str
    row: dict[str, Any]
    prompt: str
    answer: str


def words(text: str) -> list[str]:
    """The words of a text, for lists of them that read better in one line."""
    return text.split()


def split_of(key: str) -> Split:
    """The split of an item: its key's place in 100 percent."""
    place = int.from_bytes(hashlib.sha256(f"{SALT}\n{key}".encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares add up to 100")


def draw(generator: Callable[[random.Random], Item], split: Split, rng: random.Random) -> Iterator[Item]:
    """Items of one split, without end; keys may repeat."""
    while True:
        item = generator(rng)
        if split_of(item.key) == split:
            yield item


def draw_distinct(generator: Callable[[random.Random], Item], split: Split, count: int, seed: int) -> list[Item]:
    """`count` items of one split, no two with the same key. Raises ValueError where the pool is too small."""
    items: dict[str, Item] = {}
    for tries, item in enumerate(draw(generator, split, random.Random(seed))):
        items.setdefault(item.key, item)
        if len(items) == count:
            return list(items.values())
        if tries > 200 * count:
            raise ValueError(f"{split}: expected {count} different items, found {len(items)}. Enlarge the pool.")
    raise AssertionError("draw has no end")
