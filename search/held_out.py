"""The comparison at the end: the best candidates and what they have to beat, scored once on the texts that nothing was chosen by."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aim.formula import CONTROLS
from search.goals import Goal, Losses, as_json, standing
from search.space import METHOD, Space
from streaming.values import describe


@dataclass(frozen=True)
class Rival:
    """One model of the comparison.

    Attributes:
        name: for people.
        tree: its recipe; None for an input as it is.
        position: of an input; 0 is the base.
        searched: its losses on the texts searched with, where they are known.
        is_candidate: whether the search found it.
    """

    name: str
    tree: Mapping[str, Any] | None = None
    position: int = 0
    searched: Losses | None = None
    is_candidate: bool = False


@dataclass(frozen=True)
class Row:
    """One model, scored.

    Attributes:
        rival: which.
        losses: on the held-out texts.
        values: of the goals there.
        differences: the winner less this one, by goal, for JSON; empty for the winner.
        standings: what may be said of the winner against it, by goal.
    """

    rival: Rival
    losses: Losses
    values: Sequence[float]
    differences: Sequence[Mapping[str, Any]]
    standings: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "name": self.rival.name,
            "recipe": self.rival.tree,
            "values": list(self.values),
            "winner_minus_this": list(self.differences),
            "winner_is": list(self.standings),
            "losses": {task: list(values) for task, values in self.losses.items()},
        }


def rivals_of(
    space: Space, best: Sequence[Rival], inputs: Sequence[Losses], labels: Sequence[str], goals: Sequence[Goal]
) -> list[Rival]:
    """The best candidates first, then everything that the winner has to beat.

    Args:
        best: the best candidates, the winner first.
        inputs: losses of the base and of every model, on the texts searched with.
        labels: how people know them.
    """
    winner = best[0]
    assert winner.tree is not None
    rivals = list(best)
    rivals += [Rival(f"default {method}", space.untuned(method)) for method in space.methods]
    single = single_best(inputs, goals[0])
    rivals.append(Rival(f"best single model ({labels[single]})", None, single, inputs[single]))
    rivals.append(Rival("uniform soup", soup_of(winner.tree)))
    rivals += [Rival(f"its control: {words}", tree) for words, tree in controls_of(winner.tree)]
    rivals.append(Rival(f"base ({labels[0]})", None, 0, inputs[0]))
    return rivals


def single_best(inputs: Sequence[Losses], goal: Goal) -> int:
    """Position of the best model, the base left out."""
    plain = goal.of_inputs
    values = [plain.value(losses, inputs) for losses in inputs[1:]]
    return 1 + values.index(max(values) if plain.is_gain else min(values))


def soup_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The uniform mean of a recipe's models."""
    kept = ("base_model", "out_dtype", "dtype", "tokenizer_source", "exclude", "only")
    models = [{"model": one["model"], "parameters": {"weight": 1.0}} for one in tree["models"]]
    return {METHOD: "linear", **{key: tree[key] for key in kept if key in tree}, "models": models}


def controls_of(tree: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A recipe's controls: relaxed as much, without knowing the base's inputs; none where AIM does nothing."""
    aim = tree.get("aim")
    if not isinstance(aim, dict) or aim.get("control", "none") != "none" or aim.get("omega") in (1, 1.0):
        return []
    found = []
    for control in CONTROLS.get(str(aim.get("protect", "channels")), ()):
        if control != "none":
            changed = copy.deepcopy(dict(tree))
            changed["aim"] = {**aim, "control": control}
            found.append((control, changed))
    return found


def compare(
    rivals: Sequence[Rival], scored: Sequence[Losses], inputs: Sequence[Losses], goals: Sequence[Goal]
) -> list[Row]:
    """Rows of the comparison; the first rival is the winner, whom the others are compared with.

    Args:
        scored: losses of each on the held-out texts; inputs: of the base and every model there.
    """
    rows = []
    for rival, losses in zip(rivals, scored, strict=True):
        values = [goal.value(losses, inputs) for goal in goals]
        if rival is rivals[0]:
            rows.append(Row(rival, losses, values, [], []))
            continue
        differences = [goal.difference(scored[0], losses, inputs) for goal in goals]
        standings = [standing(goal, one) for goal, one in zip(goals, differences, strict=True)]
        rows.append(Row(rival, losses, values, [as_json(one) for one in differences], standings))
    return rows


def verdict(rows: Sequence[Row], goals: Sequence[Goal]) -> list[str]:
    """What may be said of the winner against everything that it has to beat: a sentence for each goal and standing."""
    lines = []
    others = [row for row in rows[1:] if not row.rival.is_candidate]
    for at, goal in enumerate(goals):
        for said, words in _WORDS.items():
            names = [row.rival.name for row in others if row.standings[at] == said]
            if names:
                lines.append(f"{goal.name}: on the held-out texts the best found is {words} {', '.join(names)}.")
    return lines


_WORDS = {"not distinguishable": "not distinguishable from", "worse": "worse than", "better": "better than"}


def as_text(rows: Sequence[Row], goals: Sequence[Goal]) -> str:
    """The comparison for people."""
    head = ["held-out texts"]
    for goal in goals:
        head += [goal.name, "best found minus this", ""]
    cells = []
    for row in rows:
        line = [row.rival.name]
        for at in range(len(goals)):
            if row.differences:
                line += [f"{row.values[at]:.4f}", _with_error(row.differences[at])]
                line.append(row.standings[at])
            else:
                line += [f"{row.values[at]:.4f}", "", ""]
        cells.append(line)
    widths = [max(len(line[at]) for line in [head, *cells]) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *cells]
    )


def _with_error(difference: Mapping[str, Any]) -> str:
    """A difference and its standard error, with so many digits that the error has two."""
    stderr = difference["stderr"] or 0.0
    digits = max(4, 1 - math.floor(math.log10(stderr))) if stderr > 0 else 4
    return f"{difference['value']:+.{digits}f} ± {stderr:.{digits}f}"


def names_of(tree: Mapping[str, Any]) -> str:
    """A recipe in one line: method and numbers, for people."""
    parts = [str(tree.get(METHOD))]
    parts += [f"{key} {_short(value)}" for key, value in (tree.get("parameters") or {}).items()]
    weights = [(one.get("parameters") or {}).get("weight") for one in tree.get("models", ())]
    if any(weight is not None for weight in weights):
        parts.append(f"weights {', '.join(map(_short, weights))}")
    aim = tree.get("aim") or {}
    parts += [f"{key} {_short(aim[key])}" for key in ("omega", "protect", "control") if key in aim]
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else str(value) if isinstance(value, int) else describe(value)  # fmt: skip
