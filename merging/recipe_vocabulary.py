"""What a recipe file says of the output's vocabulary, head and side files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.layout import NEW_TOKEN_ROWS, TokenRow
from checkpoints.errors import unknown
from merging.recipe_pieces import Pieces
from streaming.values import describe


def read_vocabulary(file: Pieces, content: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """`tokenizer_source` or `tokenizer`, None where neither is there, and the keys of vocabulary and side files beside it."""
    further = {
        key: content[key]
        for key in (
            *("pad_to_multiple_of", "new_token_rows", "tie_word_embeddings"),
            *("chat_template", "copy_tokenizer_from", "allow_config_difference"),
        )
        if content.get(key) is not None
    }
    if content.get("tokens") is not None:
        further["tokens"] = _read_tokens(file, "tokens", content["tokens"])
    # `tokenizer` says the same in more words.
    source, place = content.get("tokenizer_source"), "tokenizer_source"
    detailed = content.get("tokenizer")
    if detailed is not None:
        if source is not None:
            file.refuse("tokenizer", "tokenizer_source is given too. Leave one of the two out.")
        if not isinstance(detailed, dict):
            file.refuse("tokenizer", f"expected keys such as source, got {describe(detailed)}.")
            return None, {}
        file.check_keys("tokenizer", detailed, ("source", "pad_to_multiple_of", "tokens"))
        if detailed.get("tokens") is not None:
            if content.get("tokens") is not None:
                file.refuse("tokenizer.tokens", "tokens is given too. Leave one of the two out.")
            further["tokens"] = _read_tokens(file, "tokenizer.tokens", detailed["tokens"])
        source, place = detailed.get("source", "union"), "tokenizer.source"
        if detailed.get("pad_to_multiple_of") is not None:
            further["pad_to_multiple_of"] = detailed["pad_to_multiple_of"]
    # The values of the other keys.
    multiple = further.get("pad_to_multiple_of", 1)
    if type(multiple) is not int or multiple < 1:
        file.refuse("pad_to_multiple_of", f"expected a whole number above 0, got {describe(multiple)}.")
    for key in ("chat_template", "copy_tokenizer_from", "allow_config_difference"):
        file.read_text(key, further.get(key))
    choices: dict[str, Sequence[Any]] = {"new_token_rows": NEW_TOKEN_ROWS, "tie_word_embeddings": (True, False)}
    for key, allowed in choices.items():
        if key in further and further[key] not in allowed:
            file.refuse(
                key,
                f"expected {' or '.join(str(value).lower() for value in allowed)}, got {describe(further[key])}.",
            )
    # Whose tokenizer: a word, or a model.
    if source is None or source in ("base", "union", "auto"):
        return source, further
    if isinstance(source, str):
        source = source.removeprefix("model:")  # as older recipes have it
    return str(file.read_model(place, source)), further


def _read_tokens(file: Pieces, place: str, content: Any) -> tuple[TokenRow, ...]:
    """Where the rows of tokens come from: token -> `source` (a model, or how mergekit spells one), `force`."""
    if not isinstance(content, dict):
        file.refuse(place, f"expected tokens with their source, got {describe(content)}.")
        return ()
    rows = []
    for token, entry in content.items():
        where = f"{place}.{token}"
        if not isinstance(token, str) or not isinstance(entry, dict) or "source" not in entry:
            file.refuse(where, f"expected the key source, got {describe(entry)}.")
            continue
        file.check_keys(where, entry, ("source", "force"))
        force, source = entry.get("force", False), entry["source"]
        if not isinstance(force, bool):
            file.refuse(f"{where}.force", f"expected true or false, got {describe(force)}.")
            continue
        if not isinstance(source, dict) or "kind" not in source:
            model = file.read_model(f"{where}.source", source)
            rows += [TokenRow(token, str(model), None, force)] if model is not None else []
            continue
        kind = source["kind"]
        if kind not in ("zero", "model_token"):
            file.refuse(f"{where}.source.kind", unknown("kind", str(kind), ("zero", "model_token")))
            continue
        file.check_keys(f"{where}.source", source, ("kind", "model", "token", "token_id"))
        if kind == "zero":
            rows.append(TokenRow(token, None, None, force))
            continue
        model = file.read_model(f"{where}.source.model", source.get("model"))
        which = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
        if len(which) > 1 or not all(map(_is_text_or_number, which)):
            file.refuse(f"{where}.source", "expected token, a text, or token_id, a number. Give one of them.")
        elif model is not None:
            rows.append(TokenRow(token, str(model), which[0] if which else None, force))
    return tuple(rows)


def _is_text_or_number(content: Any) -> bool:
    return isinstance(content, str) or type(content) is int
