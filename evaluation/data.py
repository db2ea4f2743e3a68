"""The benchmarks' data: found in a folder or on the hub, checked row by row, before a model is loaded.

A folder (`--data_dir`) may hold plain files (`gsm8k.jsonl`) or copies of the hub's datasets (`openai/gsm8k/main/...parquet`);
plain files win. Without a folder the hub's own cache is used, and the hub where that lacks something.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError
from evaluation.benchmarks.contract import BadRow, Benchmark
from evaluation.dataset_files import REVISIONS_FILE, Missing, find_split


@dataclass(frozen=True)
class DataFile:
    """One file that was read, as the results describe it."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class Data:
    """A benchmark's rows.

    Attributes:
        rows: in the order of the files; an index is a position here.
        fewshots: rows that examples come from, where the benchmark has such.
        files: what was read.
        origin: `folder` or `hub`.
        revision: the hub's commit, where it is known.
        complete: whether the file is one that holds the whole test set.
    """

    rows: list[dict[str, Any]]
    fewshots: list[dict[str, Any]]
    files: list[DataFile]
    origin: str
    revision: str | None
    complete: bool


def load_data(benchmark: Benchmark, folder: Path | None) -> Data:
    """Read and check the rows of a benchmark.

    Args:
        benchmark: what to read.
        folder: of --data_dir; None for the hub.

    Raises:
        Missing: there is no data; says what was looked for.
        InputError: a file is broken; names its first bad line.
    """
    if folder is not None:
        plain = next((folder / name for name in benchmark.files if (folder / name).is_file()), None)
        if plain is not None:
            return _read_plain(benchmark, folder, plain)
        root, revision = folder / benchmark.dataset.repo, _recorded_revision(folder, benchmark.dataset.repo)
        splits = {split: find_split(root, pattern) for split, pattern in benchmark.dataset.splits.items()}
        absent = [pattern for split, pattern in benchmark.dataset.splits.items() if not splits[split]]
        if absent:
            wanted = f"{benchmark.files[0]} or {benchmark.dataset.repo}/{absent[0]}"
            raise Missing(benchmark.name, f"expected {wanted} in {folder}, got neither.")
        origin = "folder"
    else:
        from evaluation.fetch import hub_snapshot

        root, revision = hub_snapshot(benchmark)
        splits = {split: find_split(root, pattern) for split, pattern in benchmark.dataset.splits.items()}
        origin = "hub"
    tests, files = _read(benchmark, splits["test"])
    fewshots, more = _read(benchmark, splits["validation"]) if "validation" in splits else ([], [])
    return Data(tests, fewshots, files + more, origin, revision, complete=True)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON Lines file; an empty line may only be the last one.

    Raises: InputError: not readable; a line that is no JSON object, named by its number.
    """
    try:
        with path.open("rb") as file:
            empty = 0
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    empty = empty or number
                    continue
                if empty:
                    raise InputError(f"{path}: line {empty}: expected a JSON object, got an empty line. Remove it.")
                yield number, _parse_line(path, number, raw)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse_line(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).split(":")[0] if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(
            f"{path}: line {number}: expected a JSON object, got {reason}: {raw[:60]!r}. Mend it."
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: line {number}: expected a JSON object, got {type(value).__name__}. Mend it.")
    return value


def _read_plain(benchmark: Benchmark, folder: Path, path: Path) -> Data:
    rows, files = _read(benchmark, [path])
    fewshots: list[dict[str, Any]] = []
    if benchmark.fewshot_file is not None:
        examples = folder / benchmark.fewshot_file
        if not examples.is_file():
            raise Missing(benchmark.name, f"expected {benchmark.fewshot_file} beside {path}, got none.")
        fewshots, more = _read(benchmark, [examples])
        files += more
    return Data(rows, fewshots, files, "folder", None, complete=path.name == benchmark.files[0])


def _read(benchmark: Benchmark, paths: list[Path]) -> tuple[list[dict[str, Any]], list[DataFile]]:
    """All rows of some files, checked. Raises InputError with file and line of the first bad row."""
    rows: list[dict[str, Any]] = []
    files = []
    for path in paths:
        before = len(rows)
        for number, row in _read_file(path):
            try:
                rows.append(benchmark.read_row(row))
            except BadRow as error:
                unit = "row" if path.suffix == ".parquet" else "line"
                raise InputError(f"{path}: {unit} {number}: {error}. Mend it, or fetch the file again.") from None
        files.append(DataFile(path, len(rows) - before, _sha256(path)))
    if not rows:
        raise InputError(f"{paths[0]}: expected rows, got an empty file. Fetch it again.")
    return rows, files


def _read_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from read_json_lines(path)
        return
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        table = pyarrow.parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file, got {str(error)[:100]}. Fetch it again.") from error
    yield from enumerate(table.to_pylist(), 1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_revision(folder: Path, repo: str) -> str | None:
    """The commit that --fetch_data wrote down for a dataset."""
    try:
        revision = json.loads((folder / REVISIONS_FILE).read_bytes()).get(repo)
    except (OSError, ValueError, AttributeError):
        return None
    return revision if isinstance(revision, str) else None
