"""What the output looks like: its tensor names, its vocabulary, its head, and every input brought into that shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from checkpoints.chat_templates import read_template
from checkpoints.errors import ArgumentError, InputError, Refusals, collecting, unknown
from checkpoints.location import ModelName, parse_name
from checkpoints.model import Model
from checkpoints.reader import equal_tensors
from checkpoints.sidecars import SideFiles
from checkpoints.source import FLOAT8, TensorRef
from checkpoints.tokenizer_files import set_tied
from streaming.matching import (
    MODELS_OF_THIS_BASE,
    Matched,
    check_shapes,
    left_out,
    list_kinds,
    match_names,
    unties_itself,
)
from streaming.vocabularies import align_vocabularies

NewTokenRows = Literal["owner", "mean"]


@dataclass(frozen=True)
class Layout:
    """What a user can choose about the output beside its numbers.

    Attributes:
        tokenizer_source: `base`: the base's tokenizer and vocabulary; `union`: these, and what other models have more; a
            model as the user named it: its tokenizer and vocabulary; `auto`: `union` where a model adds tokens, else `base`.
        new_token_rows: the row of a token in a model that lacks it: `owner`: the row of the first model that has it, the base
            before all others, so that its task vector is zero; `mean`: the mean of the model's own rows.
        pad_to_multiple_of: rows of the vocabulary tables are a multiple of it; None: as many as tokens or the base ask for.
        tie_word_embeddings: whether the output's head is its embedding; None: as in the base.
        chat_template: the name of a known template, a file, a template itself, or `auto`: the one that most inputs have.
        copy_tokenizer_from: the model, among the inputs or not, whose tokenizer files take the place of the output's.
    """

    tokenizer_source: str = "auto"
    new_token_rows: NewTokenRows = "owner"
    pad_to_multiple_of: int | None = None
    tie_word_embeddings: bool | None = None
    chat_template: str | None = None
    copy_tokenizer_from: str | None = None

    def __post_init__(self) -> None:
        problems: list[str | InputError] = []
        if self.new_token_rows not in ("owner", "mean"):
            problems.append(
                ArgumentError(f"--new_token_rows: {unknown('value', self.new_token_rows, ['owner', 'mean'])}")
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            problems.append(
                ArgumentError(f"--pad_to_multiple_of: expected a whole number above 0, got {self.pad_to_multiple_of}.")
            )
        if self.chat_template is not None:
            with collecting(problems):
                read_template(self.chat_template)
        if self.copy_tokenizer_from is not None:
            with collecting(problems):
                parse_donor(self.copy_tokenizer_from)
        if problems:
            raise Refusals(problems)

    def as_json(self) -> dict[str, Any]:
        """Under the keys of a recipe."""
        return {
            "tokenizer_source": self.tokenizer_source,
            "new_token_rows": self.new_token_rows,
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "tie_word_embeddings": self.tie_word_embeddings,
            "chat_template": self.chat_template,
            "copy_tokenizer_from": self.copy_tokenizer_from,
        }


def parse_donor(text: str) -> ModelName:
    """The model of `--copy_tokenizer_from`. Raises ArgumentError."""
    try:
        return parse_name(text)
    except ArgumentError as error:
        raise ArgumentError(f"--copy_tokenizer_from: {error}") from None


@dataclass
class Arranged:
    """The inputs of an output, all under its names and in its shapes.

    names: the output's tensors; dtypes: as the primary model stores them; primary: the tensors of the model that gives names, config and dtypes, one for each name.
    others: the other models', in order; what a model does not store is not in it.
    own_names: per other model output tensor -> its name there, where it is another.
    files: the output's side files; layout: what was asked for, `tokenizer_source` decided.
    """

    names: list[str]
    dtypes: Mapping[str, torch.dtype]
    primary: dict[str, TensorRef]
    others: list[dict[str, TensorRef]]
    own_names: list[dict[str, str]]
    files: SideFiles
    layout: Layout
    notes: list[str] = field(default_factory=list)
    problems: list[str | InputError] = field(default_factory=list)


def arrange(
    primary: Model,
    others: Sequence[Model],
    layout: Layout,
    *,
    advice: str = MODELS_OF_THIS_BASE,
    optional: Callable[[str], bool] = lambda name: False,
) -> Arranged:
    """Bring every model's tensors under the names, shapes and vocabulary of the output.

    Args:
        primary: gives names, dtypes, config and, unless `layout` says otherwise, tokenizer, vocabulary and head.
        others: what is merged with it, in order.
        layout: what the user chose.
        advice: the last sentence of a refusal.
        optional: whether an output tensor need not be in the other models, or of another shape there: it is not merged.

    Returns: everything found, refusals included (`problems`).
    """
    files = primary.side_files()
    dropped = left_out(primary)
    notes = []
    if dropped:
        notes.append(f"{primary.label}: left out, as loading ignores or recomputes them: {list_kinds(dropped)}.")
    notes += [
        f"{model.label}: its float8 weights are multiplied with their scales."
        for model in (primary, *others)
        if any(info.dtype in FLOAT8 for part in model.parts for file in part[1] for info in file.tensors.values())
    ]
    names = [name for name in primary.weights.tensors if name not in dropped]
    refs = {name: TensorRef(primary.weights, name) for name in names}
    problems: list[str | InputError] = []
    if layout.tie_word_embeddings is None and unties_itself(primary, dropped):
        set_tied(files, False)
        notes.append(f"{primary.label}: its head is not its embedding; config.json says so in the output.")
    tied: dict[str, str] = {}
    if layout.tie_word_embeddings is not None:
        tied = _set_head(primary, layout.tie_word_embeddings, refs, files, notes, problems)
    dtypes = {name: ref.info.plain_dtype for name, ref in refs.items()}
    matches = [match_names(primary, model, refs, tied, advice=advice, optional=optional) for model in others]
    tables = align_vocabularies(primary, others, refs, matches, layout, files, notes, problems, advice)
    for model, match in zip(others, matches, strict=True):
        check_shapes(primary, model, refs, tables.refused, match, optional)
    for match in matches:
        problems += match.problems
        notes += match.notes
    decided = replace(layout, tokenizer_source=tables.tokenizer_source)
    return Arranged(
        list(refs), dtypes, refs, [match.tensors for match in matches], [_renamed(match) for match in matches],
        files, decided, notes, problems,
    )  # fmt: skip


def _renamed(match: Matched) -> dict[str, str]:
    return {name: own for name, own in match.own_names.items() if name != own}


def _set_head(
    primary: Model,
    tie: bool,
    refs: dict[str, TensorRef],
    files: SideFiles,
    notes: list[str],
    problems: list[str | InputError],
) -> dict[str, str]:
    """Add the output's head to `refs`, or take it out, as the user asked.

    Returns: the head that the output ties, and the embedding that it is tied to; empty where it is not tied by request.
    """
    architecture = primary.architecture
    head, embedding = architecture.output_head, architecture.input_embedding
    word = "yes" if tie else "no"
    if head is None or embedding is None or architecture.stored_name(embedding) not in refs:
        problems.append(
            InputError(
                f"--tie_word_embeddings {word}: {primary.label} has no head and embedding of one vocabulary. Leave it out."
            )
        )
        return {}
    embedding = architecture.stored_name(embedding)
    set_tied(files, tie)
    if not tie:
        if head not in refs:
            # In the base's own order a head may stand anywhere; names are sorted when they are written.
            refs[head] = TensorRef(primary.weights, embedding)
            notes.append(f"{primary.label}: {head} is tied to {embedding} there; the output gets a head of its own.")
        return {}
    if head in refs and head != embedding:
        if not equal_tensors(primary.weights, head, embedding):
            problems.append(
                InputError(
                    f"--tie_word_embeddings yes: {primary.label}: {head} and {embedding} hold different numbers. Leave it out."
                )
            )
        del refs[head]
        notes.append(f"{primary.label}: {head} is left out, as it equals {embedding}, to which the output ties it.")
    return {head: embedding}
