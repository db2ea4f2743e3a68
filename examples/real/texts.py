"""Documents of the domains: written and read as JSONL, and encoded by a model's chat template.

A folder of texts holds `DOMAIN_train.jsonl`, `DOMAIN_val.jsonl` and `DOMAIN_test.jsonl` for each domain, each line an object with
`prompt` and `answer`. examples/real/domains makes such a folder; any other will do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError, Refusals
from examples.real.domains import DOMAINS, Document, Split, make_documents

SPLITS: tuple[Split, ...] = ("train", "val", "test")
COUNTS: dict[Split, int] = {"train": 400, "val": 48, "test": 96}
"""How many documents of each split our own domains get. Scoring takes as many of them as it is told."""
LONGEST = 256
"""Tokens; longer documents are left out."""


@dataclass(frozen=True)
class Encoded:
    """A document as token ids.

    Attributes:
        prompt: with everything that the chat template puts before the answer.
        answer: with the token that ends it.
    """

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def file_of(folder: Path, domain: str, split: Split) -> Path:
    """Where the documents of a domain's split are."""
    return folder / f"{domain}_{split}.jsonl"


def write_domains(folder: Path, domains: Iterable[str] = DOMAINS) -> None:
    """Write our own domains' documents; the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        for split, count in COUNTS.items():
            lines = [as_line(document) for document in make_documents(domain, split, count)]
            file_of(folder, domain, split).write_text("".join(lines), encoding="utf-8")


def as_line(document: Document) -> str:
    """A document as a line of JSONL."""
    return json.dumps({"prompt": document.prompt, "answer": document.answer}, ensure_ascii=False) + "\n"


def find_domains(folder: Path, chosen: Sequence[str] = ()) -> list[str]:
    """The domains of a folder, sorted, or those that are chosen, in that order.

    Raises: ArgumentError, Refusals: fewer than two; files of a split are missing; a chosen one is not there.
    """
    if not folder.is_dir():
        raise ArgumentError(f"--data {folder}: expected a folder of DOMAIN_train.jsonl and so on, got none. Name one.")
    there = sorted({path.stem.rpartition("_")[0] for path in folder.glob("*_train.jsonl")})
    domains = list(chosen) or there
    problems = [
        f"--domains {domain}: expected one of {', '.join(there) or 'none'}. Name those." for domain in domains if domain not in there
    ]  # fmt: skip
    problems += [
        f"{file_of(folder, domain, split)}: expected this split of the domain, got no file. Add it."
        for domain in domains
        for split in SPLITS
        if domain in there and not file_of(folder, domain, split).is_file()
    ]
    if not problems and len(set(domains)) < 2:
        problems.append(f"--data {folder}: expected at least two domains to merge, got {len(domains)}. Add a domain.")
    if problems:
        raise Refusals([ArgumentError(problem) for problem in problems])
    return domains


def read_documents(path: Path) -> list[Document]:
    """The documents of a file.

    Raises: InputError: it cannot be read, a line is no such object, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error}. Write it again.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: expected JSON, got {error}. Mend the line.") from error
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) and row[key] for key in ("prompt", "answer")
        ):
            raise InputError(f"{path}: line {number}: expected an object with texts prompt and answer. Mend the line.")
        found.append(Document("", row["prompt"], row["answer"]))
    if not found:
        raise InputError(f"{path}: expected documents, got an empty file. Add some.")
    return found


def encode(document: Document, tokenizer: Any) -> Encoded:
    """Token ids of prompt and answer, which are tokenized apart, as they are when a model is asked.

    Raises: InputError: the tokenizer has no chat template, or one that does not put the answer after the prompt.
    """
    if tokenizer.chat_template is None:
        raise InputError("chat template: expected one in the base model's tokenizer, got none. Use a chat model.")
    user = {"role": "user", "content": document.prompt}
    before = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": document.answer}], tokenize=False)
    if not whole.startswith(before):
        raise InputError("chat template: expected the answer right after the generation prompt. Use another model.")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, whole[len(before) :].rstrip())]
    return Encoded(*ids)


def read_encoded(folder: Path, domain: str, split: Split, tokenizer: Any, count: int | None = None) -> list[Encoded]:
    """The first `count` documents of a split that are short enough, as token ids.

    Raises: InputError: see `read_documents`; fewer than two are short enough.
    """
    path = file_of(folder, domain, split)
    found = []
    for document in read_documents(path):
        encoded = encode(document, tokenizer)
        if len(encoded) <= LONGEST and encoded.answer:
            found.append(encoded)
        if len(found) == count:
            break
    if len(found) < 2:
        raise InputError(f"{path}: expected two documents of at most {LONGEST} tokens, got {len(found)}. Add shorter ones.")  # fmt: skip
    return found


def digest(folder: Path, domains: Sequence[str]) -> str:
    """sha256 over all files of the domains, by which scores know their texts."""
    total = hashlib.sha256()
    for domain in domains:
        for split in SPLITS:
            total.update(file_of(folder, domain, split).read_bytes())
            total.update(b"\0")
    return total.hexdigest()
