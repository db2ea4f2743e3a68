"""One vocabulary for the output, and every model's embedding and head in its rows: matched by token, filled, padded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from checkpoints.chat_templates import take_templates
from checkpoints.errors import ArgumentError, InputError
from checkpoints.model import Model
from checkpoints.rows import AlignedRows, MeanRows
from checkpoints.settings import setting
from checkpoints.sidecars import TOKENIZER_FILES, SideFiles
from checkpoints.source import Source, TensorRef, dtype_name
from checkpoints.tokenizer_files import (
    NewToken,
    add_tokens,
    check_tokens,
    end_tokens,
    renumber_tokens,
    set_end_tokens,
    set_vocabulary_size,
)
from checkpoints.vocabulary import MISSING, PLAIN, Vocabulary, match_rows
from streaming.matching import Matched

if TYPE_CHECKING:
    from streaming.layout import Layout

NAMED_TOKENS = 5
"""New tokens that a note names."""


@dataclass(frozen=True)
class Tables:
    """Whose vocabulary the output has, and the names of its vocabulary tables where they were refused."""

    tokenizer_source: str
    refused: tuple[str, ...] = ()


@dataclass
class _Member:
    """One model's part: its tables by their output names, its tokens, the rows of its tables."""

    model: Model
    tables: dict[str, TensorRef]
    tokens: Vocabulary
    rows: int
    row_of: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.model.label

    @property
    def is_nameless(self) -> bool:
        """Whether it has no tokenizer."""
        return self.model.vocabulary is None

    def has(self, token: str) -> bool:
        """Whether it has a row for a token: some tokenizers know tokens that their models lack."""
        return self.tokens.ids.get(token, self.rows) < self.rows


def align_vocabularies(
    primary: Model,
    others: Sequence[Model],
    refs: dict[str, TensorRef],
    matches: Sequence[Matched],
    layout: Layout,
    files: SideFiles,
    notes: list[str],
    problems: list[str | InputError],
    advice: str,
) -> Tables:
    """Give every model's vocabulary tables the rows of the output's vocabulary, where they differ at all.

    Changes `refs` (the primary model's tensors), `matches` (the others'), `files`, `notes` and `problems`.

    Args:
        layout: whose vocabulary, which rows for tokens that a model lacks, how many rows.
        advice: the last sentence of a refusal.
    """
    source = _named_source(primary, others, layout, problems)
    is_plain = source in ("auto", "base", "union") and layout.pad_to_multiple_of is None
    if is_plain and _are_alike(primary, others, refs, matches):
        if source == "union":
            _unite_configs([primary, *others], primary.vocabulary, layout, files, notes)
        return Tables("base" if source == "auto" else source)
    names = vocabulary_tables(primary, refs)
    lost = _lost_table(primary)
    if lost and not _have_equal_tokens(primary, others):
        problems.append(
            f"{primary.label}: expected {lost}, in which to match the other tokens of other models, by config.json, got no such tensor. "
            "Use matching files."
        )
        return Tables("base", tuple(names))
    if not names:
        return Tables("base")
    inputs = zip((primary, *others), (refs, *(match.tensors for match in matches)), strict=True)
    members = [_member(model, {name: tensors[name] for name in names if name in tensors}) for model, tensors in inputs]
    members = [member for member in members if member.tables]
    uneven = _uneven_tables(members, advice)
    if uneven:
        problems += uneven
        return Tables("base", tuple(names))
    decided, refused = _decide(members, source, layout, files, notes, advice)
    notes += [note for member in members for note in member.notes]
    if refused:
        problems += refused
        return Tables(decided, tuple(names))
    _rewrap(members, layout, primary, refs, others, matches)
    return Tables(decided)


def _named_source(primary: Model, others: Sequence[Model], layout: Layout, problems: list[str | InputError]) -> str:
    """`auto`, `base`, `union` or the label of a model; the primary model by its name is `base`."""
    source = layout.tokenizer_source
    if source in ("auto", "base", "union") or source in {model.label for model in others}:
        return source
    if source != primary.label:
        known = ", ".join(["base", "union", *(model.label for model in others)])
        problems.append(ArgumentError(f"{setting('tokenizer_source')}: expected one of {known}, got {source!r}."))
    return "base"


def _are_alike(primary: Model, others: Sequence[Model], refs: dict[str, TensorRef], matches: Sequence[Matched]) -> bool:
    """Whether all models have the primary one's tokens, ids and shapes, so that there is nothing to match."""
    for model, match in zip(others, matches, strict=True):
        if any(ref.info.shape != refs[name].info.shape for name, ref in match.tensors.items()):
            return False
        if model.vocabulary_digest == primary.vocabulary_digest:
            continue
        ours, theirs = primary.vocabulary, model.vocabulary
        if ours is None or theirs is None or ours.ids != theirs.ids:
            return False
    return True


def _have_equal_tokens(primary: Model, others: Sequence[Model]) -> bool:
    """Whether all models that have a tokenizer have the primary one's tokens and ids, or it has none."""
    known = [model.vocabulary.ids for model in (primary, *others) if model.vocabulary is not None]
    return primary.vocabulary is None or all(ids == known[0] for ids in known)


def vocabulary_tables(model: Model, refs: dict[str, TensorRef]) -> list[str]:
    """The output tensors whose rows belong to tokens: embedding, head, and what else is as long in the head's module."""
    architecture = model.architecture
    ends = [name for name in _ends(model) if name in refs and refs[name].info.shape]
    if not ends:
        return []
    rows = refs[ends[0]].info.shape[0]
    modules = {architecture.placements[name].module for name in ends if name in architecture.placements}
    beside = [
        name
        for name, placement in architecture.placements.items()
        if placement.module in modules and name in refs and name not in ends and refs[name].info.shape[:1] == (rows,)
    ]
    return ends + beside


def _ends(model: Model) -> list[str]:
    """The embedding and the head, as far as the model's class has them, stored or not."""
    return [name for name in (model.architecture.input_embedding, model.architecture.output_head) if name is not None]


def _lost_table(model: Model) -> str | None:
    """The embedding or the head of a model, where it should be stored and is not."""
    return next(
        (name for name in _ends(model) if model.architecture.stored_name(name) not in model.weights.tensors), None
    )


def _uneven_tables(members: Sequence[_Member], advice: str) -> list[str | InputError]:
    """What is wrong with tables that have other rows than the rest of their model's, or rows of another kind than the first's."""
    first = members[0]
    problems: list[str | InputError] = []
    for member in members:
        for name, ref in member.tables.items():
            shape, expected = ref.info.shape, (member.rows, *first.tables[name].info.shape[1:])
            if shape != expected or not ref.info.dtype.is_floating_point:
                problems.append(
                    f"{member.label}: {name}: expected floating-point numbers of shape {list(expected)}, with a row for each token, got "
                    f"{dtype_name(ref.info.dtype)} of {list(shape)}. {advice}"
                )
    return problems


def _member(model: Model, tables: dict[str, TensorRef]) -> _Member:
    rows = next((ref.info.shape[0] for ref in tables.values() if ref.info.shape), 0)
    return _Member(model, tables, model.vocabulary or Vocabulary({}), rows)


def _decide(
    members: Sequence[_Member], source: str, layout: Layout, files: SideFiles, notes: list[str], advice: str
) -> tuple[str, list[str | InputError]]:
    """Fill in every member's `row_of` and notes, and change the files. Returns: the vocabulary chosen, what is refused."""
    nameless = next((member.label for member in members if member.is_nameless), None)
    if nameless is None:
        return _match_by_token(members, source, layout, files, notes, advice)
    problems = _match_by_position(members, layout, files)
    if source not in ("auto", "base"):
        problems.append(
            f"{setting('tokenizer_source', source)}: {nameless} has no tokenizer. Add its tokenizer files, or leave the flag out."
        )
    return "base", problems


def _match_by_position(members: Sequence[_Member], layout: Layout, files: SideFiles) -> list[str | InputError]:
    """Match the tables of models without tokenizers; what is refused."""
    first, *rest = members
    problems: list[str | InputError] = []
    rows = _padded(first.rows, layout)
    first.row_of = _by_position(first.rows, rows)
    for member in rest:
        nameless = (first if first.is_nameless else member).label
        if not (member.is_nameless or first.is_nameless):
            member.row_of = match_rows(first.tokens, rows, member.tokens, member.rows)
        elif member.rows == first.rows:
            member.row_of = _by_position(first.rows, rows)
            member.notes.append(
                f"{nameless}: has no tokenizer; vocabulary rows of {member.label} are matched by position."
            )
        else:
            table = next(iter(member.tables))
            problems.append(
                f"{member.label}: {table}: expected {first.rows} rows as in {first.label}, got {member.rows}, and {nameless} has no tokenizer to match them by. "
                "Add its tokenizer files."
            )
    if rows != first.rows:
        set_vocabulary_size(files, first.rows, rows)
    return problems


def _by_position(rows: int, out_rows: int) -> torch.Tensor:
    return torch.cat([torch.arange(rows), torch.full((out_rows - rows,), MISSING)])


def _match_by_token(
    members: Sequence[_Member], source: str, layout: Layout, files: SideFiles, notes: list[str], advice: str
) -> tuple[str, list[str | InputError]]:
    """See `_decide`; every model has a tokenizer."""
    first, *rest = members
    strangers = [
        member for member in rest if not any(member.has(token) and first.has(token) for token in member.tokens.ids)
    ]
    if strangers:
        return source, [
            f"{member.label}: its tokenizer shares no token with that of {first.label}. {advice}"
            for member in strangers
        ]
    new = _tokens_of_others(members) if source in ("auto", "union") else []
    if source == "auto":
        source = "union" if new or _rows_owned(first.tokens, members, first.rows) > first.rows else "base"
    donor = next((member for member in rest if member.label == source), first)
    tokens, rows = donor.tokens, donor.rows
    if new:
        add_tokens(files, tokens, new)
        tokens = Vocabulary({**tokens.ids, **{token.token: token.id for token in new}})
        try:
            check_tokens(files, tokens, trust_remote_code=first.model.trust_remote_code)
        except InputError as error:
            return source, [error]
        notes.append(_describe_new(new, first))
    if source == "union":
        rows = _rows_owned(tokens, members, rows)
        _unite_configs([member.model for member in members], tokens, layout, files, notes)
    if donor is not first:
        _take_tokenizer(first, donor, files)
    most = sum(member.rows + len(member.tokens.ids) for member in members)
    if rows > most:  # as ids far beyond the rows would have it, to fill a disk
        return source, [
            f"{first.label}: expected at most {most:,} rows for all tokens, got ids for {rows:,}. Mend its tokenizer."
        ]
    rows = _padded(rows, layout)
    for member in members:
        member.row_of = match_rows(tokens, rows, member.tokens, member.rows)
    _describe_rows(members, layout)
    if rows != first.rows:
        set_vocabulary_size(files, first.rows, rows)
        notes.append(f"the vocabulary tables get {rows:,} rows, those of {first.label} have {first.rows:,}.")
    return source, []


def _rows_owned(tokens: Vocabulary, members: Sequence[_Member], rows: int) -> int:
    """How many rows tables need: `rows`, or more for the tokens behind them that some model has a row for."""
    behind = (
        index for token, index in tokens.ids.items() if index >= rows and any(member.has(token) for member in members)
    )
    return max(behind, default=rows - 1) + 1


def _padded(rows: int, layout: Layout) -> int:
    multiple = layout.pad_to_multiple_of or 1
    return -(-rows // multiple) * multiple


def _tokens_of_others(members: Sequence[_Member]) -> list[NewToken]:
    """The tokens with rows in the other models that the first one lacks, in the order of models and ids."""
    first, *rest = members
    found: dict[str, NewToken] = {}
    ids = itertools.count(first.tokens.size)
    for member in rest:
        strangers = member.tokens.ids.keys() - first.tokens.ids.keys() - found.keys()
        for token in sorted(strangers, key=member.tokens.ids.__getitem__):
            if member.has(token):
                ordinary = token not in member.tokens.added
                found[token] = NewToken(token, next(ids), member.tokens.added.get(token, PLAIN), ordinary)
    return list(found.values())


def _fits(member: _Member) -> bool:
    """Whether its tables have the output's rows in the output's order."""
    return member.rows == len(member.row_of) and torch.equal(member.row_of, torch.arange(member.rows))


def _describe_new(new: Sequence[NewToken], first: _Member) -> str:
    named = ", ".join(repr(token.token) for token in new[:NAMED_TOKENS]) + (", ..." if len(new) > NAMED_TOKENS else "")
    ordinary = sum(token.ordinary for token in new)
    remark = f"; {ordinary:,} of them are no added tokens in their models" if ordinary else ""
    return f"the output's tokenizer is that of {first.label} and {len(new):,} added token{'s'[: len(new) > 1]}: {named}{remark}."


def _describe_rows(members: Sequence[_Member], layout: Layout) -> None:
    """Note for each model how many rows were matched, added, filled and dropped; nothing where all fit as they are."""
    owned = torch.zeros(len(members[0].row_of), dtype=torch.bool)
    filling = "the owner's row" if layout.new_token_rows == "owner" else "the mean row"
    for member in members:
        has = member.row_of != MISSING
        used, added = int(has.sum()), int((has & ~owned).sum()) if member is not members[0] else 0
        owned |= has
        if not all(_fits(one) for one in members):
            member.notes.append(
                f"{member.label}: vocabulary rows are matched by token: {used - added:,} matched, {added:,} added, "
                f"{len(has) - used:,} filled with {filling}, {member.rows - used:,} dropped."
            )


def _take_tokenizer(first: _Member, donor: _Member, files: SideFiles) -> None:
    """Another model's tokenizer, generation config and ids in place of the primary model's."""
    ids = donor.tokens.ids
    renumber_tokens(files, {index: ids[token] for token, index in first.tokens.ids.items() if token in ids})
    theirs = donor.model.side_files()
    files.take(donor.model.tokenizer_folder, TOKENIZER_FILES)
    if "generation_config.json" in theirs:
        files.take(donor.model.folder, ["generation_config.json"])
    stated = {key: value for key, value in theirs.read_json("config.json").items() if key.endswith("_token_id")}
    files.write_json("config.json", {**files.read_json("config.json"), **stated})


def _unite_configs(
    models: Sequence[Model], tokens: Vocabulary | None, layout: Layout, files: SideFiles, notes: list[str]
) -> None:
    """Every token that ends a model's text ends the output's; a chat template comes from the first model that has one,
    unless another one was asked for."""
    if tokens is None:
        return
    ends = [end_tokens(model.side_files(), model.vocabulary) for model in models if model.vocabulary is not None]
    united = dict.fromkeys(token for tokens_of_one in ends for token in tokens_of_one if token in tokens.ids)
    if list(united) != ends[0]:
        set_end_tokens(files, [tokens.ids[token] for token in united])
        notes.append(f"the output's text ends at any of {', '.join(map(repr, united))}.")
    for model in models[1:] if layout.chat_template is None else ():
        if take_templates(files, model.side_files()):
            notes.append(f"the chat template is that of {model.label}.")


def _rewrap(
    members: Sequence[_Member],
    layout: Layout,
    primary: Model,
    refs: dict[str, TensorRef],
    others: Sequence[Model],
    matches: Sequence[Matched],
) -> None:
    """Put every model's tables into the output's rows; a model that has them so is left as it is."""
    owner: Source = MeanRows(members[0].tables)  # of rows that no model has: padding
    for member in reversed(members):
        if any(name not in member.tables for name in members[0].tables):
            continue  # a model without a head, say, owns no rows
        owner = AlignedRows(member.tables, owner, member.row_of)
    targets = {id(model): match.tensors for model, match in zip(others, matches, strict=True)} | {id(primary): refs}
    for member in members:
        if _fits(member):
            continue
        own = layout.new_token_rows == "mean"
        aligned = AlignedRows(member.tables, MeanRows(member.tables) if own else owner, member.row_of)
        for name in member.tables:
            targets[id(member.model)][name] = TensorRef(aligned, name)
