"""Strategies of hypothesis: for each kind of file, a sound family of models with some of its files changed.

A mutant is a list of changes by name, each with a seed for its details, so that hypothesis can shrink it and a test can
repeat it. A gentle change must not keep the merge from going on; a rough one may.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.fuzz import models
from tests.fuzz.change_pickles import PICKLES
from tests.fuzz.change_side_files import CONFIGS, TOKENIZERS
from tests.fuzz.change_weights import BYTES, HEADERS, INDEXES
from tests.fuzz.models import Files

Change = Callable[[random.Random, Files], object]
"""Changes a model's files in place; raises an error where earlier ones left nothing that it could change."""

METHODS = (
    ("--method=task_arithmetic",),
    ("--method=linear",),
    ("--method=ties", "--density=0.7"),
    ("--method=dare_ties", "--density=0.6", "--seed=5"),
)


@dataclass(frozen=True)
class Kind:
    """What is mutated.

    layouts: see `models.family`; gentle, rough: changes by name; methods: flags of merge.py to choose from.
    """

    layouts: tuple[str, ...]
    gentle: Mapping[str, Change]
    rough: Mapping[str, Change]
    methods: tuple[tuple[str, ...], ...] = METHODS


KINDS = {
    "headers": Kind(("plain", "vocabularies", "sharded"), *HEADERS),
    "bytes": Kind(("plain", "vocabularies", "sharded"), *BYTES),
    "pickles": Kind(("pickled",), *PICKLES),
    "indexes": Kind(("sharded",), *INDEXES),
    "configs": Kind(("plain", "vocabularies", "sharded"), *CONFIGS, (*METHODS[:3], ("--method=widen",))),
    "tokenizers": Kind(("vocabularies", "byte pairs", "pieces"), *TOKENIZERS),
}


@dataclass(frozen=True)
class Mutant:
    """Changes to a family of models.

    Attributes:
        kind, layout: keys of KINDS, and one of its layouts.
        who: the models that are changed, all in the same way.
        flags: of merge.py.
        changes: (name, seed), in order.
    """

    kind: str
    layout: str
    who: tuple[str, ...]
    flags: tuple[str, ...]
    changes: tuple[tuple[str, int], ...]

    @property
    def is_gentle(self) -> bool:
        """Whether the merge must go on."""
        return all(name in KINDS[self.kind].gentle for name, _ in self.changes)

    def files(self) -> dict[str, Files]:
        """The changed models' files."""
        family = models.family(self.layout)
        return {name: self._changed(dict(family[name])) for name in self.who}

    def _changed(self, files: Files) -> Files:
        known = {**KINDS[self.kind].gentle, **KINDS[self.kind].rough}
        for name, seed in self.changes:
            try:
                known[name](random.Random(seed), files)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
                continue  # earlier changes left nothing that this one could change
        return files


@st.composite
def mutants(draw: Callable[..., object], kind: str) -> Mutant:
    """Mutants of one kind: no, one or two gentle changes, then, three times in five, one or two rough ones."""
    traits = KINDS[kind]

    def pick(names: Mapping[str, Change], least: int) -> list[tuple[str, int]]:
        change = st.tuples(st.sampled_from(sorted(names)), st.integers(0, 2**32 - 1))
        return draw(st.lists(change, min_size=least, max_size=2))  # type: ignore[return-value]

    changes = pick(traits.gentle, 0)
    if draw(st.sampled_from([True, True, True, False, False])) or not changes:
        changes += pick(traits.rough, 1)
    return Mutant(
        kind,
        draw(st.sampled_from(traits.layouts)),  # type: ignore[arg-type]
        draw(st.sampled_from([("base",), ("one",), ("two",), ("base", "one", "two")])),  # type: ignore[arg-type]
        draw(st.sampled_from(traits.methods)),  # type: ignore[arg-type]
        tuple(changes),
    )
