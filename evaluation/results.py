"""The results file: written whole and by rename after each benchmark, read again by --resume. Format: results.schema.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError
from checkpoints.files import write_text
from evaluation.benchmarks import PAPER
from evaluation.identity import environment

SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
FOLDER = Path("results")


def default_path(name: str) -> Path:
    """`results/MODEL_TIMESTAMP.json`, the model's name without what cannot be in a file name."""
    stem = re.sub(r"[^\w.-]+", "_", name.rstrip("/").rsplit("/", 1)[-1]).strip("._") or "model"
    return FOLDER / f"{stem}_{datetime.now():%Y%m%d-%H%M%S}.json"


def responses_path(path: Path) -> Path:
    """The responses beside a results file."""
    return path.with_name(path.stem + ".responses.jsonl")


def samples_path(path: Path) -> Path:
    """The graded samples beside a results file."""
    return path.with_name(path.stem + ".samples.jsonl")


def new_results(
    *, stage: str, settings: Mapping[str, Any], limit: int | None, wanted: list[str], command: list[str] | None
) -> dict[str, Any]:
    """Results in which nothing has been done."""
    return {
        "schema": SCHEMA,
        "command": command,
        "started": now(),
        "finished": None,
        "stage": stage,
        "complete": False,
        "partial": limit is not None,
        "limit": limit,
        "wanted": wanted,
        "comparable_to_paper": False,
        "not_comparable_because": [],
        "settings": dict(settings),
        "model": None,
        "responses_file": None,
        "environment": environment(),
        "benchmarks": {},
        "extra_tasks": {},
    }


def update_summary(results: dict[str, Any]) -> None:
    """Bring what is said of all benchmarks together up to date, in place."""
    entries = results["benchmarks"]
    graded = results["stage"] != "generate"
    results["complete"] = all(
        name in entries and (not graded or entries[name]["score"] is not None) for name in results["wanted"]
    )
    results["partial"] = results["limit"] is not None or any(entry["partial"] for entry in entries.values())
    reasons = [f"{name}: {reason}" for name, entry in entries.items() for reason in entry["not_comparable_because"]]
    reasons += [f"{name}: not evaluated" for name in PAPER if name not in entries]
    results["not_comparable_because"] = reasons
    results["comparable_to_paper"] = not reasons


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results file by rename. Raises InputError where it cannot be written."""
    write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def replace_benchmark(path: Path, name: str, lines: str) -> None:
    """Replace one benchmark's lines in a file of JSON Lines, and keep those of the others."""
    kept = ""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            kept = "".join(line for line in file if json.loads(line).get("benchmark") != name)
    write_text(path, kept + lines)


def check_save_path(path: Path, *, resume: bool) -> None:
    """Raise where a results file cannot or may not be written.

    Raises: ArgumentError: it exists and is not to be resumed, or it is no file; InputError: its folder cannot be written to.
    """
    if path.suffix != ".json":
        raise ArgumentError(f"--save_path {path}: expected a file that ends in .json.")
    if path.is_dir():
        raise ArgumentError(f"--save_path {path}: is a folder. Give a file in it: {path / 'results.json'}.")
    if not resume:
        taken = [file for file in (path, responses_path(path), samples_path(path)) if file.exists()]
        if taken:
            raise ArgumentError(
                f"--save_path {path}: {taken[0]} exists. Choose another file, or add --resume to go on with it."
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--save_path {path}: {folder} cannot be written to. Choose another file.")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file of ours. Raises InputError where it is none."""
    try:
        results = json.loads(path.read_bytes())
        if (
            not isinstance(results, dict)
            or results.get("schema") != SCHEMA
            or not isinstance(results["benchmarks"], dict)
            or not all(isinstance(entry, dict) for entry in results["benchmarks"].values())
            or not isinstance(results["settings"], dict)
            or not isinstance(results["model"], dict | None)
        ):
            raise ValueError(f"expected results of schema {SCHEMA}")
    except FileNotFoundError:
        raise InputError(f"--resume: {path}: no such file. Leave --resume out to begin.") from None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: expected results of evaluate_model.py, got {error}. Choose another --save_path."
        ) from None
    return results


def _shown(value: object) -> str:
    """A value of a file; Python refuses to write whole numbers of thousands of digits out."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number of thousands of digits"


def _files_of(entry: Mapping[str, Any]) -> Any:
    """The data files of a benchmark's entry; None where a forged one says nothing of them."""
    data = entry.get("data")
    return data.get("files") if isinstance(data, dict) else None


def check_resumable(
    path: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any], model: str | None, data: Mapping[str, Any]
) -> None:
    """Raise ArgumentError where an earlier run was made with other settings, another model or other data."""
    differing = [
        f"{key} {_shown(earlier['settings'].get(key))} there, {value!r} here"
        for key, value in settings.items()
        if earlier["settings"].get(key) != value
    ]
    folder = (earlier["model"] or {}).get("folder")
    if folder is not None and folder != model:
        differing.append(f"model {folder} there, {model} here")
    differing += [
        f"other data of {name}"
        for name, entry in earlier["benchmarks"].items()
        if name in data and _files_of(entry) != data[name]["files"]
    ]
    if differing:
        raise ArgumentError(f"--resume: {path} was made otherwise: {'; '.join(differing)}. Choose another --save_path.")
