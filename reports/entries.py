"""One evaluated model: what it is, what it scored, and how it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from checkpoints.errors import InputError
from reports.bootstrap import Verdicts

PAPER = ("humaneval", "mbpp", "mmlu", "math", "gsm8k", "ifeval")
"""The columns of the paper's table, in its order."""
BENCHMARKS = (*PAPER, "mmlu_pro")
CONTROLS = ("uniform", "permuted", "random", "without_top")
UNKNOWN_METHOD = "unknown"


@dataclass(frozen=True)
class ModelId:
    """What is known of which model this is.

    Attributes:
        name: as a user typed it.
        folder: where it was, links resolved; None where that is not known.
        revision: the commit of a hub model.
        fingerprint: of its weights, as merge recipes and results record it.
    """

    name: str
    folder: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    @property
    def key(self) -> str:
        """Equal where two descriptions that know as much mean one model."""
        return self.fingerprint or self.revision or self.folder or self.name

    @property
    def short(self) -> str:
        """The last part of its name."""
        return self.name.rstrip("/").rsplit("/", 1)[-1] or self.name

    def likeness(self, other: ModelId) -> int:
        """How surely two descriptions mean one model: 4 equal weights, 3 the same commit or folder, 2 the same name, 1 names
        that end alike, 0 not at all. What is known of both decides, in this order."""
        if self.fingerprint and other.fingerprint:
            return 4 * (self.fingerprint == other.fingerprint)
        if self.revision and other.revision:
            return 3 * (self.revision == other.revision)
        if self.folder and self.folder == other.folder:
            return 3
        return 2 if self.name == other.name else int(self.short == other.short)


@dataclass(frozen=True)
class Score:
    """A benchmark's score as a fraction, its standard error and the verdicts on its items, where they are known."""

    value: float
    stderr: float | None = None
    verdicts: Verdicts | None = None


@dataclass(frozen=True)
class Merge:
    """What was merged, and how.

    Attributes:
        method: a name.
        models: the fine-tuned models, in the recipe's order.
        settings: everything else that decides the result, for people.
        key: equal where two checkpoints are the same merge, with AIM or without.
    """

    method: str
    models: tuple[ModelId, ...]
    settings: Mapping[str, str]
    key: str


@dataclass(frozen=True)
class Aim:
    """How a merge was relaxed: by AIM, or by one of its controls.

    Attributes:
        omega: as text (`0.4`, or by filter), empty where it is not known.
        control: `uniform`, `permuted`, or empty for AIM itself.
        settings: everything else that decides the result, for people.
    """

    omega: str = ""
    control: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """How a benchmark was asked, as far as a score depends on it.

    Attributes:
        prompts: digest of all prompts; None where the responses were given.
        items: which items there were: digests of the data files and the number of rows that were answered.
        answered, rows: rows answered, of those there are.
        partial: whether that is less than the whole test set.
        settings: name -> value of all else.
    """

    prompts: str | None
    items: tuple[str, ...]
    answered: int
    rows: int
    partial: bool
    settings: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Entry:
    """One evaluated model.

    Attributes:
        source: the file, and the line of a CSV, for messages.
        model: which model.
        scores: by benchmark.
        merge: what it was merged from; None for a single model.
        aim: how it was relaxed; None where it was not.
        conditions: by benchmark; empty for a CSV, which says nothing of them.
        columns: the other columns of a CSV.
        notes: what a user should know of its file.
    """

    source: str
    model: ModelId
    scores: Mapping[str, Score]
    merge: Merge | None = None
    aim: Aim | None = None
    conditions: Mapping[str, Conditions] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find(wanted: ModelId, entries: Sequence[Entry]) -> Entry | None:
    """The results of a model; None where there are none.

    Raises: InputError: several fit equally well.
    """
    likeness = [wanted.likeness(entry.model) for entry in entries]
    best = max(likeness, default=0)
    likest = [entry for entry, like in zip(entries, likeness, strict=True) if like == best and best]
    if len(likest) > 1:
        raise InputError(
            f"{wanted.name}: expected the results of one model, got {', '.join(entry.source for entry in likest)}, which fit equally well. Leave all but one out."
        )
    return likest[0] if likest else None
