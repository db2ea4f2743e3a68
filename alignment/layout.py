"""What a user can choose about the output beside its numbers: tokenizer, vocabulary rows, head, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from checkpoints.chat_templates import read_template
from checkpoints.errors import ArgumentError, unknown
from checkpoints.location import ModelName, parse_name
from checkpoints.problems import Problems
from checkpoints.settings import setting

NewTokenRows = Literal["auto", "owner", "owners_mean", "mean"]
NEW_TOKEN_ROWS: tuple[NewTokenRows, ...] = get_args(NewTokenRows)


@dataclass(frozen=True)
class TokenRow:
    """Where the rows of one token come from, in models that lack it.

    Attributes:
        token: of the output's vocabulary.
        model: the model that has them, as its user names it; None for rows of zeros.
        source: the token there, or its id; None for the same token.
        force: in all models, also those that have it.
    """

    token: str
    model: str | None
    source: str | int | None = None
    force: bool = False

    def as_json(self) -> dict[str, Any]:
        """As a recipe's `tokens` has it."""
        if self.model is None:
            return {"source": {"kind": "zero"}, "force": self.force}
        which = {} if self.source is None else {"token_id" if isinstance(self.source, int) else "token": self.source}
        return {"source": {"kind": "model_token", "model": self.model, **which}, "force": self.force}


@dataclass(frozen=True)
class Layout:
    """What a user can choose about the output beside its numbers.

    Attributes:
        tokenizer_source: `base`: the base's tokenizer and vocabulary; `union`: these, and what other models have more; a
            model as the user named it: its tokenizer and vocabulary; `auto`: `union` where a model adds tokens, else `base`.
        new_token_rows: the row of a token in a model that lacks it: `owner`: the row of the first model that has it, the base
            before all others, so that its task vector is zero; `owners_mean`: the base's, where that has it, else the mean of
            the rows of all models that have it; `mean`: the mean of the model's own rows; `auto`: `owners_mean` where two or
            more models have a token that the base lacks, else `owner`, which is the same there.
        pad_to_multiple_of: rows of the vocabulary tables are a multiple of it; None: as many as tokens or the base ask for.
        tie_word_embeddings: whether the output's head is its embedding; None: as in the base.
        chat_template: the name of a known template, a file, a template itself, or `auto`: the one that most inputs have.
        allow_config_difference: entries of config.json, separated by commas, in which the models may differ from the one whose
            config the output has.
        tokens: where the rows of some tokens come from, whatever new_token_rows says.
        copy_tokenizer_from: the model, among the inputs or not, whose tokenizer files take the place of the output's.

    Raises: Refusals: a value that none of them can have.
    """

    tokenizer_source: str = "auto"
    new_token_rows: NewTokenRows = "auto"
    pad_to_multiple_of: int | None = None
    tie_word_embeddings: bool | None = None
    chat_template: str | None = None
    copy_tokenizer_from: str | None = None
    allow_config_difference: str | None = None
    tokens: tuple[TokenRow, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems()
        if self.new_token_rows not in NEW_TOKEN_ROWS:
            known = unknown("value", self.new_token_rows, NEW_TOKEN_ROWS)
            problems.add(ArgumentError(f"{setting('new_token_rows')}: {known}"))
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            problems.add(
                ArgumentError(
                    f"{setting('pad_to_multiple_of')}: expected a whole number above 0, got {self.pad_to_multiple_of}."
                )
            )
        if self.chat_template is not None:
            with problems.collect():
                read_template(self.chat_template)
        if self.copy_tokenizer_from is not None:
            with problems.collect():
                parse_donor(self.copy_tokenizer_from)
        problems.raise_if_any()

    def as_json(self) -> dict[str, Any]:
        """Under the keys of a recipe."""
        return {
            "tokenizer_source": self.tokenizer_source,
            "new_token_rows": self.new_token_rows,
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "tie_word_embeddings": self.tie_word_embeddings,
            "chat_template": self.chat_template,
            "copy_tokenizer_from": self.copy_tokenizer_from,
            **({"allow_config_difference": self.allow_config_difference} if self.allow_config_difference else {}),
            **({"tokens": {row.token: row.as_json() for row in self.tokens}} if self.tokens else {}),
        }


def parse_donor(text: str) -> ModelName:
    """The model of `copy_tokenizer_from`. Raises ArgumentError."""
    try:
        return parse_name(text)
    except ArgumentError as error:
        raise ArgumentError(f"{setting('copy_tokenizer_from')}: {error}") from None
