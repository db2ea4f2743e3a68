"""A table as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from checkpoints.escaping import csv_cell, latex, latex_comment, markdown
from reports.bootstrap import Estimate
from reports.rows import Contents, Row

SCHEMA = 1
DOUBT = "~"
"""Marks what is under two standard errors."""


def to_markdown(table: Contents) -> str:
    """See `Table.to_markdown`."""
    head, rows = _cells(table)
    lines = [[markdown(cell) + mark for cell, mark in row] for row in [head, *rows]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    aligned = [
        [cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    rule = ["-" * width if column < 3 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    printed = ["| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:])]
    remarks = [f"- {markdown(remark)}" for remark in _remarks(table)]
    return "\n".join([*printed, *(["", *remarks] if remarks else [])]) + "\n"


def to_latex(table: Contents) -> str:
    """See `Table.to_latex`."""
    head, rows = _cells(table)
    lines = [" & ".join(latex(cell + mark) for cell, mark in row) + r" \\" for row in [head, *rows]]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{lll{'r' * (len(head) - 3)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *map(latex_comment, _remarks(table)),
            "",
        ]
    )


def _remarks(table: Contents) -> list[str]:
    return [*(f"Warning: {warning}" for warning in table.warnings), *table.notes]


def _cells(table: Contents) -> tuple[list[tuple[str, str]], list[list[tuple[str, str]]]]:
    """Headers and rows for people, of (text, mark): two digits, doubtful gains marked."""
    head = ["method", "models", "AIM", *table.benchmarks, "HV gain", "change %"]
    omegas = {row.omega for row in table.rows if row.omega}
    rows = []
    for row in table.rows:
        scores = [f"{100 * row.entry.scores[name].value:.2f}" for name in table.benchmarks]
        change = row.hv_gain_change_percent
        gains = [
            ("", "") if row.hv_gain is None else (f"{row.hv_gain.value:.2f}", _mark(row.hv_gain)),
            ("", "") if change is None else (f"{change:.2f}", _mark(row.hv_gain_change)),
        ]
        names = [row.method, row.models, _aim_cell(row, several=len(omegas) > 1), *scores]
        rows.append([*((name, "") for name in names), *gains])
    return [(name, "") for name in head], rows


def _aim_cell(row: Row, *, several: bool) -> str:
    """`no`, `yes`, `uniform control`; with omega where the table has several."""
    what = row.aim if row.aim in ("", "no", "yes") else f"{row.aim} control"
    omega = f"omega {row.omega}" if several and row.omega else ""
    return ", ".join(filter(None, (what, omega, row.aim_settings)))


def _mark(estimate: Estimate | None) -> str:
    return f" {DOUBT}" if estimate is not None and estimate.doubtful else ""


def to_csv(table: Contents) -> str:
    """See `Table.to_csv`."""
    text = io.StringIO()
    records = [_record(table, row, _percent) for row in table.rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: csv_cell(value) for name, value in record.items()})
    return text.getvalue()


def to_json(table: Contents) -> str:
    """See `Table.to_json`."""
    rows = []
    for row in table.rows:
        fractions = _record(table, row, float)
        record: dict[str, Any] = {name: None if value == "" else value for name, value in fractions.items()}
        if record["hv_gain_change_percent"] == math.inf:
            record["hv_gain_change_percent"] = None  # which JSON cannot say
        record["source"] = row.entry.source
        record["hv_gain_interval"] = _interval(row.hv_gain)
        record["hv_gain_change_interval"] = _interval(row.hv_gain_change)
        rows.append(record)
    content = {
        "schema": SCHEMA,
        "benchmarks": list(table.benchmarks),
        "rows": rows,
        "notes": list(table.notes),
        "warnings": list(table.warnings),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _interval(estimate: Estimate | None) -> Sequence[float] | None:
    return None if estimate is None or estimate.low is None or estimate.high is None else [estimate.low, estimate.high]


def _record(table: Contents, row: Row, unit: Callable[[float], float]) -> dict[str, Any]:
    """A row under the names of the paper's data, then ours; scores as `unit` turns fractions."""
    columns = row.entry.columns
    gain, change = row.hv_gain, row.hv_gain_change
    return {
        "method": row.method,
        "models": row.models,
        "aim": row.aim,
        **{name: unit(row.entry.scores[name].value) for name in table.benchmarks},
        "hv_gain_published": columns.get("hv_gain_published", ""),
        "hv_population_used": columns.get("hv_population_used", ""),
        "hv_gain": None if gain is None else gain.value,
        "hv_gain_change_percent": row.hv_gain_change_percent,
        "hv_population": "+".join(row.population),
        "omega": row.omega,
        "aim_settings": row.aim_settings,
        "hv_gain_stderr": None if gain is None else gain.stderr,
        "hv_gain_change": None if change is None else change.value,
        "hv_gain_change_stderr": None if change is None else change.stderr,
        "under_two_stderr": _doubts(gain, change),
    }


def _percent(value: float) -> float:
    """In percent, without the noise of multiplying: 0.1707 is 17.07, not 17.070000000000004."""
    short = float(f"{100 * value:.15g}")
    return short if short / 100 == value else 100 * value


def _doubts(gain: Estimate | None, change: Estimate | None) -> str:
    """Which of a row's gains are under two standard errors."""
    named = {"hv_gain": gain, "hv_gain_change": change}
    return "+".join(name for name, estimate in named.items() if estimate is not None and estimate.doubtful)
