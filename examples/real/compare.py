"""Choose every rule's settings on validation, score the choices once on test, and say what is better than a tuned lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.real.domains import Split
from examples.real.pool import Job, Pool
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
class Option:
    """A variant of a rule, on validation.

    Attributes:
        name: of the variant.
        settings: its best ones.
        validation: its loss.
        of: the rule's name.
        minus_rule: its loss minus the rule's at that one's best settings, paired by document.
    """

    name: str
    settings: Settings
    validation: float
    of: str
    minus_rule: Difference


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        domains: in the order of the models.
        tried: label -> candidate, of all that were scored on validation.
        rows: single models first, then by test loss.
        options: variants of rules.
        verdicts: rule -> sentence.
    """

    domains: Sequence[str]
    tried: Mapping[str, Candidate]
    rows: Sequence[Row]
    options: Sequence[Option]
    verdicts: Mapping[str, str]


def compare(space: Workspace, rules: Sequence[Rule], pool: Pool) -> Comparison:
    """Merge and score what is missing, and compare.

    Args:
        space: with texts and experts.
        rules: `REFERENCE` is one of them, and so is the rule of every control.
        pool: does the work.

    Raises: CommandFailed.
    """
    with pool.running():
        _score_validation(space, rules, pool)
        tried = {
            rule.label(settings): Candidate(rule.name, settings, space.scores(rule.label(settings), "val"))
            for rule in rules
            for settings in rule.candidates()
        }
        best = {rule.name: _best(rule, tried) for rule in rules}
        picks = _picks(rules, best)
        _score_test(space, picks, pool)
    rows = _rows(space, picks, tried)
    verdicts = {
        row.name: _verdict(row, [other for other in rows if _is_control_of(other, row, rules)])
        for row in rows
        if row.p is not None
    }
    return Comparison(space.domains, tried, rows, _options(rules, best, tried), verdicts)


Pick = tuple[Rule, dict[str, float], str]
"""A rule, settings, and where they come from, see `Row.choice`."""


def _picks(rules: Sequence[Rule], best: Mapping[str, dict[str, float]]) -> list[Pick]:
    """What is scored on test: every rule at its best settings, and every control at its rule's too where those are others."""
    own: list[Pick] = [(rule, best[rule.name], "own") for rule in rules if not rule.variant_of]
    controls = [rule for rule in rules if rule.control_of and best[rule.control_of] != best[rule.name]]
    return [*own, *((rule, best[rule.control_of], "rule") for rule in controls)]


def _score_validation(space: Workspace, rules: Sequence[Rule], pool: Pool) -> None:
    """Train, calibrate and score every candidate, as far as it has not been done."""
    missing: list[Job] = [
        (space.score_line, (rule, line, *_splits(rule)))
        for rule in rules
        for line in rule.lines()
        if not all(space.is_done(rule.label(settings), "val") for settings in line)
    ]
    if missing:
        pool.do([(space.expert, (domain,)) for domain in space.domains], "experts")
        space.calibrate()
        pool.do(missing, "validation")


def _score_test(space: Workspace, picks: Sequence[Pick], pool: Pool) -> None:
    """Score the base, the experts and what was picked on test, as far as it has not been done."""
    jobs: list[tuple[str, Job]] = [("base", (space.score_base, ("test",)))]
    jobs += [(f"expert {domain}", (space.score_expert, (domain, "test"))) for domain in space.domains]
    jobs += [(rule.label(settings), (space.score_merge, (rule, settings, "test"))) for rule, settings, _ in picks]
    missing = [job for label, job in jobs if not space.is_done(label, "test")]
    if missing:
        pool.do(missing, "test")


def _rows(space: Workspace, picks: Sequence[Pick], tried: Mapping[str, Candidate]) -> list[Row]:
    """The table: single models, then what was picked by its loss on test, with p-values over the rules."""
    scored = [(rule, settings, choice, space.scores(rule.label(settings), "test")) for rule, settings, choice in picks]
    reference = next(scores for rule, _, _, scores in scored if rule.name == REFERENCE)

    def minus_reference(scores: Scores) -> Difference:
        return difference(scores.losses, reference.losses)

    compared = [(rule.name, scores) for rule, _, _, scores in scored if not rule.control_of and rule.name != REFERENCE]
    p_values = holm({name: minus_reference(scores).p for name, scores in compared})
    rows = []
    for rule, settings, choice, scores in scored:
        candidate = tried.get(rule.label(settings))
        validation = candidate.scores if candidate else None
        rows.append(
            Row(rule.name, settings, choice, validation, scores, minus_reference(scores), p_values.get(rule.name))
        )
    names = ("base", *(f"expert {domain}" for domain in space.domains))
    singles = [(name, space.scores(name, "test")) for name in names]
    first = [Row(name, {}, "", None, scores, minus_reference(scores)) for name, scores in singles]
    return [*first, *sorted(rows, key=lambda row: mean(row.test.losses))]


def _options(
    rules: Sequence[Rule], best: Mapping[str, dict[str, float]], tried: Mapping[str, Candidate]
) -> list[Option]:
    """Every variant of a rule beside it, on validation."""
    losses = {rule.name: tried[rule.label(best[rule.name])].scores.losses for rule in rules}
    return [
        Option(
            rule.name,
            best[rule.name],
            mean(losses[rule.name]),
            rule.variant_of,
            difference(losses[rule.name], losses[rule.variant_of]),
        )
        for rule in rules
        if rule.variant_of
    ]


def _splits(rule: Rule) -> tuple[Split, ...]:
    """What a merge is scored on while it is there: on test too, where a rule has nothing to choose."""
    return ("val", "test") if len(rule.candidates()) == 1 and not rule.variant_of else ("val",)


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
