"""Documents of a domain, and which split each belongs to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "val", "test"]
SHARES: dict[Split, int] = {"train": 70, "val": 12, "test": 18}
"""Split -> percent of all contents."""
SALT = "real 1"
"""Frozen with the generators: another salt would be another division."""


@dataclass(frozen=True)
class Document:
    """One question with its answer.

    Attributes:
        content: what is asked without names, wording and other decoration; it decides the split.
        prompt: what the user says.
        answer: what the assistant should say.
    """

    content: str
    prompt: str
    answer: str


Generator = Callable[[random.Random], Document]


def split_of(content: str) -> Split:
    """The split of a content: the place of its hash in 100 percent."""
    place = int.from_bytes(hashlib.sha256(f"{SALT}\n{content}".encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares add up to 100")


def draw(generator: Generator, split: Split, count: int, seed: str) -> list[Document]:
    """`count` documents of one split, no two with the same prompt.

    Raises: ValueError: the generator has too few.
    """
    rng = random.Random(f"{SALT} {seed} {split}")
    found: dict[str, Document] = {}
    for _ in range(500 * count):
        if len(found) == count:
            return list(found.values())
        document = generator(rng)
        if split_of(document.content) == split:
            found.setdefault(document.prompt, document)
    raise ValueError(f"{seed} {split}: expected {count} different documents, got {len(found)}. Ask for fewer.")


def make_documents(domain: str, split: Split, count: int) -> list[Document]:
    """Documents of a domain by name, the same on every machine.

    Raises: KeyError: there is no such domain; ValueError: it has fewer documents.
    """
    from examples.real.domains.registry import DOMAINS

    return draw(DOMAINS[domain], split, count, domain)
