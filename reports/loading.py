"""From files to entries: results of evaluate_model.py, and tables of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.problems import Problems
from reports.entries import Entry
from reports.results_files import read_results
from reports.scores_csv import read_scores


def load_results(paths: Iterable[Path | str], progress: Callable[[int], object] = lambda count: None) -> list[Entry]:
    """Read results files (`.json`) and tables of scores (`.csv`).

    Args:
        paths: in the order that the table shall keep.
        progress: told of each file that is read.

    Raises: Refusals: everything that is wrong with any of them.
    """
    problems = Problems()
    entries: list[Entry] = []
    for path in dict.fromkeys(Path(path) for path in paths):
        with problems.collect():
            if path.is_dir():
                raise InputError(f"{path}: is a folder. Give the files in it: {path / '*.json'}.")
            entries += read_scores(path) if path.suffix.lower() == ".csv" else [read_results(path)]
        progress(1)
    problems.raise_if_any()
    return entries
