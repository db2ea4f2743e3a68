"""The table of a comparison: rows in order, with everything that is computed for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints.errors import ArgumentError
from checkpoints.files import write_text
from checkpoints.settings import setting
from reports import formats
from reports.bootstrap import Estimate
from reports.entries import Entry


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        entry: its results.
        method, models: as printed; `method` is empty for a single model.
        aim: empty for a single model, `no`, `yes`, or a control's name.
        omega: as text, empty without AIM or where it is not known; aim_settings: what else sets it apart.
        population: labels of the models that HV gain is measured against; empty where there is no gain.
        hv_gain: None for a single model, or where no population is known.
        hv_gain_change: HV gain minus that of the same merge without AIM.
        hv_gain_change_percent: that, in percent of the latter; infinite from 0 to more, None from 0 to 0.
        score_changes: score minus that of the same merge without AIM, as a fraction, by benchmark.
    """

    entry: Entry
    method: str
    models: str
    aim: str
    omega: str = ""
    aim_settings: str = ""
    population: tuple[str, ...] = ()
    hv_gain: Estimate | None = None
    hv_gain_change: Estimate | None = None
    hv_gain_change_percent: float | None = None
    score_changes: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """All of it, for figures and messages."""
        relaxed = {"": "", "no": "", "yes": "AIM"}.get(self.aim, self.aim)
        omega = f"omega {self.omega}" if self.omega else ""
        return " ".join(filter(None, (self.method, self.models, relaxed, omega, self.aim_settings)))


@dataclass(frozen=True)
class Table:
    """A comparison.

    Attributes:
        benchmarks: its columns.
        rows: single models first, then merges, each without AIM, with it and with its controls.
        notes: how to read it; warnings: what makes its numbers less than they seem.
    """

    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Aligned, two digits, scores in percent; notes below."""
        return formats.to_markdown(self)

    def to_latex(self) -> str:
        """A tabular of the booktabs package, two digits; notes as comments."""
        return formats.to_latex(self)

    def to_csv(self) -> str:
        """Scores in percent, unrounded; can be read again."""
        return formats.to_csv(self)

    def to_json(self) -> str:
        """Scores as fractions, unrounded, with standard errors and intervals."""
        return formats.to_json(self)

    def to_text(self, path: Path) -> str:
        """In the format that a file's suffix names. Raises ArgumentError: none of them."""
        _check_suffix(path)
        return FORMATS[path.suffix.lower()](self)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all. Raises InputError: as `to_text`, or it cannot be written."""
        write_text(path, self.to_text(path), name="out")


FORMATS = {".md": Table.to_markdown, ".csv": Table.to_csv, ".json": Table.to_json, ".tex": Table.to_latex}


def check_out(path: Path, read: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ArgumentError where a table may not be written: another suffix, a folder, a file that is there, or one of those
    that are `read`."""
    _check_suffix(path)
    if path.is_dir():
        raise ArgumentError(f"{setting('out', path)}: is a folder. Give a file in it: {path / 'table.md'}.")
    if any(path.resolve() == file.resolve() for file in read):
        raise ArgumentError(f"{setting('out', path)}: is one of the files that are read. Choose another file.")
    if path.exists() and not overwrite:
        raise ArgumentError(f"{setting('out', path)}: exists. Choose another file, or add {setting('overwrite')}.")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(
            f"{setting('out', path)}: expected a file that ends in {', '.join(FORMATS)}. Name such a file."
        )
