"""Give the output one vocabulary, and every model's embedding and head its rows: matched by token, filled, padded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from alignment.aligned_model import AlignedModel
from alignment.layout import Layout, NewTokenRows
from alignment.output_tokenizer import describe_new, take_tokenizer, tokens_of_others, unite_configs
from alignment.tables import Tables, check_tables, choose_rows, find_tables, lost_table, put_into_rows, table_names
from checkpoints.errors import ArgumentError, InputError
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.sidecars import SideFiles
from checkpoints.tokenizer_files import add_tokens, check_tokens, set_vocabulary_size
from checkpoints.vocabulary import MISSING, Vocabulary, match_rows

FILLINGS = {"owner": "the owner's row", "owners_mean": "the mean of the owners' rows", "mean": "the mean row"}
"""Value of `Layout.new_token_rows` -> how a note says it."""


@dataclass(frozen=True)
class Vocabularies:
    """The models once their vocabularies are one.

    Attributes:
        tokenizer_source: whose vocabulary the output has: `base`, `union` or the label of a model.
        new_token_rows: `owner`, `owners_mean` or `mean`.
        models: with their vocabulary tables in the output's rows.
        refused: names of the vocabulary tables, where they were refused.
    """

    tokenizer_source: str
    new_token_rows: NewTokenRows
    models: list[AlignedModel]
    refused: Collection[str] = ()


def align_vocabularies(
    models: Sequence[AlignedModel], layout: Layout, files: SideFiles, problems: Problems
) -> Vocabularies:
    """Give every model's vocabulary tables the rows of the output's vocabulary, where they differ at all.

    Args:
        models: the one that gives the config first.
        layout: whose vocabulary, which rows for tokens that a model lacks, how many rows.
        files: the output's, the first model's so far; get the vocabulary that is decided on.
        problems: gets what is refused, and notes.
    """
    source = _named_source(models, layout, problems)
    new_rows: NewTokenRows = "owner" if layout.new_token_rows == "auto" else layout.new_token_rows
    if (
        source in ("auto", "base", "union")
        and layout.pad_to_multiple_of is None
        and not layout.tokens
        and _are_alike(models)
    ):
        united = source != "base" and unite_configs(models, lambda: models[0].model.vocabulary, layout, files, problems)
        return Vocabularies(_decided(source, united), new_rows, list(models))
    if models[0].model.is_file:
        asked = {
            "tokenizer_source": None if source in ("auto", "base") else source,
            "pad_to_multiple_of": layout.pad_to_multiple_of,
            "tokens": ", ".join(row.token for row in layout.tokens) or None,
        }
        for key, value in asked.items():
            if value is None:
                continue
            problems.add(
                ArgumentError(
                    f"{setting(key, value)}: {models[0].label} is a file of tensors, which has no tokenizer. Leave it out."
                )
            )
        return Vocabularies("base", new_rows, list(models))
    names = table_names(models[0])
    lost = lost_table(models[0])
    if lost and not _have_equal_tokens(models):
        problems.add(
            f"{models[0].label}: expected {lost}, in which to match the other tokens of other models, by config.json, got no such tensor. "
            "Use matching files."
        )
        return Vocabularies("base", new_rows, list(models), names)
    if not names:
        return Vocabularies("base", new_rows, list(models))
    members = find_tables(models)
    uneven = check_tables(members)
    if uneven:
        problems.take(uneven)
        return Vocabularies("base", new_rows, list(models), names)
    matched = _match(members, source, layout, files, problems)
    if not matched.rows:
        return Vocabularies(matched.source, new_rows, list(models), names)
    if layout.new_token_rows == "auto" and _share_new_tokens(matched.rows):
        new_rows = "owners_mean"
    _describe_rows(members, matched, new_rows, problems)
    changed = put_into_rows(members, matched.rows, new_rows)
    if layout.tokens:
        changed = choose_rows(members, changed, matched.rows, matched.tokens, layout.tokens, problems)
    having = [member.model for member in members]
    aligned = [next((new for old, new in zip(having, changed, strict=True) if old is model), model) for model in models]
    return Vocabularies(matched.source, new_rows, aligned)


def _share_new_tokens(rows: Sequence[torch.Tensor]) -> bool:
    """Whether two or more models have a row that the first one lacks."""
    has = torch.stack([row_of != MISSING for row_of in rows])  # [models, rows]
    return bool(((has[1:].sum(dim=0) > 1) & ~has[0]).any())


def _named_source(models: Sequence[AlignedModel], layout: Layout, problems: Problems) -> str:
    """`auto`, `base`, `union` or the label of a model; the first model by its name is `base`."""
    source = layout.tokenizer_source
    first, *rest = models
    if source in ("auto", "base", "union") or source in {model.label for model in rest}:
        return source
    if source != first.label:
        known = ", ".join(["base", "union", *(model.label for model in rest)])
        problems.add(ArgumentError(f"{setting('tokenizer_source')}: expected one of {known}, got {source!r}."))
    return "base"


def _are_alike(models: Sequence[AlignedModel]) -> bool:
    """Whether all models have the first one's tokens, ids and shapes, so that there is nothing to match."""
    first, *rest = models
    for model in rest:
        if any(ref.info.shape != first.tensors[name].info.shape for name, ref in model.tensors.items()):
            return False
        if model.model.vocabulary_digest == first.model.vocabulary_digest:
            continue
        ours, theirs = first.model.vocabulary, model.model.vocabulary
        if ours is None or theirs is None or ours.ids != theirs.ids:
            return False
    return True


def _have_equal_tokens(models: Sequence[AlignedModel]) -> bool:
    """Whether all models that have a tokenizer have the first one's tokens and ids, or that has none."""
    known = [model.model.vocabulary.ids for model in models if model.model.vocabulary is not None]
    return models[0].model.vocabulary is None or all(ids == known[0] for ids in known)


@dataclass(frozen=True)
class _Matched:
    """Whose vocabulary the output has; per model and output row the model's row, or `MISSING`, empty where it was refused."""

    source: str
    rows: Sequence[torch.Tensor] = ()
    by_token: bool = False
    tokens: Vocabulary = field(default_factory=lambda: Vocabulary({}))


def _match(members: Sequence[Tables], source: str, layout: Layout, files: SideFiles, problems: Problems) -> _Matched:
    """Find every model's rows for the output's, and give the files the output's vocabulary."""
    nameless = next((member.label for member in members if member.is_nameless), None)
    if nameless is None:
        return _match_by_token(members, source, layout, files, problems)
    refused = len(problems)
    rows = _match_by_position(members, layout, files, problems)
    if source not in ("auto", "base"):
        chosen = setting("tokenizer_source", source)
        problems.add(f"{chosen}: {nameless} has no tokenizer. Add its tokenizer files, or leave the setting out.")
    if layout.tokens:
        problems.add(
            f"{setting('tokens')}: {nameless} has no tokenizer. Add its tokenizer files, or leave the setting out."
        )
    return _Matched("base", rows if len(problems) == refused else ())


def _match_by_position(
    members: Sequence[Tables], layout: Layout, files: SideFiles, problems: Problems
) -> list[torch.Tensor]:
    """Match the tables of models without tokenizers."""
    first, *rest = members
    count = _padded(first.rows, layout)
    by_position = torch.cat([torch.arange(first.rows), torch.full((count - first.rows,), MISSING)])
    rows = [by_position]
    for member in rest:
        nameless = (first if first.is_nameless else member).label
        if not (member.is_nameless or first.is_nameless):
            rows.append(match_rows(first.tokens, count, member.tokens, member.rows))
        elif member.rows == first.rows:
            rows.append(by_position)
            problems.note(f"{nameless}: has no tokenizer; vocabulary rows of {member.label} are matched by position.")
        else:
            table = next(iter(member.tables))
            problems.add(
                f"{member.label}: {table}: expected {first.rows} rows as in {first.label}, got {member.rows}, and {nameless} has no tokenizer to match them by. "
                "Add its tokenizer files."
            )
    if count != first.rows:
        set_vocabulary_size(files, first.rows, count)
    return rows


def _match_by_token(
    members: Sequence[Tables], source: str, layout: Layout, files: SideFiles, problems: Problems
) -> _Matched:
    """See `_match`; every model has a tokenizer."""
    first, *rest = members
    # A tokenizer that shares no token with the first has no row to match.
    strangers = [
        member for member in rest if not any(member.has(token) and first.has(token) for token in member.tokens.ids)
    ]
    for member in strangers:
        problems.add(f"{member.label}: its tokenizer shares no token with that of {first.label}. {member.model.advice}")
    if strangers:
        return _Matched(source)
    # Which tokens the output has, and from which tokenizer.
    chosen = source
    new = tokens_of_others(members) if source in ("auto", "union") else []
    if source == "auto":
        source = "union" if new or _rows_owned(first.tokens, members, first.rows) > first.rows else "base"
    donor = next((member for member in rest if member.label == source), first)
    tokens, count = donor.tokens, donor.rows
    if new:
        add_tokens(files, tokens, new)
        tokens = Vocabulary({**tokens.ids, **{token.token: token.id for token in new}})
        try:
            check_tokens(files, tokens, trust_remote_code=first.model.model.trust_remote_code)
        except InputError as error:
            problems.add(error)
            return _Matched(source)
        problems.note(describe_new(new, first))
    # How many rows: for all tokens, padded, and not as many as a forged id asks for.
    if source == "union":
        count = _rows_owned(tokens, members, count)
    if source == "union" or chosen == "auto":
        united = unite_configs([member.model for member in members], lambda: tokens, layout, files, problems)
        source = _decided(source, united)
    if donor is not first:
        take_tokenizer(first, donor, files)
    most = sum(member.rows + len(member.tokens.ids) for member in members)
    if count > most:  # as ids far beyond the rows would have it, to fill a disk
        problems.add(
            f"{first.label}: expected at most {most:,} rows for all tokens, got ids for {count:,}. Mend its tokenizer."
        )
        return _Matched(source)
    count = _padded(count, layout)
    # Each model's row for each of them.
    rows = [match_rows(tokens, count, member.tokens, member.rows) for member in members]
    if count != first.rows:
        set_vocabulary_size(files, first.rows, count)
        problems.note(f"the vocabulary tables get {count:,} rows, those of {first.label} have {first.rows:,}.")
    return _Matched(source, rows, by_token=True, tokens=tokens)


def _decided(source: str, united: bool) -> str:
    """What a recipe says afterwards, so that it makes the same files again: a union is one of ends and templates, too."""
    return "union" if united else "base" if source == "auto" else source


def _rows_owned(tokens: Vocabulary, members: Sequence[Tables], rows: int) -> int:
    """How many rows tables need: `rows`, or more for the tokens behind them that some model has a row for."""
    behind = (
        index for token, index in tokens.ids.items() if index >= rows and any(member.has(token) for member in members)
    )
    return max(behind, default=rows - 1) + 1


def _padded(rows: int, layout: Layout) -> int:
    multiple = layout.pad_to_multiple_of or 1
    return -(-rows // multiple) * multiple


def _describe_rows(
    members: Sequence[Tables], matched: _Matched, new_token_rows: NewTokenRows, problems: Problems
) -> None:
    """Note for each model how many rows were matched, added, filled and dropped; nothing where all fit as they are."""
    each = list(zip(members, matched.rows, strict=True))
    if not matched.by_token or all(member.fits(row_of) for member, row_of in each):
        return
    owned = torch.zeros(len(matched.rows[0]), dtype=torch.bool)
    filling = FILLINGS[new_token_rows]
    for member, row_of in each:
        has = row_of != MISSING
        used, added = int(has.sum()), int((has & ~owned).sum()) if member is not members[0] else 0
        owned |= has
        problems.note(
            f"{member.label}: vocabulary rows are matched by token: {used - added:,} matched, {added:,} added, "
            f"{len(has) - used:,} filled with {filling}, {member.rows - used:,} dropped."
        )
