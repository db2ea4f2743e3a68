"""One benchmark's entry in the results, and whether its number can be compared with the paper's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from evaluation.benchmarks.contract import Benchmark, Generation, Grade, Response
from evaluation.benchmarks.settings import Settings
from evaluation.data import Data

PAPER_DTYPE = "bfloat16"
PAPER_WINDOW = 4096
PAPER_PROMPT = "wcot"
_PACKAGES = {"math-verify": "math-verify", "lm_eval ifeval": "lm_eval"}


@dataclass(frozen=True)
class Asked:
    """How the responses of a benchmark came about; None of it is known where they were given.

    Attributes:
        prompts_sha256: one digest of all prompts.
        bos: from `generation.check_bos`.
        chat_template_sha256: of the template, where one was applied.
        dtype, backend, n_gpu, window, batch_size, ignored: of the loaded model.
        seconds: spent with the model.
    """

    prompts_sha256: str
    bos: Mapping[str, Any]
    chat_template_sha256: str | None
    dtype: str
    backend: str
    n_gpu: int
    window: int
    batch_size: int | None
    ignored: Mapping[str, Any]
    seconds: float


def generated_entry(
    benchmark: Benchmark, settings: Settings, data: Data, responses: Sequence[Response], asked: Asked
) -> dict[str, Any]:
    """The entry of a benchmark whose responses wait to be graded: everything but score and grader."""
    entry = _ungraded(benchmark, data, responses)
    generation = _describe_generation(benchmark.generation(settings), responses, asked)
    return {
        **entry,
        "shots": benchmark.shots,
        "generation": generation,
        "seconds": {"generate": round(asked.seconds, 3)},
    }


def given_entry(benchmark: Benchmark, data: Data, responses: Sequence[Response]) -> dict[str, Any]:
    """The entry of a benchmark whose responses came from a file, before they are graded."""
    return _ungraded(benchmark, data, responses)


def _ungraded(benchmark: Benchmark, data: Data, responses: Sequence[Response]) -> dict[str, Any]:
    answered = len({response.index for response in responses})
    return {
        "score": None,
        "stderr": None,
        "n": len(responses),
        "metric": benchmark.metric,
        "metrics": {},
        "metrics_stderr": {},
        "partial": answered < len(data.rows) or not data.complete,
        "shots": None,
        "counts": {
            "rows_answered": answered,
            "truncated": sum(response.finish == "length" for response in responses),
            "shortened": sum(response.shortened for response in responses),
            "unanswered": sum(response.finish == "no_room" for response in responses),
        },
        "data": describe_data(data),
        "generation": None,
        "grader": None,
        "seconds": {},
        "comparable_to_paper": False,
        "not_comparable_because": ["not graded yet"],
        "notes": list(benchmark.notes),
        "responses_sha256": responses_sha256(responses),
    }


def responses_sha256(responses: Sequence[Response]) -> str:
    """A digest of rows and texts, which ties given responses to the run that made them."""
    pairs = [[response.index, response.text] for response in responses]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def graded(
    entry: Mapping[str, Any],
    benchmark: Benchmark,
    settings: Settings,
    grades: Sequence[Grade],
    *,
    grader: Mapping[str, Any],
    thinking: Mapping[str, Any] | None = None,
    seconds: float,
) -> dict[str, Any]:
    """Complete an entry with what the grades say, and with the lengths of thoughts and answers where responses were split."""
    metrics = benchmark.metrics(grades)
    first = next(iter(metrics.values()))
    statuses = Counter(grade.status for grade in grades)
    flags = Counter(key for grade in grades for key, value in grade.extra.items() if value is True)
    counts = {
        **entry["counts"],
        "no_answer": statuses["no_answer"],
        "timed_out": statuses["timeout"],
        "forged": statuses["forged"],
        "grader_errors": statuses["error"],
        **dict(sorted(flags.items())),
    }
    complete = {
        **{key: value for key, value in entry.items() if key != "thinking"},
        "score": first.value,
        "stderr": first.stderr,
        "n": len(grades),
        "metrics": {name: metric.value for name, metric in metrics.items()},
        "metrics_stderr": {name: metric.stderr for name, metric in metrics.items()},
        "counts": counts,
        "grader": dict(grader),
        "seconds": {**entry["seconds"], "grade": round(seconds, 3)},
        **({} if thinking is None else {"thinking": dict(thinking)}),
    }
    reasons = why_not_comparable(complete, benchmark, settings)
    return {**complete, "comparable_to_paper": not reasons, "not_comparable_because": reasons}


def describe_grader(benchmark: Benchmark, *, sandbox_level: str | None, punkt: bool) -> dict[str, Any]:
    """What decided, with its version."""
    entry: dict[str, Any] = {"name": benchmark.grader}
    if benchmark.grader in _PACKAGES:
        entry["version"] = metadata.version(_PACKAGES[benchmark.grader])
    if benchmark.runs_code:
        entry["sandbox_level"] = sandbox_level
    if benchmark.name == "ifeval":
        entry["sentence_splitter"] = "punkt" if punkt else "simple"
    return entry


def describe_data(data: Data) -> dict[str, Any]:
    """Where the rows came from."""
    return {
        "origin": data.origin,
        "revision": data.revision,
        "rows": len(data.rows),
        "files": [{"name": file.path.name, "rows": file.rows, "sha256": file.sha256} for file in data.files],
    }


def why_not_comparable(entry: Mapping[str, Any], benchmark: Benchmark, settings: Settings) -> list[str]:
    """Every way in which a number was made differently from the paper's; empty where it was made the same way."""
    if benchmark.name == "mmlu_pro":
        return ["the paper's table has no MMLU-Pro"]
    reasons = []
    rows, counts, generation = entry["data"]["rows"], entry["counts"], entry["generation"]
    if rows != benchmark.size:
        reasons.append(f"the data has {rows} rows, the paper's {benchmark.size}")
    if counts["rows_answered"] != rows:
        reasons.append(f"partial: {counts['rows_answered']} of {rows} rows were answered")
    if counts["unanswered"]:
        reasons.append(f"prompts that do not fit into the window: {counts['unanswered']}")
    if counts["shortened"]:
        reasons.append(f"answers with fewer tokens allowed, for lack of window: {counts['shortened']}")
    if (entry["grader"] or {}).get("sentence_splitter") == "simple":
        reasons.append("sentences were split without nltk's punkt data")
    if entry.get("thinking"):
        reasons.append(f"graded from the last {entry['thinking']['mark']!r} on, the paper's responses whole")
    if generation is None:
        return [*reasons, "the responses were given: how they were made is not known"]
    return reasons + _generation_reasons(generation, benchmark, settings)


def _generation_reasons(generation: Mapping[str, Any], benchmark: Benchmark, settings: Settings) -> list[str]:
    reasons = []
    if generation["dtype"] != PAPER_DTYPE:
        reasons.append(f"dtype {generation['dtype']}, the paper's {PAPER_DTYPE}")
    if generation["window"] > PAPER_WINDOW:
        reasons.append(f"window of {generation['window']} tokens, the paper's {PAPER_WINDOW}")
    if generation["chat_template"]:
        reasons.append("a chat template was applied")
    if benchmark.harness and generation["bos"]["bos_count"]:
        reasons.append("prompts begin with BOS, the paper's do not (profile paper)")
    paper = benchmark.generation(Settings(profile="paper"))
    if paper is not None and generation["max_new_tokens"] != paper.max_new_tokens:
        reasons.append(f"up to {generation['max_new_tokens']} new tokens, the paper's {paper.max_new_tokens}")
    if not benchmark.harness and settings.math_prompt_type != PAPER_PROMPT:
        reasons.append(f"prompt '{settings.math_prompt_type}', the paper's '{PAPER_PROMPT}'")
    return reasons


def _describe_generation(generation: Generation | None, responses: Sequence[Response], asked: Asked) -> dict[str, Any]:
    return {
        "backend": asked.backend,
        "dtype": asked.dtype,
        "n_gpu": asked.n_gpu,
        "window": asked.window,
        "batch_size": asked.batch_size,
        "decoding": "loglikelihood" if generation is None else "greedy",
        "max_new_tokens": None if generation is None else generation.max_new_tokens,
        "stop": [] if generation is None else list(generation.stop),
        "ignored_generation_config": dict(asked.ignored),
        "bos": dict(asked.bos),
        "chat_template": asked.chat_template_sha256 is not None,
        "chat_template_sha256": asked.chat_template_sha256,
        "prompts_sha256": asked.prompts_sha256,
        "prompt_tokens": sum(response.prompt_tokens or 0 for response in responses),
        "new_tokens": sum(response.new_tokens or 0 for response in responses),
    }
