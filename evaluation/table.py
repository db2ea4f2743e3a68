"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.benchmarks import PAPER

_WORDS = {
    "truncated": "reached the token limit",
    "shortened": "shortened by the window",
    "unanswered": "did not fit",
    "no_answer": "without an answer",
    "timed_out": "timed out",
    "forged": "forged",
    "grader_errors": "could not be graded",
    "guessed": "guessed",
    "would_have_executed": "end in code",
}


def format_table(results: Mapping[str, Any]) -> str:
    """One line per benchmark in percent, the average of the paper's six where all are there, and what to know."""
    rows = [["benchmark", "score", "stderr", "n", "counts"]]
    for name, entry in results["benchmarks"].items():
        counts = [f"{entry['counts'][key]} {words}" for key, words in _WORDS.items() if entry["counts"].get(key)]
        if entry.get("thinking", {}).get("unfinished"):
            counts.append(f"{entry['thinking']['unfinished']} cut while thinking")
        mark = " (partial)" if entry["partial"] else ""
        rows.append(
            [name + mark, _percent(entry["score"]), _percent(entry["stderr"]), str(entry["n"]), ", ".join(counts)]
        )
        if name == "ifeval" and entry["metrics"]:
            rows += [
                [f"  {metric}", _percent(value), _percent(entry["metrics_stderr"][metric]), "", ""]
                for metric, value in list(entry["metrics"].items())[1:]
            ]
    scores = [results["benchmarks"].get(name, {}).get("score") for name in PAPER]
    if all(score is not None for score in scores):
        rows.append(["average of six", _percent(sum(scores) / len(scores)), "", "", ""])
    for name, metrics in results["extra_tasks"].items():
        rows += [[f"{name} {metric}", f"{value:.4f}", "", "", ""] for metric, value in metrics["metrics"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]
    return "\n".join([f"profile {results['settings']['profile']}, scores in percent", *lines, *_remarks(results)])


def _remarks(results: Mapping[str, Any]) -> list[str]:
    lines = []
    if results["partial"]:
        limit = results["limit"]
        lines.append("PARTIAL: " + (f"limit {limit}" if limit else "not all rows were answered") + ", no full scores.")
    if results["comparable_to_paper"]:
        lines.append("Comparable to the paper's table.")
        return lines
    entries = results["benchmarks"]
    if any(entry["score"] is not None for entry in entries.values()):
        lines.append("Not comparable to the paper's table:")
        lines += [
            f"  {name}: {'; '.join(e['not_comparable_because'])}"
            for name, e in entries.items()
            if e["not_comparable_because"]
        ]
        comparable = [name for name, entry in entries.items() if not entry["not_comparable_because"]]
        if comparable:
            lines.append(f"Comparable by itself: {', '.join(comparable)}.")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
