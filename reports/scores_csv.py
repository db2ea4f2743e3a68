"""Tables of scores in percent, such as the paper's: one model a row."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.escaping import csv_text
from checkpoints.problems import Problems
from reports.entries import BENCHMARKS, CONTROLS, Aim, Entry, Merge, ModelId, Score

NEEDED = ("method", "models", "aim")


def read_scores(path: Path) -> list[Entry]:
    """Read a CSV of scores.

    Columns: `method` (empty for a single model), `models` (its name, or those that were merged, `code+math`), `aim` (`yes`,
    `no`, or a control's name), scores in percent by benchmark, and, where they are there, `omega` and `aim_settings`.

    Raises: InputError: it is no such table; Refusals: every row that is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Give a CSV of scores.") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV in UTF-8, got something else ({error}). Save it as such.") from None
    missing = [name for name in NEEDED if name not in columns]
    benchmarks = [name for name in BENCHMARKS if name in columns]
    if missing or not benchmarks or len(set(columns)) < len(columns):
        raise InputError(
            f"{path}: expected columns {', '.join(NEEDED)} and benchmarks such as {', '.join(BENCHMARKS[:2])}, each once, got {', '.join(map(str, columns)) or 'nothing'}. Give a table of scores."
        )
    entries: list[Entry] = []
    problems = Problems()
    for line, row in rows:
        with problems.collect():
            entries.append(_read_row(f"{path}: line {line}", row, columns, benchmarks))
    if not rows:
        problems.add(InputError(f"{path}: expected a row for each model, got none. Give a table of scores."))
    values = [score.value for entry in entries for score in entry.scores.values()]
    if values and not problems and 0 < max(values) <= 0.01:
        problems.add(InputError(f"{path}: expected scores in percent, got none above 1. Multiply fractions by 100."))
    problems.raise_if_any()
    return entries


def _read_row(
    where: str, row: Mapping[str | None, str | None], columns: Sequence[str], benchmarks: Sequence[str]
) -> Entry:
    if None in row or None in row.values():
        raise InputError(
            f"{where}: expected {len(columns)} values as in the first line, got another number. Mend the row."
        )
    cells = {name: csv_text((row[name] or "").strip()) for name in columns}
    scores = {name: Score(_percent(f"{where}: {name}", cells[name])) for name in benchmarks if cells[name]}
    if not cells["models"]:
        raise InputError(f"{where}: expected a model's name in 'models', got nothing. Mend the row.")
    merge, aim = _read_merge(where, cells)
    name = (
        cells["models"] if merge is None else " ".join(filter(None, (cells["method"], cells["models"], cells["aim"])))
    )
    return Entry(where, ModelId(name), scores, merge, aim, columns=cells)


def _read_merge(where: str, cells: Mapping[str, str]) -> tuple[Merge | None, Aim | None]:
    aim, method = cells["aim"].lower(), cells["method"]
    if not method:
        if aim not in ("", "no"):
            raise InputError(
                f"{where}: expected nothing in 'aim' of a single model, got '{aim}'. Name its method, or leave aim empty."
            )
        return None, None
    if aim not in ("yes", "no", *CONTROLS):
        raise InputError(
            f"{where}: expected yes, no, {', '.join(CONTROLS[:-1])} or {CONTROLS[-1]} in 'aim', got '{aim}'. Mend the row."
        )
    models = tuple(ModelId(name.strip()) for name in cells["models"].split("+"))
    merge = Merge(method, models, {}, f"{method} {'+'.join(sorted(model.name for model in models))}")
    if aim == "no":
        return merge, None
    settings = cells.get("aim_settings", "")
    return merge, Aim(cells.get("omega", ""), "" if aim == "yes" else aim, {"settings": settings} if settings else {})


def _percent(where: str, text: str) -> float:
    """A score as a fraction."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise InputError(f"{where}: expected a score in percent, from 0 to 100, got '{text}'. Mend the row.")
    return value / 100
