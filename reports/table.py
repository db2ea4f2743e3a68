"""The table of a comparison, written in any format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import ArgumentError
from checkpoints.files import write_text
from checkpoints.settings import setting
from reports import formats
from reports.rows import Contents


@dataclass(frozen=True)
class Table(Contents):
    """A comparison."""

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
