"""The comparison as a Markdown table, as JSON and as figures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from examples.real.compare import Comparison, Row
from examples.real.rules import Settings
from examples.real.statistics import mean
from reports.figures import STYLE, save, subplots

SHOWN = 0.4
CUT = 2.5
"""Times the largest difference of a rule, beyond which a control's bar is cut off."""
"""Nats above the best that a curve is drawn for."""


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.json and the figures, in a folder that is made where it is missing. Returns: the files."""
    folder.mkdir(exist_ok=True)
    table, data = folder / "table.md", folder / "table.json"
    table.write_text(as_markdown(found))
    data.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return [table, data, *draw(found, folder)]


def as_markdown(found: Comparison) -> str:
    """Single models, then merges by test loss, and a sentence for each rule."""
    header = ["model", "settings", "validation", "test", *found.domains, "exact", "minus tuned lambda", "p (Holm)"]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in found.rows]
    experts = [
        row.test.losses[domain] for domain in found.domains for row in found.rows if row.name == f"expert {domain}"
    ]
    own = sum(sum(values) / len(values) for values in experts) / len(experts)
    lines += ["", f"Each expert on its own domain: {own:.4f}.", ""]
    lines += [f"- {name}: {verdict}." for name, verdict in found.verdicts.items()]
    if found.options:
        lines += [
            "",
            "On validation alone:",
            "",
            "| variant | settings | validation | minus | |",
            "|---|---|---:|---|---:|",
        ]
        lines += [
            f"| {one.name} | {_named(one.settings)} | {one.validation:.4f} | {one.of} | {one.minus_rule.value:+.4f} ± {one.minus_rule.stderr:.4f} |"
            for one in sorted(found.options, key=lambda one: (one.of, one.validation))
        ]
    return "\n".join(lines) + "\n"


def _named(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _cells(row: Row) -> list[str]:
    settings = _named(row.settings)
    settings += " (its rule's)" if row.choice == "rule" else ""
    validation = f"{mean(row.validation.losses):.4f}" if row.validation else ""
    each = [f"{sum(values) / len(values):.4f}" for values in row.test.losses.values()]
    one = row.minus_reference
    against = f"{one.value:+.4f} ± {one.stderr:.4f}" if one.stderr else ""
    p = "" if row.p is None else "< 0.0001" if row.p < 0.0001 else f"{row.p:.4f}"
    exact = f"{100 * row.test.exact_share:.1f} %"
    return [row.name, settings, validation, f"{mean(row.test.losses):.4f}", *each, exact, against, p]


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything that the table has, in full, and every candidate's validation loss."""
    rows = [
        {
            "name": row.name,
            "settings": dict(row.settings),
            "settings_from": row.choice or None,
            "validation": mean(row.validation.losses) if row.validation else None,
            "test": mean(row.test.losses),
            "domains": {domain: sum(values) / len(values) for domain, values in row.test.losses.items()},
            "exact": row.test.exact_share,
            "minus_reference": {"value": row.minus_reference.value, "stderr": row.minus_reference.stderr},
            "p_holm": row.p,
        }
        for row in found.rows
    ]
    tried = [
        {"rule": one.rule, "settings": dict(one.settings), "validation": mean(one.scores.losses)}
        for one in found.tried.values()
    ]
    documents = {domain: len(values) for domain, values in found.rows[0].test.losses.items()}
    options = {
        one.name: {
            "settings": dict(one.settings),
            "validation": one.validation,
            "rule": one.of,
            "minus_rule": one.minus_rule.value,
            "stderr": one.minus_rule.stderr,
        }
        for one in found.options
    }
    return {
        "documents": documents,
        "rows": rows,
        "validation": tried,
        "options": options,
        "verdicts": dict(found.verdicts),
    }


def draw(found: Comparison, folder: Path) -> list[Path]:
    """Validation loss over lambda and omega, and the differences on test with 95 % intervals; each as PNG and SVG."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        curves = [path for key in ("lambda", "omega") for path in _curves(found, folder, key)]
        return [*curves, *save(_difference_figure(found), folder, "differences")]


def _curves(found: Comparison, folder: Path, key: str) -> list[Path]:
    """The figure of a setting, where a rule tried several values of it."""
    lines = _points(found, key)
    return save(_curve_figure(lines, key), folder, key) if lines else []


def _points(found: Comparison, key: str) -> dict[str, dict[float, float]]:
    """Rule -> value of a setting -> validation loss, the best of its other settings; of rules that tried several values."""
    lines: dict[str, dict[float, float]] = {}
    for one in found.tried.values():
        if key in one.settings:
            points, value = lines.setdefault(one.rule, {}), mean(one.scores.losses)
            points[one.settings[key]] = min(value, points.get(one.settings[key], value))
    return {rule: points for rule, points in lines.items() if len(points) > 1}


def _curve_figure(lines: dict[str, dict[float, float]], key: str) -> Any:
    """A line for each rule."""
    figure, (axes,) = subplots(1, columns=1, size=(8.4, 4.2))
    least = min(min(points.values()) for points in lines.values())
    markers = itertools.cycle("os^vD<>Px")
    for rule, points in lines.items():
        xs = sorted(points)
        style = "--" if "control" in rule else "-"
        axes.plot(xs, [points[x] for x in xs], linestyle=style, marker=next(markers), markersize=4, label=rule)
    axes.set(xlabel=key, ylabel="validation loss (nats per answer token)")
    shown = min(SHOWN, max(max(points.values()) for points in lines.values()) - least)  # what is far off is cut off
    axes.set_ylim(least - 0.05 * shown, least + 1.05 * shown)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _difference_figure(found: Comparison) -> Any:
    """A bar for each merge of the table but the reference."""
    rows = [row for row in found.rows if row.choice and row.minus_reference.stderr]
    figure, (axes,) = subplots(1, columns=1, size=(6.4, 0.6 + 0.36 * len(rows)))
    places = range(len(rows))
    is_rule = ["control" not in row.name for row in rows]
    values = [row.minus_reference.value for row in rows]
    reach = [1.96 * row.minus_reference.stderr for row in rows]
    cut = CUT * max(abs(value) for value, rule in zip(values, is_rule, strict=True) if rule)
    for label, colour, wanted in (("rule", "#1f77b4", True), ("control", "#7f7f7f", False)):
        own = [place for place in places if is_rule[place] is wanted]
        axes.barh(
            own,
            [min(values[place], cut) for place in own],
            xerr=[reach[place] if values[place] < cut else 0 for place in own],
            color=colour,
            error_kw={"elinewidth": 0.8, "capsize": 2},
            label=label,
        )
    for place in places:
        if values[place] >= cut:
            axes.text(cut, place, f"{values[place]:+.2f} ", ha="right", va="center", color="white", fontsize=8)
    axes.legend(fontsize=8, loc="lower left")
    axes.set_yticks(places, [f"{row.name}\n{_cells(row)[1]}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("test loss minus that of the tuned lambda (nats per answer token, 95 %)")
    axes.grid(axis="x", alpha=0.3)
    return figure
