"""Make the output's tokenizer and config where several models' tokens come together: new tokens, another model's files, ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from alignment.aligned_model import AlignedModel
from alignment.layout import Layout
from alignment.tables import Tables
from checkpoints.chat_templates import take_templates
from checkpoints.errors import InputError
from checkpoints.problems import Problems
from checkpoints.side_names import TOKENIZER_FILES
from checkpoints.sidecars import SideFiles
from checkpoints.tokenizer_files import NewToken, end_ids, end_tokens, renumber_tokens, set_end_tokens
from checkpoints.vocabulary import PLAIN, Vocabulary

NAMED_TOKENS = 5
"""New tokens that a note names."""


def tokens_of_others(members: Sequence[Tables]) -> list[NewToken]:
    """The tokens with rows in the other models that the first one lacks, in the order of models and ids."""
    first, *rest = members
    new: dict[str, NewToken] = {}
    ids = itertools.count(first.tokens.size)
    for member in rest:
        strangers = member.tokens.ids.keys() - first.tokens.ids.keys() - new.keys()
        for token in sorted(strangers, key=member.tokens.ids.__getitem__):
            if member.has(token):
                ordinary = token not in member.tokens.added
                new[token] = NewToken(token, next(ids), member.tokens.added.get(token, PLAIN), ordinary)
    return list(new.values())


def describe_new(new: Sequence[NewToken], first: Tables) -> str:
    """A note on the tokens that the output's tokenizer has more than the first model's."""
    named = ", ".join(repr(token.token) for token in new[:NAMED_TOKENS]) + (", ..." if len(new) > NAMED_TOKENS else "")
    ordinary = sum(token.ordinary for token in new)
    remark = f"; {ordinary:,} of them are no added tokens in their models" if ordinary else ""
    return f"the output's tokenizer is that of {first.label} and {len(new):,} added token{'s'[: len(new) > 1]}: {named}{remark}."


def take_tokenizer(first: Tables, donor: Tables, files: SideFiles) -> None:
    """Put another model's tokenizer, generation config and ids in place of the first model's."""
    ids, model = donor.tokens.ids, donor.model.model
    renumber_tokens(files, {index: ids[token] for token, index in first.tokens.ids.items() if token in ids})
    theirs = model.side_files()
    files.take(model.tokenizer_folder, TOKENIZER_FILES)
    if "generation_config.json" in theirs:
        files.take(model.folder, ("generation_config.json",))
    stated = {key: value for key, value in theirs.read_json("config.json").items() if key.endswith("_token_id")}
    files.write_json("config.json", {**files.read_json("config.json"), **stated})


def unite_configs(
    models: Sequence[AlignedModel],
    vocabulary: Callable[[], Vocabulary | None],
    layout: Layout,
    files: SideFiles,
    problems: Problems,
) -> bool:
    """End the output's text at every token that ends a model's; take the chat template of the first model that has one,
    unless another one was asked for.

    Args:
        vocabulary: gives the output's tokens; reading them takes a while, and mostly all models end alike.

    Returns: whether either made files other than the first model's.
    """
    before = len(problems.notes)
    inputs = [model.model for model in models]
    try:
        alike = len({(model.vocabulary_digest, tuple(end_ids(model.side_files()))) for model in inputs}) == 1
    except InputError as error:  # a file that nobody could read is copied as it is
        problems.note(f"where the text ends was not compared: {error}")
        return False
    tokens = None if alike else vocabulary()
    ends = [end_tokens(model.side_files(), model.vocabulary) for model in inputs if tokens and model.vocabulary]
    if tokens and ends:
        _unite_ends(ends, tokens, files, problems)
    is_chosen = layout.chat_template is not None or layout.copy_tokenizer_from is not None
    for model in () if is_chosen else inputs[1:]:
        if take_templates(files, model.side_files()):
            problems.note(f"the chat template is that of {model.label}.")
    return len(problems.notes) > before


def _unite_ends(ends: Sequence[Sequence[str]], tokens: Vocabulary, files: SideFiles, problems: Problems) -> None:
    united = dict.fromkeys(token for tokens_of_one in ends for token in tokens_of_one if token in tokens.ids)
    if list(united) != ends[0]:
        set_end_tokens(files, [tokens.ids[token] for token in united])
        problems.note(f"the output's text ends at any of {', '.join(map(repr, united))}.")
