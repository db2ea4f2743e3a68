"""Change a checkpoint's tokenizer and config files: more tokens, another model's tokenizer, ids that follow."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, first_line
from checkpoints.folder import Folder
from checkpoints.settings import setting
from checkpoints.sidecars import SideFiles
from checkpoints.vocabulary import Vocabulary, read_vocabulary

# Tokenizers without tokenizer.json, and programs that read these files beside it, look for added tokens elsewhere.
SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
CONFIGS = ("config.json", "generation_config.json")
ID_KEY = re.compile(r"_token_(ids?|index)$")


@dataclass(frozen=True)
class NewToken:
    """A token for a tokenizer that lacks it.

    Attributes:
        treatment: with the keys of `vocabulary.PLAIN`.
        ordinary: whether it is no added token in the model it comes from.
    """

    token: str
    id: int
    treatment: Mapping[str, bool]
    ordinary: bool


def add_tokens(files: SideFiles, known: Vocabulary, tokens: Iterable[NewToken]) -> None:
    """Add tokens to every tokenizer file that lists added tokens.

    Args:
        known: what the files say so far.
        tokens: with the next ids after the largest, in order.
    """
    tokens = list(tokens)
    entries = {token.id: {"content": token.token, **token.treatment} for token in tokens}
    has_slow = any(name in files for name in SLOW_FILES)
    if "tokenizer.json" in files:
        content = files.read_json("tokenizer.json")
        content["added_tokens"] = [
            *(content.get("added_tokens") or ()),
            *({"id": index, **entry} for index, entry in entries.items()),
        ]
        files.write_json("tokenizer.json", content)
    config = files.read_json("tokenizer_config.json")
    if has_slow or "added_tokens_decoder" in config or "tokenizer.json" not in files:
        decoder = {str(known.ids[token]): {"content": token, **treatment} for token, treatment in known.added.items()}
        if "added_tokens_decoder" not in config:  # where it is, transformers reads no other list of tokens
            config |= _named_tokens(files)
        decoder |= {
            **config.get("added_tokens_decoder", {}),
            **{str(index): described for index, described in entries.items()},
        }
        files.write_json("tokenizer_config.json", {**config, "added_tokens_decoder": decoder})
    if has_slow or "added_tokens.json" in files:
        listed = {**files.read_json("added_tokens.json"), **{token.token: token.id for token in tokens}}
        files.write_json("added_tokens.json", listed)


def _named_tokens(files: SideFiles) -> dict[str, Any]:
    """What special_tokens_map.json says, as tokenizer_config.json says it."""
    return {
        key: {"__type": "AddedToken", **value, "special": True}
        if isinstance(value, dict) and "content" in value
        else value
        for key, value in files.read_json("special_tokens_map.json").items()
    }


def tokens_of(files: SideFiles, *, trust_remote_code: bool = False) -> Vocabulary | None:
    """The tokens that side files will have, as `read_vocabulary` reads them from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        with Folder.open(Path(folder)) as opened:
            files.write(opened)
        return read_vocabulary(Path(folder), files.label, trust_remote_code=trust_remote_code)


def check_tokens(files: SideFiles, expected: Vocabulary, *, trust_remote_code: bool = False) -> None:
    """Raise InputError where the library that will load the changed tokenizer files gives other ids than `expected`."""
    with tempfile.TemporaryDirectory() as folder:
        with Folder.open(Path(folder)) as opened:
            files.write(opened)
        path = Path(folder) / "tokenizer.json"
        try:
            if path.is_file():
                from tokenizers import Tokenizer

                ids: Mapping[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
            else:
                vocabulary = read_vocabulary(Path(folder), files.label, trust_remote_code=trust_remote_code)
                ids = vocabulary.ids if vocabulary else {}
            tokens = (*expected.ids, *ids)
            wrong = next((token for token in tokens if ids.get(token) != expected.ids.get(token)), None)
            reason = (
                None if wrong is None else f"{wrong!r} would get the id {ids.get(wrong)}, not {expected.ids.get(wrong)}"
            )
        except Exception as error:  # the library raises plain exceptions
            reason = first_line(error)
    if reason is not None:
        raise InputError(
            f"{files.label}: its tokenizer cannot take more tokens: {reason}. Use {setting('tokenizer_source', 'base')}, or mend it."
        )


def end_tokens(files: SideFiles, tokens: Vocabulary) -> list[str]:
    """The tokens that end a model's text, by its generation config, else its config."""
    strings = {index: token for token, index in tokens.ids.items()}
    return [strings[index] for index in end_ids(files) if index in strings]


def end_ids(files: SideFiles) -> list[int]:
    """The ids of the tokens that end a model's text, by its generation config, else its config."""
    for name in reversed(CONFIGS):
        ids = files.read_json(name).get("eos_token_id")
        if ids is not None:
            return [index for index in (ids if isinstance(ids, list) else [ids]) if type(index) is int]
    return []


def set_end_tokens(files: SideFiles, ids: list[int]) -> None:
    """Have every config that names the end of text name all of these ids; a generation config where none does."""
    value = ids[0] if len(ids) == 1 else ids
    naming = [name for name in CONFIGS if "eos_token_id" in files.read_json(name)] or ["generation_config.json"]
    for name in naming:
        files.write_json(name, {**files.read_json(name), "eos_token_id": value})


def renumber_tokens(files: SideFiles, new_ids: Mapping[int, int]) -> None:
    """Follow a change of ids in config.json and generation_config.json: every entry that names a token.

    Args:
        new_ids: old id -> new id; an entry whose token has no new id becomes null, and leaves a list.
    """

    def follow(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: follow(inner, old) for inner, old in value.items()}
        if not ID_KEY.search(key):
            return value
        if isinstance(value, list):
            return [new_ids[old] for old in value if old in new_ids]
        return new_ids.get(value) if type(value) is int else value

    for name in CONFIGS:
        if name in files:
            files.write_json(name, {key: follow(key, value) for key, value in files.read_json(name).items()})


def set_vocabulary_size(files: SideFiles, old: int, new: int) -> None:
    """Have config.json state the new number of rows wherever it states the old one."""

    def change(content: dict[str, Any]) -> dict[str, Any]:
        return {
            key: new if key == "vocab_size" and value == old else change(value) if isinstance(value, dict) else value
            for key, value in content.items()
        }

    config = files.read_json("config.json")
    changed = change(config)
    if changed == config:  # the class's own default, which it does not state
        inner = config.get("text_config")
        changed = (
            {**config, "text_config": {**inner, "vocab_size": new}}
            if isinstance(inner, dict)
            else {**config, "vocab_size": new}
        )
    files.write_json("config.json", changed)


def set_tied(files: SideFiles, tied: bool) -> None:
    """Have config.json say whether head and embedding are one, wherever it does."""
    key = "tie_word_embeddings"

    def change(content: dict[str, Any]) -> dict[str, Any]:
        inner = {name: change(value) if isinstance(value, dict) else value for name, value in content.items()}
        return {**inner, key: tied} if key in inner else inner

    files.write_json("config.json", {**change(files.read_json("config.json")), key: tied})
