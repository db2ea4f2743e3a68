"""The tensors whose rows belong to tokens: an embedding, a head, what stands beside them; and their rows in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from alignment.aligned_model import AlignedModel
from alignment.layout import NewTokenRows, TokenRow
from checkpoints.errors import ArgumentError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.rows import AlignedRows, ChosenRows, MeanOfOwners, MeanRows
from checkpoints.settings import setting
from checkpoints.source import Source, TensorRef, dtype_name
from checkpoints.vocabulary import MISSING, Vocabulary


@dataclass(frozen=True)
class Tables:
    """One model's vocabulary tables.

    Attributes:
        model: whose.
        tables: by their output names.
    """

    model: AlignedModel
    tables: dict[str, TensorRef]

    @property
    def label(self) -> str:
        """How messages name the model."""
        return self.model.label

    @property
    def is_nameless(self) -> bool:
        """Whether the model has no tokenizer."""
        return self.model.model.vocabulary is None

    @cached_property
    def tokens(self) -> Vocabulary:
        """The model's tokens; none without a tokenizer."""
        return self.model.model.vocabulary or Vocabulary({})

    @property
    def rows(self) -> int:
        """Rows of each table."""
        return next((ref.info.shape[0] for ref in self.tables.values() if ref.info.shape), 0)

    def has(self, token: str) -> bool:
        """Whether it has a row for a token: some tokenizers know tokens that their models lack."""
        return self.tokens.ids.get(token, self.rows) < self.rows

    def fits(self, row_of: torch.Tensor) -> bool:
        """Whether the tables have the output's rows in the output's order.

        Args:
            row_of: per output row the model's, `[rows]`.
        """
        return self.rows == len(row_of) and torch.equal(row_of, torch.arange(self.rows))


def find_tables(models: Sequence[AlignedModel]) -> list[Tables]:
    """The vocabulary tables of all models that have any; names are those of the first model's."""
    names = table_names(models[0])
    every = [Tables(model, {name: model.tensors[name] for name in names if name in model.tensors}) for model in models]
    return [tables for tables in every if tables.tables]


def table_names(first: AlignedModel) -> list[str]:
    """The output tensors whose rows belong to tokens: embedding, head, and what else is as long in the head's module."""
    architecture, tensors = first.model.architecture, first.tensors
    ends = [name for name in _ends(first.model) if name in tensors and tensors[name].info.shape]
    if not ends:
        return []
    rows = tensors[ends[0]].info.shape[0]
    modules = {architecture.placements[name].module for name in ends if name in architecture.placements}
    beside = [
        name
        for name, placement in architecture.placements.items()
        if placement.module in modules
        and name in tensors
        and name not in ends
        and tensors[name].info.shape[:1] == (rows,)
    ]
    return ends + beside


def lost_table(first: AlignedModel) -> str | None:
    """The embedding or the head of a model, where it should be stored and is not."""
    architecture = first.model.architecture
    return next((name for name in _ends(first.model) if architecture.stored_name(name) not in first.stored), None)


def _ends(model: Model) -> list[str]:
    """The embedding and the head, as far as the model's class has them, stored or not."""
    return [name for name in (model.architecture.input_embedding, model.architecture.output_head) if name is not None]


def check_tables(members: Sequence[Tables]) -> Problems:
    """Refuse tables that have other rows than the rest of their model's, or rows of another kind than the first's."""
    first = members[0]
    problems = Problems()
    for member in members:
        for name, ref in member.tables.items():
            shape, expected = ref.info.shape, (member.rows, *first.tables[name].info.shape[1:])
            if shape != expected or not ref.info.dtype.is_floating_point:
                problems.add(
                    f"{member.label}: {name}: expected floating-point numbers of shape {list(expected)}, with a row for each token, got "
                    f"{dtype_name(ref.info.dtype)} of {list(shape)}. {member.model.advice}"
                )
    return problems


def put_into_rows(
    members: Sequence[Tables], rows: Sequence[torch.Tensor], new_token_rows: NewTokenRows
) -> list[AlignedModel]:
    """Every model with its tables in the output's rows; a model that has them so is left as it is.

    Args:
        members: the models that have tables.
        rows: per model and output row the model's row, or `MISSING`.
        new_token_rows: see `Layout`.
    """
    first = members[0]
    owner: Source = MeanRows(first.tables)  # of rows that no model has: padding
    owners = [  # a model without a head, say, owns no rows
        (member.tables, row_of)
        for member, row_of in zip(members, rows, strict=True)
        if all(name in member.tables for name in first.tables)
    ]
    if new_token_rows == "owners_mean":
        owner = MeanOfOwners(owners[1:], owner)
        owners = owners[:1]
    for tables, row_of in reversed(owners):
        owner = AlignedRows(tables, owner, row_of)
    return [
        member.model if member.fits(row_of) else _with_rows(member, row_of, owner, new_token_rows)
        for member, row_of in zip(members, rows, strict=True)
    ]


def choose_rows(
    members: Sequence[Tables],
    aligned: Sequence[AlignedModel],
    rows: Sequence[torch.Tensor],
    tokens: Vocabulary,
    chosen: Sequence[TokenRow],
    problems: Problems,
) -> list[AlignedModel]:
    """Every model with the rows of some tokens taken from where the user says.

    Args:
        members, rows: see `put_into_rows`, which gave `aligned`.
        tokens: of the output.
        chosen: the tokens.
        problems: gets what is refused, and a note.
    """
    by_row: dict[int, tuple[TokenRow, dict[str, tuple[TensorRef, int]] | None]] = {}
    for wanted in chosen:
        row, where = tokens.ids.get(wanted.token), f"{setting('tokens')}: {wanted.token}"
        if row is None:
            problems.add(ArgumentError(f"{where}: expected a token of the output's vocabulary. Leave it out."))
        elif wanted.model is None:
            by_row[row] = wanted, None
        else:
            found = _row_in(members, wanted, where, problems)
            if found is not None:
                by_row[row] = wanted, found
    made: list[AlignedModel] = []
    for member, model, row_of in zip(members, aligned, rows, strict=True):
        own = {row: source for row, (wanted, source) in by_row.items() if wanted.force or row_of[row] == MISSING}
        if not own:
            made.append(model)
            continue
        tables = {name: model.tensors[name] for name in member.tables}
        source = ChosenRows(tables, own)
        made.append(model.with_tensors({name: TensorRef(source, name) for name in tables}))
        problems.note(f"{member.label}: rows of {len(own):,} tokens are those that the recipe says.")
    return made


def _row_in(
    members: Sequence[Tables], wanted: TokenRow, where: str, problems: Problems
) -> dict[str, tuple[TensorRef, int]] | None:
    """Output name -> the table of the model that was named, and the row there; None where it is refused."""
    member = next((member for member in members if member.label == wanted.model), None)
    if member is None:
        known = ", ".join(member.label for member in members)
        problems.add(
            ArgumentError(f"{where}: expected one of the models {known}, got {wanted.model}. Name one of them.")
        )
        return None
    token = wanted.token if wanted.source is None else wanted.source
    row = token if isinstance(token, int) else member.tokens.ids.get(token)
    if row is None or not 0 <= row < member.rows or any(name not in member.tables for name in members[0].tables):
        problems.add(
            ArgumentError(f"{where}: {wanted.model} has no row for {token}. Name another token, or another model.")
        )
        return None
    return {name: (table, row) for name, table in member.tables.items()}


def _with_rows(member: Tables, row_of: torch.Tensor, owner: Source, new_token_rows: NewTokenRows) -> AlignedModel:
    missing = MeanRows(member.tables) if new_token_rows == "mean" else owner
    aligned = AlignedRows(member.tables, missing, row_of)
    return member.model.with_tensors({name: TensorRef(aligned, name) for name in member.tables})
