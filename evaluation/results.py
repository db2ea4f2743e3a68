"""The results file: written whole and by rename after each benchmark, read again by --resume. Format: results.schema.json."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError
from checkpoints.files import parse_json, write_text
from checkpoints.settings import setting
from evaluation.benchmarks import BENCHMARKS, PAPER
from evaluation.entries import responses_sha256
from evaluation.provenance import environment
from evaluation.responses import read_responses

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
        with path.open(encoding="utf-8", errors="replace") as file:
            kept = "".join(line for line in file if _is_of_another(line, name))
    write_text(path, kept + lines)


def _is_of_another(line: str, name: str) -> bool:
    """Whether a line is one of another benchmark; what is no whole line of ours is of none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("benchmark"), str) and content["benchmark"] != name


def check_save_path(path: Path, *, resume: bool) -> None:
    """Raise where a results file cannot or may not be written.

    Raises: ArgumentError: it exists and is not to be resumed, or it is no file; InputError: its folder cannot be written to.
    """
    if path.suffix != ".json":
        raise ArgumentError(f"{setting('save_path', path)}: expected a file that ends in .json.")
    if path.is_dir():
        raise ArgumentError(f"{setting('save_path', path)}: is a folder. Give a file in it: {path / 'results.json'}.")
    if not resume:
        taken = [file for file in (path, responses_path(path), samples_path(path)) if file.exists()]
        if taken:
            raise ArgumentError(
                f"{setting('save_path', path)}: {taken[0]} exists. Choose another file, or add {setting('resume')} to go on with it."
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{setting('save_path', path)}: {folder} cannot be written to. Choose another file.")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file of ours. Raises InputError where it is none."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no plain file")
        results = parse_json(path.read_bytes())
        _check_form(results)
    except FileNotFoundError:
        raise InputError(
            f"{setting('resume')}: {path}: no such file. Leave {setting('resume')} out to begin."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected results of evaluate_model.py, got {error}. Choose another {setting('save_path')}."
        ) from None
    return dict(results)


_NUMBER = (int, float)
_NONE = type(None)
_FORM: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,), "model": (dict, _NONE), "responses_file": (str, _NONE), "benchmarks": (dict,),
    "extra_tasks": (dict,), "limit": (int, _NONE), "wanted": (list,),
}  # fmt: skip
_SETTINGS_FORM: Mapping[str, tuple[type, ...]] = {
    "profile": (str,), "apply_chat_template": (bool,), "math_prompt_type": (str,), "math_max_tokens": (int,),
}  # fmt: skip
_ENTRY_FORM: Mapping[str, tuple[type, ...]] = {
    "score": (*_NUMBER, _NONE), "stderr": (*_NUMBER, _NONE), "n": (int,), "metrics": (dict,), "metrics_stderr": (dict,), "partial": (bool,), "counts": (dict,), "data": (dict,), "generation": (dict, _NONE),
    "seconds": (dict,), "not_comparable_because": (list,), "responses_sha256": (str,),
}  # fmt: skip
_INSIDE_FORM: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "data": {"files": (list,), "rows": (int,)},
    "counts": {"rows_answered": (int,), "unanswered": (int,), "shortened": (int,)},
    "generation": {
        "dtype": (str,), "window": (int,), "chat_template": (bool,), "bos": (dict,), "max_new_tokens": (int, _NONE),
    },
}  # fmt: skip
"""What --resume reads of results, and of which types; results.schema.json has the whole form."""


def _check_form(results: Any) -> None:
    """Raise ValueError where something that --resume reads is missing or of another type."""
    if not isinstance(results, dict) or type(results.get("schema")) is not int or results["schema"] != SCHEMA:
        raise ValueError(f"something else than results of schema {SCHEMA}")
    _check_types(results, _FORM, "")
    _check_types(results["settings"], _SETTINGS_FORM, "settings.")
    _check_types({"think_end": None, **results["settings"]}, {"think_end": (str, _NONE)}, "settings.")
    if results["model"] is not None:
        _check_types(results["model"], {"folder": (str,), "files": (dict,)}, "model.")
    for name, task in results["extra_tasks"].items():
        if not isinstance(task, dict) or not isinstance(task.get("metrics"), dict):
            raise ValueError(f"no metrics at extra_tasks.{name}")
        _check_types(task["metrics"], dict.fromkeys(task["metrics"], _NUMBER), f"extra_tasks.{name}.metrics.")
    for name, entry in results["benchmarks"].items():
        if name not in BENCHMARKS:
            raise ValueError(f"a benchmark of the name {name!r:.60}")
        if not isinstance(entry, dict):
            raise ValueError(f"{type(entry).__name__} at benchmarks.{name}")
        _check_types(entry, _ENTRY_FORM, f"benchmarks.{name}.")
        for key, form in _INSIDE_FORM.items():
            if entry[key] is not None:
                _check_types(entry[key], form, f"benchmarks.{name}.{key}.")
        reasons = entry["not_comparable_because"]
        _check_types(dict(enumerate(reasons)), dict.fromkeys(range(len(reasons)), (str,)), f"benchmarks.{name}.reason ")
        for metrics in ("metrics", "metrics_stderr"):
            _check_numbers(entry[metrics], f"benchmarks.{name}.{metrics}.")
        if entry["metrics"].keys() != entry["metrics_stderr"].keys():
            raise ValueError(f"other metrics at benchmarks.{name}.metrics_stderr")
        if entry["generation"] is not None:
            _check_types(entry["generation"]["bos"], {"bos_count": (int,)}, f"benchmarks.{name}.generation.bos.")


def _check_numbers(content: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a mapping holds something else than numbers, or None where there is none."""
    _check_types(content, dict.fromkeys(content, (*_NUMBER, _NONE)), where)


def _check_types(content: Mapping[Any, Any], form: Mapping[Any, tuple[type, ...]], where: str) -> None:
    for key, types in form.items():
        if key not in content:
            raise ValueError(f"nothing at {where}{key}")
        value = content[key]
        if type(value) not in types:
            raise ValueError(f"{type(value).__name__} at {where}{key}")
        if type(value) in _NUMBER and not abs(value) <= sys.float_info.max:
            raise ValueError(f"a number out of every range at {where}{key}")


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
        raise ArgumentError(
            f"{setting('resume')}: {path} was made otherwise: {'; '.join(differing)}. Choose another {setting('save_path')}."
        )


def drop_lost(results: dict[str, Any]) -> list[str]:
    """Take out, in place, the benchmarks whose responses are not in the file of responses as they were made.

    Returns: their names. A score without them is a number that nothing bears out.
    """
    path = Path(results["responses_file"] or "")
    lost = [
        name for name, entry in results["benchmarks"].items() if _responses_in(path, name) != entry["responses_sha256"]
    ]
    for name in lost:
        del results["benchmarks"][name]
    return lost


def _responses_in(path: Path, name: str) -> str | None:
    """The digest of one benchmark's responses in a file; None where it cannot be read, or another's lines make no sense."""
    try:
        return responses_sha256(read_responses(path, [name])[name]) if path.is_file() else None
    except InputError:
        return None
