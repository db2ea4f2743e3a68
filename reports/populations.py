"""The models that hypervolume gain is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.settings import setting
from reports.entries import BENCHMARKS, UNKNOWN_METHOD, Entry, find
from reports.labels import Labels

Population = tuple[Entry, ...]
_NO_POPULATIONS = ("method", "aim", "omega", "aim_settings", *BENCHMARKS)


class NoPopulation(Exception):
    """A merge whose gain cannot be computed; the message says why, and what to do."""


def choose(
    population: str | Sequence[str] | None, entries: Sequence[Entry], labels: Labels
) -> tuple[Callable[[Entry], Population], str]:
    """How each merge's population is found, and a phrase that says so.

    Args:
        population: names of models, comma-separated or as a list; or a column of a CSV that names them (`code+math`); None for the
            models that were merged.
        entries: all there are.

    Returns: a function that raises NoPopulation for a merge without one, and InputError where a name is not known or means
        several models; a phrase for the table's notes.
    Raises: ArgumentError: `population` names neither.
    """
    if population is None:
        return (lambda entry: _merged(entry, entries)), "the models that were merged"
    names = [name.strip() for name in (population.split(",") if isinstance(population, str) else population)]
    known = {name for entry in entries for name in _names(entry, labels)}
    if all(name in known for name in names):
        fixed = tuple(dict.fromkeys(_named(name, entries, labels) for name in names))
        return (lambda entry: fixed), ", ".join(labels.model(entry.model) for entry in fixed)
    columns = {name for entry in entries for name in entry.columns} - set(_NO_POPULATIONS)
    if len(names) == 1 and names[0] in columns:
        return (lambda entry: _in_column(entry, names[0], entries, labels)), f"the models in the column {names[0]}"
    missing = next(name for name in names if name not in known)
    raise ArgumentError(
        f"{setting('population')}: {unknown('model', missing, known | (columns if len(names) == 1 else set()))}"
    )


def _merged(entry: Entry, entries: Sequence[Entry]) -> Population:
    assert entry.merge is not None
    if entry.merge.method == UNKNOWN_METHOD:
        raise NoPopulation("how it was merged is not recorded. Name the models as the population")
    singles = [other for other in entries if other.merge is None]
    merges = [other for other in entries if other.merge is not None and other is not entry]
    entries_of = [find(model, singles) or find(model, merges) for model in entry.merge.models]
    missing = [model.name for model, match in zip(entry.merge.models, entries_of, strict=True) if match is None]
    if missing:
        raise NoPopulation(f"there are no results of {', '.join(missing)}. Give them, or name others as the population")
    return tuple(match for match in entries_of if match is not None)


def _in_column(entry: Entry, column: str, entries: Sequence[Entry], labels: Labels) -> Population:
    cell = entry.columns.get(column, "")
    if not cell:
        raise NoPopulation(f"its column {column} is empty. Fill it in")
    try:
        return tuple(dict.fromkeys(_named(name.strip(), entries, labels) for name in cell.split("+")))
    except InputError as error:
        raise InputError(f"{entry.source}: {column}: {error}") from None


def _names(entry: Entry, labels: Labels) -> tuple[str, ...]:
    return (entry.model.name, entry.model.short, labels.model(entry.model))


def _named(name: str, entries: Sequence[Entry], labels: Labels) -> Entry:
    """The one entry of a name, a single model before merges. Raises InputError: none, or several."""
    fitting = [entry for entry in entries if name in _names(entry, labels)]
    single = [entry for entry in fitting if entry.merge is None] or fitting
    if not single:
        raise InputError(unknown("model", name, {known for entry in entries for known in _names(entry, labels)}))
    if len(single) > 1:
        raise InputError(f"'{name}' is the name of {', '.join(entry.source for entry in single)}. Use a longer name.")
    return single[0]
