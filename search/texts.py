"""The texts of each task, as tokens with the part that counts, split by content into those searched with and those held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from checkpoints.errors import ArgumentError, InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.text_files import read_rows
from merging.model_texts import render_chat, tokenizer_of

LONGEST = 1024
"""Tokens of a document; what is beyond is cut off."""
LEAST = 4
"""Documents of a task on either side, below which nothing can be said."""


@dataclass(frozen=True)
class Document:
    """A text as tokens.

    Attributes:
        ids: token ids.
        begin: index of the first token that is scored; what is before is only read.
        row: what it was read from, as files have it.
    """

    ids: tuple[int, ...]
    begin: int
    row: Any = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def as_json(self) -> list[Any]:
        """What tells it from others."""
        return [*self.ids, self.begin]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.begin


class Part(Protocol):
    """What a task consists of: a document, or an item of a benchmark; its length is in tokens."""

    def __len__(self) -> int: ...

    def as_json(self) -> list[Any]:
        """What tells it from others."""


@dataclass(frozen=True)
class Texts:
    """Documents of every task, and items of benchmarks.

    Attributes:
        searched: task -> what candidates are compared by.
        held_out: task -> those that the best are scored on once.
        twice: texts that came more than once, and count once.
        held_out_keys: hashes of the texts and prompts that are held out.
    """

    searched: Mapping[str, Sequence[Part]]
    held_out: Mapping[str, Sequence[Part]]
    twice: int = 0
    held_out_keys: frozenset[str] = frozenset()

    def digest(self) -> str:
        """sha256 of all tokens and prompts and of how they are split."""
        content = [
            {task: [one.as_json() for one in documents] for task, documents in part.items()}
            for part in (self.searched, self.held_out)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def joined(self, more: Texts) -> Texts:
        """With more tasks."""
        keys = self.held_out_keys | more.held_out_keys
        return Texts({**self.searched, **more.searched}, {**self.held_out, **more.held_out}, self.twice, keys)

    def as_json(self) -> dict[str, Any]:
        """Counts, for people and programs."""
        return {
            part: {task: {"documents": len(found), "tokens": sum(map(len, found))} for task, found in texts.items()}
            for part, texts in (("search", self.searched), ("held_out", self.held_out))
        }


def read_texts(base: Model, files: Mapping[str, Path], *, share: float, documents: int) -> Texts:
    """Read every task's texts, and split them by a hash of their content: the same text, or the same prompt with another answer,
    is always on the same side, in whichever file and wherever in it.

    A row is a text, or an object with `text`, or with `prompt` and `answer`: then the answer alone is scored, behind the
    prompt as the base's chat template writes it, where it has one.

    Args:
        base: whose tokenizer reads them.
        files: task -> a .jsonl, .json, .txt or .parquet file, or .gz of one.
        share: of the texts that is held out, in (0, 1).
        documents: of a task on either side at most: the first by that hash.

    Raises: Refusals: everything that is wrong with them.
    """
    problems = Problems()
    tokenizer = tokenizer_of(base)
    searched: dict[str, list[Document]] = {}
    held_out: dict[str, list[Document]] = {}
    seen: set[str] = set()
    held_out_keys: set[str] = set()
    twice = 0
    for task, path in files.items():
        where = setting("texts", path)
        rows: list[Any] = []
        with problems.collect():
            if not path.is_file():
                raise InputError(f"{where}: no such file. Give a file of texts of the task {task}.")
            rows = read_rows(path)
        ordered: dict[str, tuple[str, int, Any]] = {}
        for number, row in enumerate(rows, 1):
            with problems.collect():
                key, whole = _content(row, f"{where}: row {number}")
                twice += whole in seen
                if whole not in seen:
                    seen.add(whole)
                    ordered[whole] = (key, number, row)
        sides: tuple[list[Document], list[Document]] = ([], [])
        for key, number, row in sorted(ordered.values(), key=lambda entry: entry[0]):
            side = sides[is_held_out(key, share)]
            if len(side) < documents:
                with problems.collect():
                    encoded = _encode(row, tokenizer, base, f"{where}: row {number}")
                    if encoded.scored > 0:
                        side.append(encoded)
                        held_out_keys.update([key] if side is sides[True] else ())
        searched[task], held_out[task] = sides
        if rows and not problems and min(map(len, sides)) < LEAST:
            problems.add(
                InputError(
                    f"{where}: expected at least {LEAST} texts on either side, got {len(sides[0])} to search with and {len(sides[1])} held out. "
                    f"Give more texts, or another {setting('held_out')}."
                )
            )
    problems.raise_if_any()
    return Texts(searched, held_out, twice, frozenset(held_out_keys))


def is_held_out(key: str, share: float) -> bool:
    """Which side a hash is on; not by the digits that texts are sorted by."""
    return int(key[-16:], 16) / 16**16 < share


def content_of(text: str) -> str:
    """The hash of a prompt by which it is split, however it is spaced."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def key_of(row: Any, where: str) -> str:
    """The hash that a row is split by. Raises InputError: no text."""
    return _content(row, where)[0]


def _content(row: Any, where: str) -> tuple[str, str]:
    """Hashes of what a text is split by, its prompt where it has one, and of all of it. Raises InputError: no text."""
    fields: Mapping[str, Any] = row if isinstance(row, dict) else {"text": row}
    if isinstance(fields.get("text"), str):
        parts = [fields["text"]]
    elif all(isinstance(fields.get(key), str) for key in ("prompt", "answer")):
        parts = [fields["prompt"], fields["answer"]]
    else:
        got = ", ".join(sorted(map(str, fields))) if isinstance(row, dict) else type(row).__name__
        raise InputError(
            f"{where}: expected a text, or the fields text, or prompt and answer, got {got}. Mend the row."
        )
    words = [" ".join(part.split()) for part in parts]
    return tuple(hashlib.sha256("\0".join(part).encode()).hexdigest() for part in (words[:1], words))  # type: ignore[return-value]


def _encode(row: Any, tokenizer: Any, base: Model, where: str) -> Document:
    fields: Mapping[str, Any] = row if isinstance(row, dict) else {"text": row}
    if isinstance(fields.get("text"), str):
        ids = tokenizer.encode(fields["text"].strip())[:LONGEST]
        return Document(tuple(ids), 1, row)
    prompt, answer = fields["prompt"], fields["answer"]
    if isinstance(tokenizer.chat_template, str):
        user = {"role": "user", "content": prompt}
        before = render_chat([user], tokenizer, base, begin_answer=True)
        whole = render_chat([user, {"role": "assistant", "content": answer}], tokenizer, base)
        if not whole.startswith(before):
            raise InputError(
                f"{where}: expected the answer right after what the chat template of {base.label} begins it with, got it elsewhere. Give rows of text."
            )
        first = tokenizer.encode(before, add_special_tokens=False)
        rest = tokenizer.encode(whole[len(before) :].rstrip(), add_special_tokens=False)
    else:
        first = tokenizer.encode(prompt)
        rest = tokenizer.encode(answer, add_special_tokens=False)
        rest += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = (*first, *rest)[:LONGEST]
    return Document(ids, max(1, len(first)), row)


def parse_texts(text: str) -> dict[str, Path]:
    """Tasks and their files of `math=a.jsonl,b.jsonl`; a file without a name is called by its own. Raises ArgumentError."""
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, given, file = part.strip().rpartition("=")
        path = Path(file).expanduser()
        name = name.strip() if given else path.name.partition(".")[0]
        if not file or not name:
            raise ArgumentError(f"{setting('texts')}: expected files separated by commas, got {text!r}.")
        if name in found:
            raise ArgumentError(f"{setting('texts')}: two files are of the task {name}. Name them, as NAME=FILE.")
        found[name] = path
    return found
