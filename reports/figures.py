"""Figures of a comparison, each as PNG and SVG; the same table gives the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.errors import ArgumentError, InputError
from checkpoints.escaping import visible
from checkpoints.settings import setting
from reports.bootstrap import Estimate
from reports.rows import Row
from reports.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
_NAMES_A_FILE = re.compile(r"\w[\w.,=+-]{0,60}")
_MARKERS = {"no": "o", "yes": "o", "uniform": "x", "permuted": "+", "random": "*", "without_top": "^"}
_KINDS = {
    "": "single model",
    "no": "no AIM",
    "yes": "AIM",
    "uniform": "uniform control",
    "permuted": "permuted control",
    "random": "random control",
    "without_top": "without_top control",
}
STYLE = {
    "text.parse_math": False,  # a name with two `$` is no formula
    "svg.hashsalt": "reports",  # the same figure gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figures:
    """The files that were written, and a line for each kind of figure that there is no data for."""

    paths: list[Path]
    missing: list[str]


def draw(table: Table, folder: Path | str) -> Figures:
    """Draw everything that the table has data for.

    HV gain over omega for each method, Pareto fronts for each pair of benchmarks, and the change of each benchmark's score
    by AIM, with 95 % intervals where they are known.

    Args:
        table: from `compare`.
        folder: made where it is missing; figures of the same names in it are replaced.

    Raises: InputError: the folder cannot be written to.
    """
    from matplotlib import rc_context

    folder = Path(folder)
    table = replace(table, rows=tuple(map(_shown, table.rows)))
    paths: list[Path] = []
    missing: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE):
            for figures, lacking in (
                (_omega_figures(table), "HV gain over omega: not drawn, no merge has HV gains at two values of omega"),
                (_change_figures(table), "change by benchmark: not drawn, no merge is there with and without AIM"),
                (_pareto_figures(table), "Pareto fronts: not drawn, there is one benchmark or one model only"),
            ):
                written = [path for name, figure in figures for path in save(figure, folder, name)]
                paths += written
                missing += [] if written else [f"{lacking}."]
    except OSError as error:
        raise InputError(
            f"{setting('figures', folder)}: cannot be written: {error.strerror}. Choose another folder."
        ) from error
    return Figures(paths, missing)


def _shown(row: Row) -> Row:
    """A row whose texts hold nothing that cannot be printed, which SVG has no place for."""
    keys = ("method", "models", "omega", "aim_settings")
    return replace(row, **{key: visible(getattr(row, key)) for key in keys})  # type: ignore[arg-type]


def check_folder(folder: Path) -> None:
    """Raise ArgumentError where figures cannot be put into a folder because it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{setting('figures', folder)}: expected a folder, got a file. Choose another folder.")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, the latter for light and for dark pages; the same figure gives the same bytes.

    Returns: both files.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    paths[1].write_text(for_dark_too(paths[1].read_text(encoding="utf-8")), encoding="utf-8")
    return paths


DARK = """<style type="text/css">@media (prefers-color-scheme: dark) {
svg {fill: #e6edf3}
[style*="fill: #ffffff"] {fill: #0d1117 !important}
[style*="stroke: #000000"] {stroke: #e6edf3 !important}
}</style>"""
"""Style of a figure on a dark page: text, lines and paper; the colours of the data stay."""


def for_dark_too(svg: str) -> str:
    """An SVG of matplotlib's that is light on black where whoever looks at it prefers dark pages; one that is so already stays."""
    return svg if DARK in svg else svg.replace("</metadata>\n", f"</metadata>\n {DARK}\n", 1)


def subplots(count: int, *, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of `size` inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _key(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, at their right."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1.0, 0.95))


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(dict.fromkeys(names))}


def _reach(estimates: Sequence[Estimate], scale: float = 1.0) -> np.ndarray[Any, Any]:
    """`[2, estimates]`: how far each interval reaches below and above its value; not at all where none is known."""
    ends = [
        (e.value - e.low, e.high - e.value) if e.low is not None and e.high is not None else (0, 0) for e in estimates
    ]
    reach: np.ndarray[Any, Any] = scale * np.maximum(np.array(ends).T, 0)
    return reach


# ------------------------------------------------------------------------------------------------- HV gain over omega


def _omega_figures(table: Table) -> list[tuple[str, Figure]]:
    """A panel for each set of models, a line for each method; the merge without AIM stands at omega 1, which it equals."""
    # Points of every line: the relaxed merges, and the merge without AIM.
    lines: dict[tuple[str, str, str, str], list[tuple[float, Estimate]]] = {}
    for row in table.rows:
        if row.hv_gain is not None and row.aim != "no" and _is_number(row.omega):
            key = (row.models, row.method, row.aim, row.aim_settings)
            lines.setdefault(key, []).append((float(row.omega), row.hv_gain))
    for models, method, aim, settings in list(lines):
        plain = [
            row.hv_gain
            for row in table.rows
            if (row.models, row.method, row.aim) == (models, method, "no") and row.hv_gain
        ]
        lines[models, method, aim, settings] += [(1.0, gain) for gain in plain]
    if not any(len({omega for omega, _ in points}) > 2 for (_, _, aim, _), points in lines.items() if aim == "yes"):
        return []
    # A panel for each set of models.
    groups = list(dict.fromkeys(models for models, *_ in lines))
    colours = _colours(row.method for row in table.rows if row.method)
    figure, panels = subplots(len(groups), columns=2, size=(5.2, 3.6), sharex=True)
    for axes, group in zip(panels, groups, strict=True):
        drawn = [(key, points) for key, points in lines.items() if key[0] == group]
        for index, ((_, method, aim, settings), points) in enumerate(drawn):
            points = sorted(points, key=lambda point: point[0])
            apart = 0.006 * (index - (len(drawn) - 1) / 2)  # so that intervals do not hide each other
            label = " ".join(filter(None, (method, "" if aim == "yes" else f"{aim} control", settings)))
            gains = [gain for _, gain in points]
            axes.errorbar(
                [omega + apart for omega, _ in points],
                [gain.value for gain in gains],
                yerr=_reach(gains),
                color=colours[method],
                linestyle="-" if aim == "yes" else ":",
                marker=_MARKERS[aim],
                markersize=4 if aim == "yes" else 6,
                elinewidth=0.7,
                capsize=2,
                linewidth=1.4 if aim == "yes" else 0.9,
                label=label,
            )
        axes.set(title=group, xlabel="omega (at 1: the merge without AIM)", ylabel="HV gain")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _key(figure, panels)
    figure.suptitle(_with_intervals("HV gain over omega", (gain for points in lines.values() for _, gain in points)))
    return [("hv_gain_over_omega", figure)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _with_intervals(title: str, estimates: Iterable[Estimate]) -> str:
    known = any(estimate.low is not None for estimate in estimates)
    return f"{title}, {'95 % intervals' if known else 'no intervals: no standard errors are known'}"


# ------------------------------------------------------------------------------------------------- change by benchmark


def _change_figures(table: Table) -> list[tuple[str, Figure]]:
    """For each omega: a panel for each method, bars for each benchmark and set of models."""
    changed = [row for row in table.rows if row.aim == "yes" and row.score_changes]
    variants = list(dict.fromkeys((row.omega, row.aim_settings) for row in changed))
    colours = _colours(row.models for row in changed)
    figures = []
    for number, (omega, settings) in enumerate(variants):
        rows = [row for row in changed if (row.omega, row.aim_settings) == (omega, settings)]
        methods = list(dict.fromkeys(row.method for row in rows))
        figure, panels = subplots(len(methods), columns=2, size=(5.2, 2.9), sharey=True)
        for axes, method in zip(panels, methods, strict=True):
            _bars(axes, method, [row for row in rows if row.method == method], table.benchmarks, colours)
        _key(figure, panels)
        what = ", ".join(filter(None, (f"omega {omega}" if omega else "", settings)))
        title = f"Change by AIM{f' ({what})' if what else ''}: score with minus without"
        figure.suptitle(_with_intervals(title, (change for row in rows for change in row.score_changes.values())))
        name = "change_by_benchmark" + (
            ""
            if len(variants) == 1
            else f"_omega_{omega}"
            if _NAMES_A_FILE.fullmatch(omega) and not settings
            else f"_{number}"
        )
        figures.append((name, figure))
    return figures


def _bars(axes: Axes, title: str, rows: Sequence[Row], benchmarks: Sequence[str], colours: dict[str, str]) -> None:
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        changes = [row.score_changes[name] for name in benchmarks]
        places = np.arange(len(benchmarks)) + width * (index - (len(rows) - 1) / 2)
        known = any(change.low is not None for change in changes)
        axes.bar(
            places,
            [100 * change.value for change in changes],
            width,
            yerr=_reach(changes, 100) if known else None,
            color=colours[row.models],
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
            label=row.models,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(benchmarks)), benchmarks, fontsize=8)
    axes.set(title=title, ylabel="change (points)")
    axes.grid(axis="y", alpha=0.3)


# ------------------------------------------------------------------------------------------------------- Pareto fronts


def _pareto_figures(table: Table) -> Iterable[tuple[str, Figure]]:
    """One for each pair of benchmarks: all models, the front as a line, what is on it numbered and named."""
    if len(table.rows) < 2:
        return
    for first, second in combinations(table.benchmarks, 2):
        yield f"pareto_{first}_{second}", _pareto_figure(table.rows, first, second)


def _pareto_figure(rows: Sequence[Row], first: str, second: str) -> Figure:
    from matplotlib.lines import Line2D

    points = np.array([[100 * row.entry.scores[name].value for name in (first, second)] for row in rows])
    colours = _colours(row.method for row in rows if row.method)
    figure, (axes,) = subplots(1, columns=1, size=(6.5, 5))
    figure.set_layout_engine("none")
    axes.set(title="Pareto front", xlabel=f"{first} (%)", ylabel=f"{second} (%)")
    axes.grid(alpha=0.3)
    # All models, then the front as steps through those on it.
    for row, (x, y) in zip(rows, points, strict=True):
        axes.plot(x, y, **_marker(row, colours))
    axes.margins(0.08)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    front = np.flatnonzero(on_front(points))
    front = front[np.argsort(points[front, 0], kind="stable")]
    xs, ys = points[front].T
    axes.plot([axes.get_xlim()[0], *xs, xs[-1]], [ys[0], *ys, axes.get_ylim()[0]], drawstyle="steps-pre", color="black", linewidth=0.8, linestyle="--", zorder=1)  # fmt: skip
    # Names beside what is on the front or no merge; in the key, what colours, markers and numbers mean.
    numbers = {int(index): number for number, index in enumerate(front, 1)}
    _label(figure, axes, points, {
        index: " ".join(filter(None, (str(numbers.get(index, "")), "" if row.method else row.models)))
        for index, row in enumerate(rows)
        if index in numbers or not row.method
    })  # fmt: skip
    methods = dict.fromkeys(row.method for row in rows if row.method)
    key = [(method, Line2D([], [], color=colours[method], marker="s", linestyle="")) for method in methods]
    for aim, name in _KINDS.items():
        if any(row.aim == aim for row in rows):
            sample = Row(rows[0].entry, "method" if aim else "", "", aim)
            key.append((name, Line2D([], [], **_marker(sample, {"method": "black"}))))
    key.append(("on the front:", Line2D([], [], linestyle="")))
    for index, number in numbers.items():
        size = 5 if number < 10 else 8
        digits = Line2D([], [], color="black", linestyle="", marker=f"${number}$", markersize=size, markeredgewidth=0.2)
        key.append((rows[index].label, digits))
    labels, handles = zip(*key, strict=True)
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def on_front(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`[models, benchmarks]` -> `[models]` bool: no other is at least as good everywhere and better somewhere."""
    at_least = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    front: np.ndarray[Any, Any] = ~np.any(at_least & better, axis=1)
    return front


def _marker(row: Row, colours: dict[str, str]) -> dict[str, Any]:
    """Single models are black stars; merges have their method's colour, filled with AIM and hollow without."""
    if not row.method:
        return {"marker": "*", "color": "black", "markersize": 9, "linestyle": ""}
    colour = colours[row.method]
    face = "white" if row.aim == "no" else colour
    return {"marker": _MARKERS[row.aim], "color": colour, "markerfacecolor": face, "markersize": 5, "linestyle": ""}


def _label(figure: Figure, axes: Axes, points: np.ndarray[Any, Any], texts: dict[int, str]) -> None:
    """Write beside points, each text at the first place around its point where it hides no other; equal points share one."""
    together: dict[tuple[float, float], list[str]] = {}
    for index, text in texts.items():
        together.setdefault((float(points[index][0]), float(points[index][1])), []).append(text)
    pixels = figure.dpi / 72  # of a point of type, in which all that follows is
    left, bottom, right, top = (float(end) / pixels for end in axes.bbox.extents)
    taken: list[tuple[float, float, float, float]] = [
        (x - 3, y - 3, x + 3, y + 3) for x, y in axes.transData.transform(points) / pixels
    ]
    for place, several in together.items():
        text = ", ".join(several)
        width, height = 5.0 * len(text) + 2, 9.0
        x, y = axes.transData.transform(place) / pixels
        spots = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in _around(width, height)]
        inside = [box for box in spots if left < box[0] and box[2] < right and bottom < box[1] and box[3] < top]
        box = next((box for box in inside if not any(_overlap(box, other) for other in taken)), spots[0])
        taken.append(box)
        far = max(box[0] - x, x - box[2], box[1] - y, y - box[3]) > 8
        arrow = {"arrowstyle": "-", "linewidth": 0.4, "color": "grey"} if far else None
        axes.annotate(text, place, (box[0] - x, box[1] - y), textcoords="offset points", fontsize=8, arrowprops=arrow)


def _around(width: float, height: float) -> Iterable[tuple[float, float]]:
    """Where a text's lower left corner may be, seen from its point: nearest first, upper right before all other sides."""
    for reach in (4, 10, 18, 28, 40):
        for side in (reach, -width / 2, -reach - width):
            yield from ((side, reach), (side, -reach - height))
        yield from ((reach, -height / 2), (-reach - width, -height / 2))


def _overlap(first: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return first[0] < other[2] and other[0] < first[2] and first[1] < other[3] and other[1] < first[3]
