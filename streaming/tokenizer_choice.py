"""The output's tokenizer files and chat template, where a user chose others than its vocabulary brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from checkpoints.chat_templates import (
    DEFAULT,
    check_template,
    foreign_markers,
    is_literal,
    read_template,
    set_templates,
    templates_of,
)
from checkpoints.errors import InputError, collecting
from checkpoints.location import ModelName, locate
from checkpoints.model import Model
from checkpoints.sidecars import TOKENIZER_FILES, SideFiles
from checkpoints.tokenizer_files import tokens_of
from checkpoints.vocabulary import Vocabulary, read_vocabulary
from streaming.layout import Layout, parse_donor


def choose_tokenizer_files(
    files: SideFiles, layout: Layout, models: Sequence[Model], notes: list[str], problems: list[str | InputError]
) -> None:
    """Put the tokenizer files and the chat template that `layout` names in the place of the output's.

    Args:
        files: the output's, its vocabulary decided; changed, as are `notes` and `problems`.
        models: every input, the one that gives the config first.
    """
    trust = models[0].trust_remote_code
    if layout.copy_tokenizer_from is not None:
        with collecting(problems):
            _copy_tokenizer(files, parse_donor(layout.copy_tokenizer_from), trust, notes)
    if layout.chat_template is not None:
        with collecting(problems):
            _set_chat_template(files, layout.chat_template, models, trust, notes)


def template_label(chosen: str) -> str:
    """How people know the template that `Layout.chat_template` names."""
    return "one that is written out" if is_literal(chosen) else chosen


def _copy_tokenizer(files: SideFiles, name: ModelName, trust: bool, notes: list[str]) -> None:
    """Take a model's tokenizer files. Raises InputError where a token of it has another id in the output, or none."""
    where = locate(name, weights=False, quiet=True, trust_remote_code=trust)
    theirs = read_vocabulary(where.folder, str(name), trust_remote_code=trust)
    if theirs is None:
        raise InputError(f"--copy_tokenizer_from {name}: has no tokenizer files. Name a model that does.")
    ours = tokens_of(files, trust_remote_code=trust)
    if ours is None:
        _check_rows(files, theirs, name)
    else:
        _check_ids(ours, theirs, name)
    files.take(where.folder, TOKENIZER_FILES)
    lacking = 0 if ours is None else len(ours.ids.keys() - theirs.ids.keys())
    less = f"; {lacking:,} tokens that have rows are not in it" if lacking else ""
    notes += [where.note] if where.note else []
    notes.append(f"the tokenizer files are those of {name}{less}.")


def _check_ids(ours: Vocabulary, theirs: Vocabulary, name: ModelName) -> None:
    differing = {token: index for token, index in theirs.ids.items() if ours.ids.get(token) != index}
    if differing:
        token, index = next(iter(differing.items()))
        raise InputError(
            f"--copy_tokenizer_from {name}: {len(differing):,} of its {len(theirs.ids):,} tokens have another id in the output, or none: "
            f"{token!r} has {index}, and {ours.ids.get(token, 'none')} there. Name a model with the output's vocabulary, or give "
            "the output that model's (--tokenizer_source)."
        )


def _check_rows(files: SideFiles, theirs: Vocabulary, name: ModelName) -> None:
    config = files.read_json("config.json")
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if type(rows) is int and theirs.size > rows:
        raise InputError(
            f"--copy_tokenizer_from {name}: its ids go up to {theirs.size - 1}, and the output has {rows:,} rows. Name a model "
            "with the output's vocabulary."
        )


def _set_chat_template(files: SideFiles, chosen: str, models: Sequence[Model], trust: bool, notes: list[str]) -> None:
    """Set the template that was named. Raises InputError where it is none."""
    template = read_template(chosen)
    if template is None:
        templates = _most_common(models, notes)
        if templates is None:
            return
    else:
        check_template(template, f"--chat_template {template_label(chosen)}")
        templates = {DEFAULT: template}
        notes.append(f"the chat template is {template_label(chosen)}.")
    set_templates(files, templates)
    tokens = tokens_of(files, trust_remote_code=trust)
    foreign = foreign_markers(templates[DEFAULT], tokens.ids) if tokens else []
    if foreign:
        notes.append(
            f"the chat template writes {', '.join(map(repr, foreign))}, which the output's tokenizer does not have as tokens: the "
            "model reads them in pieces."
        )


def _most_common(models: Sequence[Model], notes: list[str]) -> dict[str, str] | None:
    """All templates of the first model with the default template that most models have; None where none has any."""
    found = [(model.label, templates_of(model.side_files())) for model in models]
    having = [(label, templates) for label, templates in found if DEFAULT in templates]
    if not having:
        notes.append("no input has a chat template, and so the output has none.")
        return None
    counts = Counter(templates[DEFAULT].strip() for _, templates in having)
    text, count = counts.most_common(1)[0]  # of equally many the first
    label, templates = next(one for one in having if one[1][DEFAULT].strip() == text)
    notes.append(f"the chat template is that of {label}, which {count} of {len(models)} inputs have.")
    return templates
