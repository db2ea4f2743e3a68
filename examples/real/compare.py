"""Choose every rule's settings on validation, score the choices once on test, and say what is better than a tuned lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from examples.real.domains import Split
from examples.real.rules import REFERENCE, Rule, Settings
from examples.real.statistics import Difference, difference, holm, mean
from examples.real.workspace import Scores, Workspace

BETTER = 0.05
"""A p-value after Holm below this is a difference."""


@dataclass(frozen=True)
class Candidate:
    """A rule at one point of its grid, with its scores on validation."""

    rule: str
    settings: Settings
    scores: Scores


@dataclass(frozen=True)
class Row:
    """A model of the table.

    Attributes:
        name: of the rule, or of a single model.
        settings: chosen on validation.
        choice: where they come from: `own` validation, the `rule` that this is a control of, or empty for a single model.
        validation, test: scores; a single model has no validation.
        minus_reference: on test, paired by document.
        p: of that difference, adjusted by Holm over the rules; None for controls and single models.
    """

    name: str
    settings: Settings
    choice: str
    validation: Scores | None
    test: Scores
    minus_reference: Difference
    p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        domains: in the order of the models.
        tried: label -> candidate, of all that were scored on validation.
        rows: single models first, then by test loss.
        verdicts: rule -> sentence.
    """

    domains: Sequence[str]
    tried: Mapping[str, Candidate]
    rows: Sequence[Row]
    verdicts: Mapping[str, str]


def compare(space: Workspace, rules: Sequence[Rule]) -> Comparison:
    """Merge and score what is missing, and compare.

    Args:
        space: with texts and experts.
        rules: `REFERENCE` is one of them, and so is the rule of every control.

    Raises: CommandFailed.
    """
    for domain in space.domains:
        space.expert(domain)
    tried = _validate(space, rules)
    best = {rule.name: _best(rule, tried) for rule in rules}
    picks = [(rule, best[rule.name], "own") for rule in rules]
    picks += [
        (rule, best[rule.control_of], "rule")
        for rule in rules
        if rule.control_of and best[rule.control_of] != best[rule.name]
    ]
    singles: dict[str, Scores] = {}
    scored: list[tuple[Rule, Settings, str, Scores]] = []
    with _bar("test", 1 + len(space.domains) + len(picks)) as bar:
        singles["base"] = space.score_base("test")
        bar.update()
        for domain in space.domains:
            singles[f"expert {domain}"] = space.score_expert(domain, "test")
            bar.update()
        for rule, settings, choice in picks:
            scored.append((rule, settings, choice, space.score_merge(rule, settings, "test")))
            bar.update()
    reference = next(scores for rule, _, _, scores in scored if rule.name == REFERENCE)
    differences = {
        rule.name: difference(scores.losses, reference.losses)
        for rule, _, _, scores in scored
        if not rule.control_of and rule.name != REFERENCE
    }
    p_values = holm({name: one.p for name, one in differences.items()})
    rows = [
        Row(
            rule.name,
            settings,
            choice,
            tried[rule.label(settings)].scores,
            scores,
            difference(scores.losses, reference.losses),
            p_values.get(rule.name),
        )
        for rule, settings, choice, scores in scored
    ]
    rows.sort(key=lambda row: mean(row.test.losses))
    first = [
        Row(name, {}, "", None, scores, difference(scores.losses, reference.losses)) for name, scores in singles.items()
    ]
    verdicts = {
        row.name: _verdict(row, [other for other in rows if _is_control_of(other, row, rules)])
        for row in rows
        if row.p is not None
    }
    return Comparison(space.domains, tried, [*first, *rows], verdicts)


def _validate(space: Workspace, rules: Sequence[Rule]) -> dict[str, Candidate]:
    """Scores of every candidate of every rule."""
    candidates = [(rule, settings) for rule in rules for settings in rule.candidates()]
    found = {}
    with _bar("validation", len(candidates)) as bar:
        for rule, settings in candidates:
            found[rule.label(settings)] = Candidate(rule.name, settings, space.score_merge(rule, settings, "val"))
            bar.update()
    return found


def _best(rule: Rule, tried: Mapping[str, Candidate]) -> dict[str, float]:
    """A rule's settings with the lowest mean loss on validation."""
    return min(rule.candidates(), key=lambda settings: mean(tried[rule.label(settings)].scores.losses))


def _is_control_of(row: Row, of: Row, rules: Sequence[Rule]) -> bool:
    return any(rule.name == row.name and rule.control_of == of.name for rule in rules)


def _verdict(row: Row, controls: Sequence[Row]) -> str:
    """What may be said of a rule: against the reference by Holm's p, against each of its controls by twice the standard error."""
    assert row.p is not None
    side = "better" if row.minus_reference.value < 0 else "worse"
    parts = [f"{side} than the tuned lambda" if row.p < BETTER else "no different from the tuned lambda"]
    if controls:
        against = [difference(row.test.losses, control.test.losses) for control in controls]
        beaten = sum(one.value < -2 * one.stderr for one in against)
        parts.append(f"better than {beaten} of its {len(controls)} controls")
    return ", ".join(parts)


def _bar(label: Split | str, total: int) -> Any:
    return tqdm(total=total, desc=label, unit="model", dynamic_ncols=True)
