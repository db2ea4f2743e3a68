"""Files of responses: a JSON object per line, `benchmark`, `index` (0-based row of the benchmark's file) and `response`.

`--stage generate` writes more into each line (how the text ended, tokens, loglikelihoods); `--stage score` reads that where it is
there, and takes a response without it for one that came from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, unknown
from evaluation.benchmarks import BENCHMARKS
from evaluation.benchmarks.contract import Response
from evaluation.data import read_json_lines

FINISHES = ("stop", "length", "no_room", "given")


def read_responses(path: Path, benchmarks: Collection[str] | None) -> dict[str, list[Response]]:
    """Read a file of responses.

    Args:
        path: the file.
        benchmarks: the ones to keep; None for all that occur.

    Returns: responses of each benchmark, in the order of the file; an empty list where a benchmark asked for has none.
    Raises: InputError: a line is not of the format, named by its number.
    """
    responses: dict[str, list[Response]] = {name: [] for name in benchmarks or ()}
    for number, line in read_json_lines(path):
        name, response = _read_line(f"{path}: line {number}", line)
        if benchmarks is None or name in benchmarks:
            responses.setdefault(name, []).append(response)
    return responses


def check_indices(path: Path, name: str, responses: Sequence[Response], rows: int) -> None:
    """Raise InputError where a response names a row that the benchmark's data has not."""
    beyond = [response.index for response in responses if not 0 <= response.index < rows]
    if beyond:
        raise InputError(
            f"{path}: {name}: expected 'index' from 0 to {rows - 1}, got {beyond[0]}. Is it of other data?"
        )


def to_lines(name: str, responses: Sequence[Response], *, prompts: bool = False) -> str:
    """Responses of a benchmark as JSON Lines, in the format above; with `prompts`, what the model was given."""
    return "".join(json.dumps(_as_json(name, response, prompts)) + "\n" for response in responses)


def _as_json(name: str, response: Response, prompts: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"benchmark": name, "index": response.index, "response": response.text}
    if response.finish == "given":
        return line
    line |= {
        "finish": response.finish,
        "prompt_tokens": response.prompt_tokens,
        "new_tokens": response.new_tokens,
        "shortened": response.shortened,
    }
    if response.loglikelihoods is not None:
        line["loglikelihoods"] = list(response.loglikelihoods)
    if prompts:
        line["prompt"] = response.prompt
    return line


def _read_line(where: str, line: Mapping[str, Any]) -> tuple[str, Response]:
    name, index, text = line.get("benchmark"), line.get("index"), line.get("response")
    if not isinstance(name, str):
        raise InputError(f"{where}: expected a name in 'benchmark', got {name!r:.60}.")
    if name not in BENCHMARKS:
        raise InputError(f"{where}: {unknown('benchmark', name, BENCHMARKS)}")
    if type(index) is not int or index < 0:
        raise InputError(f"{where}: expected a row number from 0 in 'index', got {index!r:.60}.")
    if not isinstance(text, str):
        raise InputError(f"{where}: expected text in 'response', got {text!r:.60}.")
    finish = line.get("finish", "given")
    if finish not in FINISHES:
        raise InputError(f"{where}: expected one of {', '.join(FINISHES)} in 'finish', got {finish!r:.60}.")
    likelihoods = line.get("loglikelihoods")
    return name, Response(
        index,
        text,
        finish,
        line.get("prompt_tokens"),
        line.get("new_tokens"),
        shortened=line.get("shortened") is True,
        loglikelihoods=tuple(likelihoods) if isinstance(likelihoods, list) else None,
    )
