"""What the tests of reports share: results files with given scores, real identities of checkpoints, exact hypervolume gains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod, sqrt
from pathlib import Path
from typing import Any

import jsonschema

from checkpoints.location import locate, parse_name
from evaluation.provenance import CheckpointDigests
from evaluation.results import SCHEMA_FILE, new_results, update_summary
from reports.entries import PAPER

PAPER_TABLE = Path(__file__).resolve().parent.parent / "examples" / "aim_table.csv"
SCHEMA = json.loads(SCHEMA_FILE.read_text())
SETTINGS = {
    "profile": "fixed", "apply_chat_template": False, "math_prompt_type": "wcot", "math_max_tokens": 1024, "backend": "hf",
    "dtype": "bfloat16", "n_gpu": None, "max_model_len": 4096, "batch_size": None, "seed": 1234, "limit": None,
    "unsafe_code_execution": False,
}  # fmt: skip


def benchmark_entry(verdicts: Sequence[float], **changes: Any) -> dict[str, Any]:
    """A benchmark's entry in the results; a key of `changes` names one of it, or `generation.KEY`."""
    n = len(verdicts)
    mean = sum(verdicts) / n
    stderr = sqrt(sum((verdict - mean) ** 2 for verdict in verdicts) / (n - 1) / n) if n > 1 else None
    generation = {
        "backend": "hf", "dtype": "bfloat16", "n_gpu": 0, "window": 4096, "batch_size": 8, "decoding": "greedy", "max_new_tokens": 512,
        "stop": [], "ignored_generation_config": {}, "bos": {"first_tokens": [1], "bos_token_id": 1, "bos_count": 1}, "chat_template": False,
        "chat_template_sha256": None, "prompts_sha256": "1" * 64, "prompt_tokens": 9, "new_tokens": 9,
    }  # fmt: skip
    entry = {
        "score": mean, "stderr": stderr, "n": n, "metric": "acc", "metrics": {"acc": mean}, "metrics_stderr": {"acc": stderr},
        "partial": False, "shots": 0, "counts": {"rows_answered": n, "truncated": 0, "shortened": 0, "unanswered": 0},
        "data": {"origin": "folder", "revision": None, "rows": n, "files": [{"name": "a.jsonl", "rows": n, "sha256": "2" * 64}]},
        "generation": generation, "grader": {"name": "math-verify", "version": "0.9.0"}, "seconds": {}, "comparable_to_paper": False,
        "not_comparable_because": ["so"], "notes": [], "responses_sha256": "3" * 64,
    }  # fmt: skip
    for key, value in changes.items():
        place: dict[str, Any] = entry
        *path, last = key.split(".")
        for name in path:
            place = place[name]
        place[last] = value
    return entry


def write_results(
    path: Path,
    verdicts: Mapping[str, Sequence[float]],
    model: Mapping[str, Any] | None,
    *,
    samples: bool = True,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Path:
    """A results file that the published schema allows, and the samples beside it.

    Args:
        verdicts: benchmark -> verdicts on its items; model: see `digests` and `named`.
        changes: benchmark -> see `benchmark_entry`; settings: other than `SETTINGS`.
    """
    results = new_results(
        stage="all", settings={**SETTINGS, **settings}, limit=None, wanted=list(verdicts), command=None
    )
    results["model"] = model
    results["benchmarks"] = {
        name: benchmark_entry(own, **(changes or {}).get(name, {})) for name, own in verdicts.items()
    }
    update_summary(results)
    jsonschema.validate(results, SCHEMA, jsonschema.Draft202012Validator)
    path.write_text(json.dumps(results))
    if samples:
        lines = [
            json.dumps({"benchmark": name, "index": index, "response": "x", "score": score, "checks": {"seconds": 0.1}})
            for name, own in verdicts.items()
            for index, score in enumerate(own)
        ]
        path.with_name(f"{path.stem}.samples.jsonl").write_text("\n".join(lines) + "\n")
    return path


def digests(folder: Path) -> dict[str, Any]:
    """What evaluate_model.py records of a checkpoint."""
    return CheckpointDigests(locate(parse_name(str(folder)))).as_json()


def named(name: str, **known: Any) -> dict[str, Any]:
    """A model of which little more than a name is known."""
    return {"name": name, "folder": f"/nowhere/{name}", "revision": None, "files": {}, "merge_recipe": None, **known}


def verdicts(*right: int, of: int = 8) -> dict[str, list[float]]:
    """For each of the six benchmarks that many right answers, the first ones."""
    return {name: [1.0] * count + [0.0] * (of - count) for name, count in zip(PAPER, right, strict=True)}


def exact_volume(points: Sequence[Sequence[Fraction]]) -> Fraction:
    """Hypervolume over the origin by inclusion and exclusion, in exact arithmetic."""
    return sum(
        (
            (-1) ** (size + 1) * prod(map(min, zip(*chosen, strict=True)), start=Fraction(1))
            for size in range(1, len(points) + 1)
            for chosen in combinations(points, size)
        ),
        start=Fraction(0),
    )


def exact_gain(population: Sequence[Sequence[Fraction]], model: Sequence[Fraction]) -> float:
    """The HV gain that the definition gives."""
    gain = exact_volume([*population, model]) - exact_volume(population)
    return float(gain) ** (1 / len(model))
