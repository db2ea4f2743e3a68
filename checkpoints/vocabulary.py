"""Tokens and the rows that belong to them: matched by the token's string, never by its id."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.sidecars import read_json
from checkpoints.source import READ_ELEMENTS, Source, TensorInfo

MISSING = -1


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens.

    ids: token string -> id, added tokens included.
    """

    ids: Mapping[str, int]

    @property
    def size(self) -> int:
        """One more than the largest id: the rows that the tokenizer can ask for."""
        return max(self.ids.values(), default=-1) + 1


def vocabulary_digest(folder: Path) -> str | None:
    """Equal for two folders whose token files are equal, so that most merges never parse a tokenizer. None without tokenizer."""
    names = [
        name
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")
        if (folder / name).is_file()
    ]
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names[:1] if names[0] == "tokenizer.json" else names:
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def read_vocabulary(folder: Path, label: str, *, trust_remote_code: bool = False) -> Vocabulary | None:
    """The tokens of a checkpoint's tokenizer; None where the folder holds no tokenizer.

    Reads tokenizer.json itself where there is one; asks transformers for other kinds.

    Raises: InputError: a tokenizer that cannot be read; two tokens with one id.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path, label)
        try:
            model = content["model"]["vocab"]
            # Unigram models list [token, score] pairs, all others map tokens to ids.
            ids = dict(model) if isinstance(model, dict) else {pair[0]: index for index, pair in enumerate(model)}
            misnumbered = _add_tokens(ids, len(model), content.get("added_tokens") or ())
            if not all(
                isinstance(token, str) and type(index) is int and 0 <= index < 1 << 32 for token, index in ids.items()
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(
                f"{label}: tokenizer.json: expected model.vocab and added_tokens, tokens with whole numbers as ids, got something else. Download it again."
            ) from None
        if misnumbered:
            token, index = misnumbered
            raise InputError(
                f"{label}: tokenizer.json: the added token {token!r:.100} has the id {index!r:.100}, and {ids[token]} where tokenizers are "
                "run, which count on behind the vocabulary. Mend the ids."
            )
    elif vocabulary_digest(folder) is None:
        return None
    else:
        ids = _ask_transformers(folder, label, trust_remote_code)
    if len(set(ids.values())) != len(ids):
        by_id: dict[int, str] = {}
        for token, index in ids.items():
            if index in by_id:
                raise InputError(
                    f"{label}: the tokens {by_id[index]!r} and {token!r} have the same id {index}. The tokenizer is damaged."
                )
            by_id[index] = token
    return Vocabulary(ids)


def _add_tokens(ids: dict[str, int], size: int, added: Iterable[Mapping[str, Any]]) -> tuple[str, Any] | None:
    """Give the added tokens of a tokenizer.json their ids, which are the vocabulary's, or count on from its size.

    Returns: the first token, and its id in the file, where that is another one.
    Source: tokenizers 0.23, `AddedVocabulary::add_tokens`, which never looks at the id in the file.
    """
    misnumbered = None
    for token in added:
        name, index = token["content"], token["id"]
        if name != "":  # which is passed over there
            size += name not in ids
            if (ids.setdefault(name, size - 1), int) != (index, type(index)) and misnumbered is None:
                misnumbered = name, index
    return misnumbered


def _ask_transformers(folder: Path, label: str, trust_remote_code: bool) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        _check_pieces(folder / "tokenizer.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        return dict(tokenizer.get_vocab())
    except Exception as error:  # a tokenizer's own code fails in every way there is
        own_code = "trust_remote_code" in str(error)
        advice = "Pass --trust_remote_code to run its own code, if you trust it" if own_code else "Download it again"
        raise InputError(f"{label}: the tokenizer cannot be read: {first_line(error)}. {advice}.") from error


def _check_pieces(path: Path) -> None:
    """Raise ValueError where the first number in a sentencepiece model's table of characters is more than its bytes: the
    tokenizers library, whose authors trust it, would allocate as many, and end the process where it cannot."""
    if not path.is_file():
        return
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # another kind of file, or a damaged one: transformers tells
        return
    table = model.normalizer_spec.precompiled_charsmap
    if int.from_bytes(table[:4], "little") > len(table):
        raise ValueError("tokenizer.model: a table of characters that is shorter than it says")


def match_rows(out_tokens: Vocabulary, out_rows: int, tokens: Vocabulary, rows: int) -> torch.Tensor:
    """Which row of a model stands for each row of the output.

    A token's row is found by its string. Rows beyond the tokenizer (padding of the table) match by position, counted
    from the tokenizer's end.

    Args:
        out_tokens, out_rows: the output's tokenizer and the rows of its table.
        tokens, rows: the model's.

    Returns: `[out_rows]` int64; `MISSING` where the model has no such row.
    """
    found = torch.full((out_rows,), MISSING, dtype=torch.int64)
    shared = [(index, tokens.ids[token]) for token, index in out_tokens.ids.items() if token in tokens.ids]
    pairs = torch.tensor([pair for pair in shared if pair[0] < out_rows and pair[1] < rows], dtype=torch.int64).reshape(
        -1, 2
    )
    found[pairs[:, 0]] = pairs[:, 1]
    padding = min(out_rows - out_tokens.size, rows - tokens.size)
    if padding > 0:
        found[out_tokens.size : out_tokens.size + padding] = torch.arange(tokens.size, tokens.size + padding)
    return found


class AlignedRows:
    """A source whose vocabulary tables have the rows of another source's, in that one's order.

    Args:
        inner: the source to read.
        fallback: gives the rows that `inner` lacks (the base, so that their task vector is zero).
        row_of: per output row the row of `inner`, or `MISSING`; `[out_rows]` int64.
        names: the tables, as `inner` names them -> as `fallback` does.
    """

    def __init__(self, inner: Source, fallback: Source, row_of: torch.Tensor, names: Mapping[str, str]):
        self.label = inner.label
        self._inner = inner
        self._fallback = fallback
        self._names = names
        self._row_of = row_of
        self._runs = list(_runs(row_of))
        self._starts = torch.tensor([run.first for run in self._runs])
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._aligned_info(name, len(row_of)) if name in names else info
            for name, info in inner.tensors.items()
        }

    def _aligned_info(self, name: str, rows: int) -> TensorInfo:
        """With the dtype that holds the rows of both sources without rounding."""
        info = self._inner.tensors[name]
        dtype = torch.promote_types(info.dtype, self._fallback.tensors[self._names[name]].dtype)
        return TensorInfo(dtype, (rows, *info.shape[1:]))

    def renamed(self, names: Mapping[str, str]) -> AlignedRows:
        """The same rows of the same sources, for other tables; one that `fallback` lacks is filled from what `inner` has."""
        there = {inner: outer if outer in self._fallback.tensors else inner for inner, outer in names.items()}
        return AlignedRows(self._inner, self._fallback, self._row_of, there)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; one read of the inner source for each run of rows that lie together there."""
        if name not in self._names:
            return self._inner.read(name, start, stop, buffer)
        info = self.tensors[name]
        width = info.numel // info.shape[0]
        scratch = torch.empty_like(buffer)
        out = buffer[: (stop - start) * info.dtype.itemsize].view(info.dtype)
        run = int(torch.searchsorted(self._starts, start // width, right=True)) - 1
        position = start
        while position < stop:
            here = self._runs[run]
            end = min(stop, (here.first + here.rows) * width)
            source, there = (self._inner, name) if here.source_row != MISSING else (self._fallback, self._names[name])
            origin = here.first if here.source_row == MISSING else here.source_row
            shift = (origin - here.first) * width
            values = source.read(there, position + shift, end + shift, scratch)
            out[position - start : end - start].copy_(values)
            position, run = end, run + 1
        return out


class MeanRows:
    """A source whose every row of a table is the mean of the rows that another source has, rounded to its dtype.

    Args:
        inner: the source to read; names: its tables, matrices of at least one row.
    """

    def __init__(self, inner: Source, names: Iterable[str]):
        self.label = inner.label
        self.tensors: Mapping[str, TensorInfo] = {name: inner.tensors[name] for name in names}
        self._inner = inner
        self._rows: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; rows beyond the table are the same too."""
        with self._lock:  # on first use: a plan may have the headers of a hub model and none of its numbers
            if name not in self._rows:
                self._rows[name] = mean_row(self._inner, name)
        row = self._rows[name]
        return row[torch.arange(start, stop) % len(row)]


def mean_row(source: Source, name: str) -> torch.Tensor:
    """Mean of a table's rows, summed in float64 and rounded to its dtype: `[columns]`."""
    info = source.tensors[name]
    width = info.numel // info.shape[0]
    rows_each = max(1, READ_ELEMENTS // width)
    buffer = torch.empty(rows_each * width * 8, dtype=torch.uint8)
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, info.shape[0], rows_each):
        last = min(first + rows_each, info.shape[0])
        total += source.read(name, first * width, last * width, buffer).view(-1, width).double().sum(dim=0)
    return (total / info.shape[0]).float().to(info.dtype)


@dataclass(frozen=True, slots=True)
class _Run:
    """Output rows `first` to `first + rows` that lie together from `source_row` on, or are all missing."""

    first: int
    rows: int
    source_row: int


def _runs(row_of: torch.Tensor) -> Iterable[_Run]:
    """Cut a row map where it stops counting upwards."""
    steps = row_of[1:] - row_of[:-1]
    missing = row_of == MISSING
    goes_on = ((steps == 1) & ~missing[:-1]) | (missing[1:] & missing[:-1])
    cuts = [0, *(torch.nonzero(~goes_on).flatten() + 1).tolist(), len(row_of)]
    for first, end in itertools.pairwise(cuts):
        if end > first:
            yield _Run(first, end - first, int(row_of[first]))
