"""Tokens and the rows that belong to them: matched by the token's string, never by its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.settings import setting
from checkpoints.sidecars import read_json

MISSING = -1
TOKEN_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")
ADDED_FILES = ("tokenizer_config.json", "added_tokens.json")
"""Where added tokens may stand beside those of the token files."""
# How a tokenizer treats an added token, as tokenizer.json writes it; a token that nothing is said of is plain text.
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        ids: token string -> id, added tokens included.
        added: token -> how its tokenizer treats it, with the keys of `PLAIN`; tokens of the tokenizer's model are not in it.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict, compare=False)

    @cached_property
    def size(self) -> int:
        """One more than the largest id: the rows that the tokenizer can ask for."""
        return max(self.ids.values(), default=-1) + 1


def vocabulary_digest(folder: Path) -> str | None:
    """Equal for two folders whose token files are equal, so that most merges never parse a tokenizer. None without tokenizer."""
    names = [name for name in TOKEN_FILES if (folder / name).is_file()]
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names[:1] if names[0] == "tokenizer.json" else names:
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    try:
        beside = _added_beside(folder, str(folder))
        digest.update(json.dumps(beside, sort_keys=True).encode() if beside else b"")
    except InputError:  # whoever reads the tokens will say so; equal damage needs no reading
        digest.update(b"".join((folder / name).read_bytes() for name in ADDED_FILES if (folder / name).is_file()))
    return digest.hexdigest()


def read_vocabulary(folder: Path, label: str, *, trust_remote_code: bool = False) -> Vocabulary | None:
    """The tokens of a checkpoint's tokenizer; None where the folder holds no tokenizer.

    Reads tokenizer.json itself where there is one, and what other files add to it; asks transformers for other kinds.

    Raises: InputError: a tokenizer that cannot be read; two tokens with one id.
    """
    added: dict[str, dict[str, bool]] = {}
    if (folder / "tokenizer.json").is_file():
        ids, added = _read_tokenizer_json(folder / "tokenizer.json", label)
        taken = set(ids.values())
        for token, (index, treatment) in _added_beside(folder, label).items():
            if token not in ids and index not in taken:
                ids[token], added[token] = index, treatment
                taken.add(index)
    elif not any((folder / name).is_file() for name in TOKEN_FILES):
        return None
    else:
        ids, added = _ask_transformers(folder, label, trust_remote_code)
    if len(set(ids.values())) != len(ids):
        by_id: dict[int, str] = {}
        for token, index in ids.items():
            if index in by_id:
                raise InputError(
                    f"{label}: the tokens {by_id[index]!r} and {token!r} have the same id {index}. The tokenizer is damaged."
                )
            by_id[index] = token
    return Vocabulary(ids, added)


def _read_tokenizer_json(path: Path, label: str) -> tuple[dict[str, int], dict[str, dict[str, bool]]]:
    content = read_json(path, label)
    try:
        model = content["model"]["vocab"]
        # Unigram models list [token, score] pairs, all others map tokens to ids.
        ids = dict(model) if isinstance(model, dict) else {pair[0]: index for index, pair in enumerate(model)}
        added = content.get("added_tokens") or ()
        misnumbered = _add_tokens(ids, len(model), added)
        if not _are_ids(ids):
            raise ValueError
        treatments = {token["content"]: treatment_of(token) for token in added}
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
    return ids, treatments


def _are_ids(ids: Mapping[Any, Any]) -> bool:
    """Whether they are strings with whole numbers, of the 32 bits that tokenizers have for them."""
    return all(isinstance(token, str) and type(index) is int and 0 <= index < 1 << 32 for token, index in ids.items())


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


def _added_beside(folder: Path, label: str) -> dict[str, tuple[int, dict[str, bool]]]:
    """Added tokens that stand in tokenizer_config.json or added_tokens.json: token -> id, treatment."""
    added: dict[str, tuple[int, dict[str, bool]]] = {}
    name, plain_name = ADDED_FILES
    try:
        if (folder / name).is_file():
            decoder = read_json(folder / name, label).get("added_tokens_decoder", {})
            added |= {token["content"]: (int(index), treatment_of(token)) for index, token in decoder.items()}
        name = plain_name
        if (folder / name).is_file():
            plain = read_json(folder / name, label)
            added |= {token: (index, dict(PLAIN)) for token, index in plain.items() if token not in added}
        if not _are_ids({token: index for token, (index, _) in added.items()}):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{label}: {name}: expected added tokens with whole numbers as ids, got something else. Download it again."
        ) from None
    return added


def treatment_of(token: Mapping[str, Any]) -> dict[str, bool]:
    """How a tokenizer treats an added token; the keys of `PLAIN`."""
    return {key: bool(token.get(key, default)) for key, default in PLAIN.items()}


def _ask_transformers(
    folder: Path, label: str, trust_remote_code: bool
) -> tuple[dict[str, int], dict[str, dict[str, bool]]]:
    from transformers import AutoTokenizer

    try:
        _check_pieces(folder / "tokenizer.model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        decoder = tokenizer.added_tokens_decoder
        added = {str(token): {key: bool(getattr(token, key)) for key in PLAIN} for token in decoder.values()}
        return dict(tokenizer.get_vocab()), added
    except Exception as error:  # a tokenizer's own code fails in every way there is
        own_code = "trust_remote_code" in str(error)
        advice = (
            f"Pass {setting('trust_remote_code')} to run its own code, if you trust it"
            if own_code
            else "Download it again"
        )
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
    matched = torch.full((out_rows,), MISSING, dtype=torch.int64)
    ours = torch.tensor(list(out_tokens.ids.values()), dtype=torch.int64)
    theirs = torch.tensor([tokens.ids.get(token, MISSING) for token in out_tokens.ids], dtype=torch.int64)
    both = (ours < out_rows) & (theirs != MISSING) & (theirs < rows)
    matched[ours[both]] = theirs[both]
    padding = min(out_rows - out_tokens.size, rows - tokens.size)
    if padding > 0:
        matched[out_tokens.size : out_tokens.size + padding] = torch.arange(tokens.size, tokens.size + padding)
    return matched
