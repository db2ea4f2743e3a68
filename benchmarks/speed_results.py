"""What was measured: one row for each case and setting, kept in a JSON file, with the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "merge-speed/1"


@dataclass(frozen=True)
class Setting:
    """What is measured on: parameters of the model, number of fine-tunes, cores."""

    parameters: int
    models: int
    cores: int

    def __str__(self) -> str:
        many = f"{self.models} fine-tune{'s' if self.models > 1 else ''}"
        return (
            f"{self.parameters / 1e9:.3g} billion parameters, {many}, {self.cores} core{'s' if self.cores > 1 else ''}"
        )


@dataclass
class Row:
    """One case in one setting.

    kind: floor, merge, peer, calibration, start or profile; case: its name.
    floor: the case of kind floor that moves the same bytes; other: the merge it is compared with; empty where there is none.
    values: what was measured -> its value in each round (`seconds`, `stream_s`, `cpu_s`, `peak_bytes`, `bytes_read`, ...);
        `floor_s` and `other_s` are the seconds of those two in the same rounds.
    note: why there are no values; extra: what is no number.
    """

    kind: str
    case: str
    setting: Setting
    floor: str = ""
    other: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, values: Mapping[str, float | None]) -> None:
        """One more round."""
        for name, value in values.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        """Over the rounds; None where it was not measured."""
        return statistics.median(self.values[name]) if self.values.get(name) else None

    def times(self, base: str, name: str = "seconds") -> float | None:
        """How many times the value `base` the value `name` is: the median over the rounds, in each of which both were taken."""
        if not self.values.get(name) or not self.values.get(base):
            return None
        return statistics.median(one / two for one, two in zip(self.values[name], self.values[base], strict=True))

    @property
    def bytes_moved(self) -> float:
        """Read and written."""
        return (self.median("bytes_read") or 0) + (self.median("bytes_written") or 0)


def note_compared(rows: Sequence[Row]) -> None:
    """Give the rows of one run, which took turns, the seconds of their floors and of the merges they are compared with.

    They stay with the row: a later run measures the floor anew, in rounds of its own.
    """
    seconds = {(row.kind, row.case): row.values.get("seconds") for row in rows}
    for row in rows:
        for name, key in (("floor_s", ("floor", row.floor)), ("other_s", ("merge", row.other))):
            if row.values.get("seconds") and seconds.get(key):
                row.values[name] = list(seconds[key] or ())


@dataclass
class Results:
    """Rows and the machine; `peer`: the versions of what was measured beside ours."""

    machine: str
    rows: list[Row] = field(default_factory=list)
    peer: str = ""

    def find(self, kind: str, case: str, setting: Setting) -> Row | None:
        """One row."""
        return next((row for row in self.of(kind) if (row.case, row.setting) == (case, setting)), None)

    def of(self, *kinds: str) -> list[Row]:
        """Rows of some kinds, in the order in which they were measured."""
        return [row for row in self.rows if row.kind in kinds]

    def put(self, rows: Iterable[Row]) -> None:
        """Add rows; one of the same kind, case and setting that was there before goes."""
        for row in rows:
            old = self.find(row.kind, row.case, row.setting)
            if old is None:
                self.rows.append(row)
            else:
                self.rows[self.rows.index(old)] = row

    def save(self, path: Path) -> None:
        """As JSON."""
        content = {"schema": SCHEMA, "machine": self.machine, "peer": self.peer, "rows": [asdict(r) for r in self.rows]}
        path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Results:
    """Read what `Results.save` wrote. Raises ValueError: something else."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected results of merge_speed.py ({SCHEMA}), got something else")
    rows = [Row(**{**row, "setting": Setting(**row["setting"])}) for row in content["rows"]]
    return Results(content["machine"], rows, content["peer"])


def machine_line(versions: Mapping[str, str]) -> str:
    """Processor, cores, memory, system and versions, in a line; whether it has SHA instructions, which digests use."""
    cores, memory = os.cpu_count(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    model, sha = _processor()
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{model}, {cores} cores{sha}, {memory:.0f} GB memory, {system}, Python {sys.version.split()[0]}, {named}"


def _processor() -> tuple[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", entries.get("Features", "")).split()
    sha = "with" if {"sha_ni", "sha2"} & set(flags) else "without"
    return entries.get("model name", platform.machine()), f" {sha} SHA instructions"
