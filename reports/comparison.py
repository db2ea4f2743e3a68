"""From entries to a table: which rows belong together, hypervolume gains, changes, and how sure they are."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.problems import Problems
from checkpoints.settings import setting
from reports import conditions
from reports.bootstrap import Estimate, Floats, estimate, resample
from reports.entries import BENCHMARKS, CONTROLS, PAPER, UNKNOWN_METHOD, Entry, Merge
from reports.formats import DOUBT
from reports.hypervolume import hv_gain, hv_gains
from reports.labels import Labels
from reports.populations import NoPopulation, Population, choose
from reports.recipes import checkpoint_key
from reports.rows import Row
from reports.table import Table

RESAMPLES = 2000


def compare(
    entries: Sequence[Entry],
    population: str | Sequence[str] | None = None,
    benchmarks: Sequence[str] | None = None,
) -> Table:
    """Compare merges with the models they were merged from, and AIM with the same merge without it.

    Args:
        entries: from `load_results`, at least one.
        population: the models that hypervolume gain is measured against; see `populations.choose`.
        benchmarks: columns; None for those of the paper's six that any entry has.

    Raises: Refusals, InputError: scores are missing, a model is there twice, files answered other items, a name is not clear.
    """
    if not entries:
        raise InputError("expected results of at least one model, got none. Give results files.")
    names = choose_benchmarks(entries, benchmarks)
    entries = _recognise_merges(entries)
    _check_twice(entries)
    conditions.check_items(entries, names)
    labels = Labels(entries)
    ordered = _in_order(entries, labels)
    population_of, phrase = choose(population, ordered, labels)
    draws = dict(zip(ordered, draw_scores(ordered, names), strict=True))
    gains = _Gains(names, draws)
    remarks: list[str] = []
    rows = [_row(entry, ordered, labels, population_of, gains, remarks) for entry in ordered]
    notes = [*_how_to_read(rows, names, phrase), *_how_sure(rows, ordered, draws, names), *remarks]
    notes += [note for entry in ordered for note in entry.notes]
    warnings = [*conditions.partial(ordered, names), *conditions.differences(ordered, names), *_mixed(ordered)]
    return Table(tuple(names), tuple(rows), tuple(notes), tuple(warnings))


def _row(
    entry: Entry,
    entries: Sequence[Entry],
    labels: Labels,
    population_of: Callable[[Entry], Population],
    gains: _Gains,
    remarks: list[str],
) -> Row:
    """One entry with its gain and its changes; what cannot be computed is left out, and `remarks` says why."""
    merge, aim = entry.merge, entry.aim
    if merge is None:
        return Row(entry, "", labels.model(entry.model), "")
    row = Row(entry, labels.method(merge), labels.models(merge.models), "no")
    plain = None
    if aim is not None:
        row = replace(row, aim=aim.control or "yes", omega=aim.omega, aim_settings=labels.aim(merge, aim))
        plain = next((member for member in entries if _is_plain(member, merge)), None)
        if plain is None:
            remarks.append(f"{row.label}: no results of the same merge without AIM, so no change.")
        else:
            row = replace(row, score_changes=gains.score_changes(entry, plain))
    try:
        population = population_of(entry)
    except NoPopulation as error:
        remarks.append(f"{row.label}: no HV gain: {error}.")
        return row
    named = tuple(labels.model(member.model) for member in population)
    row = replace(row, population=named, hv_gain=gains.of(entry, population))
    if plain is None:
        return row
    if _population_or_none(population_of, plain) != population:
        remarks.append(
            f"{row.label}: the same merge without AIM is measured against other models, so no change of HV gain."
        )
        return row
    change, percent = gains.change(entry, plain, population)
    return replace(row, hv_gain_change=change, hv_gain_change_percent=percent)


def _population_or_none(population_of: Callable[[Entry], Population], entry: Entry) -> Population | None:
    try:
        return population_of(entry)
    except NoPopulation:
        return None


def choose_benchmarks(entries: Sequence[Entry], benchmarks: Sequence[str] | None) -> tuple[str, ...]:
    """The columns. Raises ArgumentError: an unknown name; Refusals: scores that are missing."""
    for name in benchmarks or ():
        if name not in BENCHMARKS:
            raise ArgumentError(f"{setting('benchmarks')}: {unknown('benchmark', name, BENCHMARKS)}")
    there = {name for entry in entries for name in entry.scores}
    names = tuple(
        name for name in BENCHMARKS if name in (benchmarks or PAPER) and name in there | set(benchmarks or ())
    )
    if not names:
        raise InputError(f"expected scores of {', '.join(PAPER)}, got none of them. Evaluate these benchmarks.")
    everywhere = [name for name in names if all(name in entry.scores for entry in entries)]
    remedy = f", or leave them out of the table: {setting('benchmarks', ','.join(everywhere))}" if everywhere else ""
    problems = Problems(
        InputError(
            f"{entry.source}: expected scores of {', '.join(names)}, got none of {', '.join(missing)}. Evaluate these{remedy}."
        )
        for entry in entries
        if (missing := [name for name in names if name not in entry.scores])
    )
    problems.raise_if_any()
    return names


def draw_scores(entries: Sequence[Entry], benchmarks: Sequence[str]) -> list[Floats | None]:
    """Scores as they might have come out: `[RESAMPLES, benchmarks]` for each entry, None where a standard error is not known.

    Where the verdicts on a benchmark's items are known, resampled items, the same for all entries; elsewhere a normal
    distribution of the score's standard error, cut off at 0 and 1, independent of all others.
    """
    columns: dict[tuple[int, str], Floats] = {}
    for name in benchmarks:
        paired = [(index, entry.scores[name].verdicts) for index, entry in enumerate(entries)]
        known = [(index, verdicts) for index, verdicts in paired if verdicts is not None]
        if known:
            drawn = resample(name, [verdicts for _, verdicts in known], resamples=RESAMPLES)
            columns |= {(index, name): drawn[:, column] for column, (index, _) in enumerate(known)}
        for index, entry in enumerate(entries):
            score = entry.scores[name]
            if score.verdicts is None and score.stderr is not None:
                generator = np.random.default_rng([index, zlib.crc32(name.encode())])
                normal = generator.normal(score.value, score.stderr, RESAMPLES)
                columns[index, name] = np.clip(normal, 0.0, 1.0)
    return [
        np.stack([columns[index, name] for name in benchmarks], axis=1)
        if all((index, name) in columns for name in benchmarks)
        else None
        for index in range(len(entries))
    ]


class _Gains:
    """Gains and changes of entries, with their draws.

    Args:
        benchmarks: of the table.
        draws: entry -> `[draws, benchmarks]`.
    """

    def __init__(self, benchmarks: Sequence[str], draws: Mapping[Entry, Floats | None]):
        self._benchmarks, self._draws = benchmarks, draws
        self._known: dict[tuple[Entry, ...], tuple[float, Floats | None]] = {}

    def of(self, entry: Entry, population: Sequence[Entry]) -> Estimate:
        """HV gain."""
        return estimate(*self._gain(entry, population))

    def change(self, entry: Entry, plain: Entry, population: Sequence[Entry]) -> tuple[Estimate, float | None]:
        """HV gain minus that of the plain merge, and in percent of it: infinite from 0 to more, None from 0 to 0."""
        after, before = self._gain(entry, population), self._gain(plain, population)
        difference = after[0] - before[0]
        percent = 100 * difference / before[0] if before[0] else math.inf if difference else None
        return estimate(difference, _difference(after[1], before[1])), percent

    def score_changes(self, entry: Entry, plain: Entry) -> dict[str, Estimate]:
        """Score minus that of the plain merge, by benchmark."""
        drawn = _difference(self._draws[entry], self._draws[plain])
        return {
            name: estimate(
                entry.scores[name].value - plain.scores[name].value, None if drawn is None else drawn[:, column]
            )
            for column, name in enumerate(self._benchmarks)
        }

    def _gain(self, entry: Entry, population: Sequence[Entry]) -> tuple[float, Floats | None]:
        everyone = (entry, *population)
        if everyone not in self._known:
            scores = np.array([[member.scores[name].value for name in self._benchmarks] for member in everyone])
            drawn = [draw for member in everyone if (draw := self._draws[member]) is not None]
            sure = len(drawn) == len(everyone)
            gains = hv_gains(np.stack(drawn[1:], axis=1), drawn[0]) if sure else None
            self._known[everyone] = hv_gain(scores[1:], scores[0]), gains
        return self._known[everyone]


def _difference(after: Floats | None, before: Floats | None) -> Floats | None:
    return None if after is None or before is None else after - before


def _recognise_merges(entries: Sequence[Entry]) -> list[Entry]:
    """A checkpoint without a recipe that another one was relaxed from is a merge, of which no more is known."""
    keys = {entry.merge.key for entry in entries if entry.merge is not None}
    return [
        replace(entry, merge=Merge(UNKNOWN_METHOD, (entry.model,), {}, key))
        if entry.merge is None and (key := checkpoint_key(entry.model)) in keys
        else entry
        for entry in entries
    ]


def _check_twice(entries: Sequence[Entry]) -> None:
    """Raise Refusals where two entries are of one model, or of the same merge made twice."""
    problems = Problems(
        InputError(f"{first.source} and {two.source}: are results of the same model. Leave one of them out.")
        for first, two in combinations(entries, 2)
        if _same(first, two)
    )
    problems.raise_if_any()


def _same(first: Entry, two: Entry) -> bool:
    if first.merge is None or two.merge is None:
        return first.merge is two.merge and first.model.likeness(two.model) > 1
    return first.merge.key == two.merge.key and first.aim == two.aim


def _is_plain(entry: Entry, merge: Merge) -> bool:
    return entry.merge is not None and entry.merge.key == merge.key and entry.aim is None


def _in_order(entries: Sequence[Entry], labels: Labels) -> list[Entry]:
    """Single models, then merges by method and models, each in order of appearance; within a merge by omega, AIM before its
    controls."""
    methods = list(dict.fromkeys(entry.merge.method for entry in entries if entry.merge))
    groups = list(dict.fromkeys(labels.models(entry.merge.models) for entry in entries if entry.merge))
    keys = list(dict.fromkeys(entry.merge.key for entry in entries if entry.merge))
    ranks = ("", *CONTROLS)

    def place(entry: Entry) -> tuple[float | int, ...]:
        merge, aim = entry.merge, entry.aim
        if merge is None:
            return (0,)
        where = (1, methods.index(merge.method), groups.index(labels.models(merge.models)), keys.index(merge.key))
        return (*where, 0) if aim is None else (*where, 1, _number(aim.omega), ranks.index(aim.control))

    return sorted(entries, key=place)


def _number(omega: str) -> float:
    try:
        return float(omega)
    except ValueError:
        return math.inf


def _how_to_read(rows: Sequence[Row], benchmarks: Sequence[str], phrase: str) -> list[str]:
    notes = ["Scores in percent."]
    if any(row.hv_gain is not None for row in rows):
        exponent = f"1/{len(benchmarks)}"
        few = "" if len(benchmarks) == len(PAPER) else f", {len(benchmarks)} benchmarks, so not the paper's scale"
        notes.append(
            f"HV gain: (HV(P and the merge) - HV(P))^({exponent}) of fractions, reference point 0, P: {phrase}{few}."
        )
    if any(row.hv_gain_change is not None for row in rows):
        notes.append("change %: of HV gain, against the same merge without AIM; inf from a gain of 0.")
    omegas = {row.omega for row in rows if row.omega}
    return [*notes, f"AIM: omega {omegas.pop()}."] if len(omegas) == 1 else notes


def _how_sure(
    rows: Sequence[Row], entries: Sequence[Entry], draws: Mapping[Entry, Floats | None], benchmarks: Sequence[str]
) -> list[str]:
    """What the mark means, and where the standard errors come from."""
    if all(row.hv_gain is None for row in rows):
        return []
    if all(draws[entry] is None for entry in entries):
        return ["No standard errors are known, so that nothing can be marked as too small to tell from chance."]
    parametric = [name for name in benchmarks if any(entry.scores[name].verdicts is None for entry in entries)]
    how = "over items, the same for all models" if len(parametric) < len(benchmarks) else ""
    if parametric:
        rest = f" ({', '.join(parametric)})" if how else ""
        how = "; ".join(filter(None, (how, f"from each score's standard error, models independent{rest}")))
    unsure = [entry.source for entry in entries if draws[entry] is None]
    lacking = f" None are known for {', '.join(unsure)}." if unsure else ""
    return [f"{DOUBT} under two standard errors. Standard errors: bootstrap, {RESAMPLES} draws, {how}.{lacking}"]


def _mixed(entries: Sequence[Entry]) -> list[str]:
    """A warning where scores of unknown origin stand beside results."""
    unknown_origin = {entry.source.partition(": line ")[0] for entry in entries if not entry.conditions}
    if len(unknown_origin) == 0 or all(not entry.conditions for entry in entries):
        return []
    return [
        f"{', '.join(sorted(unknown_origin))}: says nothing of how its scores were made; whether they are comparable is not known."
    ]
