"""Files of texts: .txt (one a line), .json, .jsonl and .parquet, or .gz of one. A row is a text or an object with its fields."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from checkpoints.errors import InputError, first_line

ENCODING = "utf-8-sig"  # UTF-8, and the byte order mark that some editors begin it with


def read_rows(path: Path) -> list[Any]:
    """Rows of a local file, by its suffix; .gz of any of them. Raises InputError: another suffix; it cannot be read."""
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    if inner.suffix not in READERS:
        raise InputError(
            f"{path}: expected {', '.join(READERS)}, or .gz of one, got '{inner.suffix}'. Rename or convert the file."
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return READERS[inner.suffix](cast(IO[bytes], file), path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read as {inner.suffix}: {first_line(error)}. Make or download it again."
        ) from error


def _read_lines(file: IO[bytes], path: Path) -> list[Any]:
    return [line for line in io.TextIOWrapper(file, ENCODING) if line.strip()]


def _read_jsonl(file: IO[bytes], path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(io.TextIOWrapper(file, ENCODING), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}: line {number}: expected JSON, got {error}. Mend or remove the line."
                ) from None
    return rows


def _read_json(file: IO[bytes], path: Path) -> list[Any]:
    try:
        content = json.load(io.TextIOWrapper(file, ENCODING))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {error}.") from None
    if isinstance(content, dict):  # {"data": [...]}, or columns {"text": [...]}
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) == 1 and lists and isinstance(next(iter(next(iter(lists.values()))), None), dict):
            return next(iter(lists.values()))
        if lists and len({len(column) for column in lists.values()}) == 1:
            return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of texts or of objects, got {type(content).__name__}.")
    return content


def _read_parquet(file: IO[bytes], path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path}: cannot be read as parquet: {first_line(error)}. Make or download it again."
        ) from None
    return rows


READERS: dict[str, Callable[[IO[bytes], Path], list[Any]]] = {
    ".txt": _read_lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
