"""Results files of evaluate_model.py, and the samples beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import InputError, first_line
from checkpoints.settings import setting
from reports.bootstrap import Verdicts
from reports.entries import BENCHMARKS, Conditions, Entry, ModelId, Score
from reports.recipes import model_id, read_recipe

SCHEMA = 1


def read_results(path: Path) -> Entry:
    """Read one results file, and the verdicts in `FILE.samples.jsonl` where that lies beside it.

    Raises: InputError: it is no results file, or an incomplete one.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}. Give results files of evaluate_model.py."
        ) from error
    except (ValueError, RecursionError) as error:
        raise _no_results(path, f"no JSON ({first_line(error)})") from None
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), dict) or "settings" not in results:
        raise _no_results(path, "other JSON")
    if results.get("schema") != SCHEMA:
        raise _no_results(path, f"schema {_shown(results.get('schema'))}, this program knows {SCHEMA}")
    try:
        return entry_of(results, str(path), samples=read_samples(path.with_name(f"{path.stem}.samples.jsonl")))
    except ValueError as error:
        raise _no_results(path, f"one with {first_line(error)}") from None
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise _no_results(path, f"a file without {first_line(error)}") from None


def _no_results(path: Path, got: str) -> InputError:
    return InputError(
        f"{path}: expected results of evaluate_model.py (.json) or a table of scores (.csv), got {got}. Leave it out."
    )


def entry_of(results: Mapping[str, Any], source: str, *, samples: Mapping[str, Verdicts] | None = None) -> Entry:
    """An entry from results in memory.

    Args:
        results: as in evaluation/results.schema.json.
        source: how messages name them.
        samples: verdicts by benchmark; those that do not give the results' own score are not used.

    Raises: InputError: a benchmark waits to be graded, or a score is none; KeyError, TypeError: they are no results.
    """
    scores, conditions, foreign = {}, {}, []
    for name in BENCHMARKS:
        if name not in results["benchmarks"]:
            continue
        entry = results["benchmarks"][name]
        value, stderr = entry["score"], entry["stderr"]
        if value is None:
            raise InputError(
                f"{source}: {name} is not graded yet. Run evaluate_model.py {setting('stage', 'score')}, or {setting('resume')}, and give its results."
            )
        if not (_is_number(value) and 0 <= value <= 1) or not (
            stderr is None or (_is_number(stderr) and 0 <= stderr <= 1)
        ):
            raise InputError(
                f"{source}: {name}: expected a score in [0, 1] and a standard error, got {_shown(value)} and {_shown(stderr)}. Evaluate again."
            )
        verdicts = (samples or {}).get(name)
        if verdicts is not None and (len(verdicts.rows) != entry["n"] or abs(verdicts.score - value) > 1e-9):
            foreign.append(name)
            verdicts = None
        scores[name] = Score(float(value), None if stderr is None else float(stderr), verdicts)
        conditions[name] = _conditions(entry, results["settings"])
    notes = (
        [f"{source}: the samples beside it have other scores of {', '.join(foreign)}, and are not used."]
        if foreign
        else []
    )
    model = results["model"]
    if model is None:
        notes.append(f"{source}: its responses were given; which model gave them is not known.")
        return Entry(source, ModelId(Path(source).stem), scores, conditions=conditions, notes=tuple(notes))
    recipe = model["merge_recipe"]
    merge, aim = (None, None) if recipe is None else read_recipe(recipe)
    identity = model_id(model["name"], model["folder"], model["revision"], model.get("fingerprint"))
    return Entry(source, identity, scores, merge, aim, conditions, notes=tuple(notes))


def _shown(value: object) -> str:
    """A value of a file in a message; Python refuses to write whole numbers of thousands of digits out."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return "a number of thousands of digits"


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _count(value: object) -> int:
    """A number of rows. Raises ValueError where it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError(f"{_shown(value)} as a number of rows")
    return value


def _conditions(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Conditions:
    """What a benchmark's entry says of how its score was made; what follows from the model alone is left out."""
    generation, grader, thinking = entry["generation"], entry["grader"] or {}, entry.get("thinking")
    how = {
        "profile": str(settings["profile"]),
        "grader": " ".join(str(grader[key]) for key in _GRADER if grader.get(key)),
        "what is graded": f"what follows {thinking['mark']!r:.40}" if thinking else "the whole response",
    }
    if generation is None:
        how["responses"] = "given"
    else:
        template = generation["chat_template_sha256"]
        how |= {
            "responses": "generated",
            "chat template": str(template)[:8] if template else "none",
            "new tokens": str(generation["max_new_tokens"]),
            "BOS": str(generation["bos"]["bos_count"]),
            "dtype": str(generation["dtype"]),
            "backend": str(generation["backend"]),
        }
    data = entry["data"]
    return Conditions(
        prompts=None if generation is None else str(generation["prompts_sha256"]),
        items=(
            *(str(file["sha256"]) for file in data["files"]),
            str(entry["counts"]["rows_answered"]),
            str(entry["n"]),
        ),
        answered=_count(entry["counts"]["rows_answered"]),
        rows=_count(data["rows"]),
        partial=bool(entry["partial"]),
        settings=how,
    )


_GRADER = ("name", "version", "sentence_splitter")


def read_samples(path: Path) -> dict[str, Verdicts]:
    """Verdicts by benchmark from a file of graded samples; nothing where there is none that can be read.

    A sample's `score` is its share in the benchmark's; of IFEval, `checks.strict` says which instructions were followed.
    """
    samples: dict[str, list[tuple[int, list[float], list[float]]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                samples.setdefault(str(sample["benchmark"]), []).append((_count(sample["index"]), *_verdict(sample)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: verdicts for name, items in samples.items() if (verdicts := _stack(items)) is not None}


def _verdict(sample: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """What was earned and what was possible, for each part of the score."""
    strict = sample.get("checks", {}).get("strict")
    if strict is None:
        if not _is_number(sample["score"]):
            raise ValueError
        return [float(sample["score"])], [1.0]
    if not isinstance(strict, list) or not all(isinstance(verdict, bool) for verdict in strict):
        raise ValueError
    return [float(all(strict)), float(sum(strict))], [1.0, float(len(strict))]


def _stack(items: list[tuple[int, list[float], list[float]]]) -> Verdicts | None:
    """In order of their rows, so that files can be paired; None where the samples are of several kinds."""
    items.sort(key=lambda item: item[0])
    if len({len(earned) for _, earned, _ in items}) != 1:
        return None
    rows, earned, possible = zip(*items, strict=True)
    return Verdicts(np.array(earned), np.array(possible), np.array(rows))
