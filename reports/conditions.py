"""Whether scores of several files may stand in one table: the same items, asked and graded in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from checkpoints.problems import Problems
from checkpoints.settings import setting
from reports.entries import Conditions, Entry

_NAMED = 3


def check_items(entries: Sequence[Entry], benchmarks: Sequence[str]) -> None:
    """Raise Refusals where two files answered other items of one benchmark."""
    problems = Problems()
    for name in benchmarks:
        known = [entry for entry in entries if name in entry.conditions]
        others = [entry for entry in known if not _same_items(known[0], entry, name)]
        if others:
            first, other = known[0].conditions[name], others[0].conditions[name]
            problems.add(
                f"{name}: expected the same items everywhere, got others in {_list(e.source for e in others)} ({_items(other)}) "
                f"than in {known[0].source} ({_items(first)}). Evaluate all models on the same data with the same {setting('limit')}."
            )
    problems.raise_if_any()


def _same_items(first: Entry, other: Entry, name: str) -> bool:
    mine, two = first.conditions[name], other.conditions[name]
    rows = [entry.scores[name].verdicts for entry in (first, other)]
    if rows[0] is not None and rows[1] is not None and rows[0].rows.tolist() != rows[1].rows.tolist():
        return False
    return mine.items == two.items or (mine.prompts is not None and mine.prompts == two.prompts)


def _items(conditions: Conditions) -> str:
    return f"{conditions.answered} of {conditions.rows} rows"


def differences(entries: Sequence[Entry], benchmarks: Sequence[str]) -> list[str]:
    """What differs in how the files were made, one line for each difference, with the benchmarks it concerns."""
    different: dict[str, list[str]] = {}
    for name in benchmarks:
        known = [entry for entry in entries if name in entry.conditions]
        said = False
        for key in dict.fromkeys(
            name_of_setting for entry in known for name_of_setting in entry.conditions[name].settings
        ):
            values: dict[str, list[str]] = {}
            for entry in known:
                values.setdefault(entry.conditions[name].settings.get(key, "not known"), []).append(entry.source)
            if len(values) > 1:
                said = True
                where = "; ".join(f"{value} in {_list(sources)}" for value, sources in values.items())
                different.setdefault(f"{key} differs: {where}", []).append(name)
        prompts = {entry.conditions[name].prompts for entry in known} - {None}
        if len(prompts) > 1 and not said:
            different.setdefault("the prompts differ", []).append(name)
    return [
        f"{', '.join(names)}: {what}. What differs between these scores is not the models alone."
        for what, names in different.items()
    ]


def partial(entries: Sequence[Entry], benchmarks: Sequence[str]) -> list[str]:
    """A line where benchmarks were answered in part."""
    parts: dict[str, list[str]] = {}
    for name in benchmarks:
        cut = {_items(e.conditions[name]): None for e in entries if name in e.conditions and e.conditions[name].partial}
        for items in cut:
            parts.setdefault(items, []).append(name)
    text = "; ".join(f"{items} of {', '.join(names)}" for items, names in parts.items())
    return [f"partial: {text}. These are no full scores."] if text else []


def _list(sources: Iterable[str]) -> str:
    names = list(sources)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
