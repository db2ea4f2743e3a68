"""Results as Markdown tables and figures, and put into a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed_results import Results, Row, Setting
from reports.figures import for_dark_too

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

MERGE = "task_arithmetic"
"""The merge that AIM, the sweep and the digest are measured with: the cheapest that reads the base, on which they weigh most."""
DIGEST, AIM, SWEEP = f"{MERGE}, default digest", f"{MERGE} + AIM", f"{MERGE} + AIM, 6 omegas"
FLOOR_TARGETS = {
    **dict.fromkeys(("linear", "task_arithmetic", "dare_linear", "dare_ties", AIM, "performAIM"), 1.5),
    **dict.fromkeys(("ties", "breadcrumbs"), 2.2),
    "widen": 2.5,
    **dict.fromkeys(("slerp", "karcher", "model_stock", "sce"), 3.0),
}
"""Case -> its streaming takes at most so many times its floor."""
MERGE_TARGETS = {DIGEST: 1.10}
"""Case -> at most so many times the merge alone."""
PEER_TARGETS = {"linear": 6.0, "task_arithmetic": 6.0, "ties": 30.0, "dare_linear": 15.0, "dare_ties": 15.0}
"""Method -> at least so many times faster than mergekit."""
TARGETS_FROM = 1_000_000_000
"""Parameters from which on times have targets: below, the start of the interpreter is most of them."""
MEMORY_TARGET_BYTES = 0.3e9
GROWTH_TARGET, GROWTH_FACTOR = 1.10, 3.0
"""Peak memory may grow so much where parameters grow by at least the second number."""
CALIBRATION_TARGET = 0.90
START_TARGETS = {"merge.py --help": 0.3}
FIRST_BYTE_TARGET_S = 4.0
LEAST_SHARE = 0.02
"""Functions that take less of every profile are left out."""


def as_markdown(results: Results) -> str:
    """Every table for which there are rows."""
    settings = list(dict.fromkeys(row.setting for row in results.rows))
    parts = [f"Machine: {results.machine}."]
    parts += [f"Beside it: {results.peer}."] if results.peer else []
    parts += [table for setting in settings if (table := _merge_table(results, setting))]
    for make in (_growth_table, _peer_table, _calibration_table, _start_table):
        table = make(results)
        parts += [table] if table else []
    parts += [table for setting in settings if (table := _profile_table(results, setting))]
    return "\n\n".join(parts)


def verdict(value: float | None, limit: float, *, at_least: bool = False) -> str:
    """`met`, `missed`, or nothing where nothing was measured."""
    if value is None:
        return ""
    return "met" if (value >= limit if at_least else value <= limit) else "missed"


def _merge_table(results: Results, setting: Setting) -> str:
    rows = [row for row in results.of("floor", "merge") if row.setting == setting]
    head = ("", "read", "written", "time", "of it streaming", "processor time", "rate", "x floor", "streaming x floor")
    return _titled(str(setting), (*head, "peak memory", "target"), [_merge_cells(results, row) for row in rows])


def _merge_cells(results: Results, row: Row) -> list[str]:
    seconds = row.median("seconds")
    memory = row.median("peak_bytes") if row.kind == "merge" else None
    return [
        row.case,
        *(_gigabytes(row.median(name)) for name in ("bytes_read", "bytes_written")),
        *(_seconds(row.median(name)) for name in ("seconds", "stream_s", "cpu_s")),
        f"{row.bytes_moved / seconds / 1e9:.2f} GB/s" if seconds else "",
        *(_times(row.times("floor_s", name)) for name in ("seconds", "stream_s")),
        _gigabytes(memory),
        "; ".join(filter(None, (_target(results, row), _memory_target(memory)))),
    ]


def _target(results: Results, row: Row) -> str:
    """What a case's time should be, and whether it is."""
    if row.setting.parameters < TARGETS_FROM and row.case != SWEEP:
        return ""
    if row.case in FLOOR_TARGETS and row.kind == "merge":
        limit = FLOOR_TARGETS[row.case]
        found = verdict(row.times("floor_s", "stream_s"), limit)
        return f"{limit:g} x floor: {found}" if found else ""
    if row.case in MERGE_TARGETS:
        limit = MERGE_TARGETS[row.case]
        value = row.times("other_s")
        return f"{limit:g} x {MERGE}: {value:.2f}, {verdict(value, limit)}" if value else ""
    if row.case == SWEEP:
        bytes_of_merge = results.find("merge", MERGE, row.setting)
        once = row.median("bytes_read") == (bytes_of_merge.median("bytes_read") if bytes_of_merge else None)
        return f"1 read: {'met' if once else 'missed'}" if bytes_of_merge else ""
    return ""


def _memory_target(memory: float | None) -> str:
    found = verdict(memory, MEMORY_TARGET_BYTES)
    return f"{MEMORY_TARGET_BYTES / 1e9:g} GB: {found}" if found else ""


def _growth_table(results: Results) -> str:
    """Peak memory of the smallest and the largest model, with equal numbers of fine-tunes and cores."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in results.of("merge"):
        groups.setdefault((row.case, row.setting.models, row.setting.cores), []).append(row)
    lines = []
    for (case, models, cores), rows in groups.items():
        small, large = (choose(rows, key=lambda row: row.setting.parameters) for choose in (min, max))
        factor = large.setting.parameters / small.setting.parameters
        peaks = [row.median("peak_bytes") for row in (small, large)]
        if factor >= GROWTH_FACTOR and peaks[0] and peaks[1]:
            ratio, cells = peaks[1] / peaks[0], [_gigabytes(peak) for peak in peaks]
            target = f"{GROWTH_TARGET:g}: {verdict(ratio, GROWTH_TARGET)}"
            lines.append([case, str(models), str(cores), f"{factor:.3g} x", *cells, f"{ratio:.3f}", target])
    head = ("", "fine-tunes", "cores", "parameters", "peak of the small", "peak of the large", "ratio", "target")
    return _titled("Memory against the size of the model", head, lines)


def _peer_table(results: Results) -> str:
    lines = []
    for row in results.of("peer"):
        ours = results.find("merge", row.case, row.setting)
        faster = row.times("other_s")
        limit = PEER_TARGETS.get(row.case) if row.setting.parameters >= TARGETS_FROM else None
        target = f"{limit:g} x: {verdict(faster, limit, at_least=True)}" if limit and faster else ""
        cells = [_seconds(row.median(name)) for name in ("other_s", "seconds")]
        memory = [_gigabytes(one.median("peak_bytes")) if one else "" for one in (ours, row)]
        lines.append([row.case, str(row.setting), *cells, _times(faster) or row.note, *memory, target])
    head = ("method", "", "here", "mergekit", "times faster", "memory here", "memory of mergekit", "target")
    return _titled("Against mergekit on the same files", head, lines)


def _calibration_table(results: Results) -> str:
    lines = []
    for row in results.of("calibration"):
        share = row.median("share")
        rates = [f"{row.median(name) or 0:,.0f} tokens/s" for name in ("bare_tokens_s", "watched_tokens_s")]
        target = f"{CALIBRATION_TARGET:.0%}: {verdict(share, CALIBRATION_TARGET, at_least=True)}"
        lines.append([row.case, str(row.setting), *rates, f"{share or 0:.1%}", target])
    head = ("forward pass", "", "bare", "watched", "speed of the bare one", "target")
    return _titled("Calibration against the bare forward pass", head, lines)


def _start_table(results: Results) -> str:
    lines = []
    for row in results.of("start"):
        limit, value = START_TARGETS.get(row.case, FIRST_BYTE_TARGET_S), row.median("seconds")
        target = f"{limit:g} s: {verdict(value, limit)}"
        lines.append([row.case, str(row.setting), _seconds(value), _seconds(row.median("cpu_s")), target])
    return _titled("Start", ("", "", "time", "processor time", "target"), lines)


def _profile_table(results: Results, setting: Setting) -> str:
    rows = [row for row in results.of("profile") if row.setting == setting]
    places = list(dict.fromkeys(place for row in rows for place in row.extra["shares"]))
    lines = [
        [f"`{place}`", *(f"{row.extra['shares'].get(place, 0):.0%}" for row in rows)]
        for place in places
        if any(row.extra["shares"].get(place, 0) >= LEAST_SHARE for row in rows)
    ]
    head = ("innermost function", *(row.case for row in rows))
    return _titled(f"Where the threads spend their time: {setting}", head, lines)


def _titled(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table below a heading, without columns that are empty throughout; nothing without rows."""
    if not rows:
        return ""
    columns = [index for index in range(len(head)) if index == 0 or any(row[index] for row in rows)]
    lines = [[line[index] for index in columns] for line in (head, ["---"] * len(head), *rows)]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(results: Results, folder: Path) -> list[Path]:
    """Time against bytes, and memory against bytes: `merge_speed_time.svg` and `merge_speed_memory.svg`. The paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "merge_speed"  # the same ids in every run
    folder.mkdir(parents=True, exist_ok=True)
    cores = max(row.setting.cores for row in results.rows)
    cases: dict[str, list[Row]] = {}
    for row in results.of("floor", "merge"):
        if row.setting.cores == cores:
            cases.setdefault("floor" if row.kind == "floor" else row.case, []).append(row)
    shown = {name: rows for name, rows in cases.items() if name != "floor"}
    return [
        _plot(cases, lambda row: row.median("seconds"), "seconds", folder / "merge_speed_time.svg"),
        _plot(
            shown,
            lambda row: (row.median("peak_bytes") or 0) / 1e9,
            "peak anonymous memory, GB",
            folder / "merge_speed_memory.svg",
        ),
    ]


def _plot(cases: dict[str, list[Row]], value: Callable[[Row], float | None], label: str, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for number, (name, rows) in enumerate(cases.items()):
        rows = sorted(rows, key=lambda row: row.bytes_moved)
        points = [row.bytes_moved / 1e9 for row in rows], [value(row) for row in rows]
        colour = "black" if name == "floor" else colours[number % len(colours)]
        line = "none" if name == "floor" else "-"  # floors of equal bytes may write more and read less
        axes.plot(*points, marker="o", markersize=4, linestyle=line, color=colour, label=name)
    axes.set(xlabel="bytes read and written, GB", ylabel=label, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    path.write_text(for_dark_too(path.read_text()))
    pyplot.close(figure)
    return path


CAPTIONS = {
    "merge_speed_time": (
        "Seconds over bytes read and written, each method and the floor",
        "The black dots are the floor: reading and writing the same bytes alone. What lies above them is the merging.",
    ),
    "merge_speed_memory": ("Peak memory over bytes read and written", "Memory hardly depends on how much is merged."),
}
"""Figure -> what stands for it where it is not shown, and the caption."""


def shown(figure: Path) -> str:
    """A figure and its caption, for a page beside its folder."""
    text, caption = CAPTIONS[figure.stem]
    return f"![{text}](figures/{figure.name})\n\n*{caption}*"


def put_into_page(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page. Raises ValueError where it has none."""
    content = page.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{page}: expected the marks {BEGIN} and {END}, got none. Add them where the tables shall stand"
        )
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
