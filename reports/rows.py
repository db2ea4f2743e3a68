"""What a table of a comparison holds: rows in order, with everything that is computed for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reports.bootstrap import Estimate
from reports.entries import Entry


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        entry: its results.
        method, models: as printed; `method` is empty for a single model.
        aim: empty for a single model, `no`, `yes`, or a control's name.
        omega: as text, empty without AIM or where it is not known.
        aim_settings: what else sets it apart.
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
class Contents:
    """What a table of a comparison holds.

    Attributes:
        benchmarks: its columns.
        rows: single models first, then merges, each without AIM, with it and with its controls.
        notes: how to read it.
        warnings: what makes its numbers less than they seem.
    """

    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
