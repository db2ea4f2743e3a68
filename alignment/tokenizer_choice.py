"""Replace the output's tokenizer files and chat template where a user chose others than its vocabulary brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alignment.layout import Layout, parse_donor
from checkpoints.chat_templates import (
    DEFAULT,
    check_template,
    foreign_markers,
    is_literal,
    read_template,
    set_templates,
    templates_of,
)
from checkpoints.errors import InputError
from checkpoints.location import ModelName, locate
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.side_names import TOKENIZER_FILES
from checkpoints.sidecars import SideFiles
from checkpoints.tokenizer_files import tokens_of
from checkpoints.vocabulary import Vocabulary, read_vocabulary


def choose_tokenizer_files(files: SideFiles, layout: Layout, models: Sequence[Model], problems: Problems) -> None:
    """Put the tokenizer files and the chat template that `layout` names in the place of the output's.

    Args:
        files: the output's, its vocabulary decided; get the files and the template that were chosen.
        models: every input, the one that gives the config first.
        problems: gets what does not fit, and notes.
    """
    trust = models[0].trust_remote_code
    if layout.copy_tokenizer_from is not None:
        with problems.collect():
            _copy_tokenizer(files, parse_donor(layout.copy_tokenizer_from), trust, problems)
    if layout.chat_template is not None:
        with problems.collect():
            _set_chat_template(files, layout.chat_template, models, trust, problems)


def template_label(chosen: str) -> str:
    """How people know the template that `Layout.chat_template` names."""
    return "one that is written out" if is_literal(chosen) else chosen


def _copy_tokenizer(files: SideFiles, name: ModelName, trust: bool, problems: Problems) -> None:
    """Take a model's tokenizer files. Raises InputError where a token of it has another id in the output, or none."""
    where = locate(name, weights=False, quiet=True, trust_remote_code=trust)
    theirs = read_vocabulary(where.folder, str(name), trust_remote_code=trust)
    if theirs is None:
        raise InputError(f"{setting('copy_tokenizer_from', name)}: has no tokenizer files. Name a model that does.")
    ours = tokens_of(files, trust_remote_code=trust)
    if ours is None:
        _check_rows(files, theirs, name)
    else:
        _check_ids(ours, theirs, name)
    files.take(where.folder, TOKENIZER_FILES)
    lacking = 0 if ours is None else len(ours.ids.keys() - theirs.ids.keys())
    less = f"; {lacking:,} tokens that have rows are not in it" if lacking else ""
    if where.note:
        problems.note(where.note)
    problems.note(f"the tokenizer files are those of {name}{less}.")


def _check_ids(ours: Vocabulary, theirs: Vocabulary, name: ModelName) -> None:
    differing = {token: index for token, index in theirs.ids.items() if ours.ids.get(token) != index}
    if differing:
        token, index = next(iter(differing.items()))
        raise InputError(
            f"{setting('copy_tokenizer_from', name)}: {len(differing):,} of its {len(theirs.ids):,} tokens have another id in the output, or none: "
            f"{token!r} has {index}, and {ours.ids.get(token, 'none')} there. Name a model with the output's vocabulary, or give "
            f"the output that model's ({setting('tokenizer_source')})."
        )


def _check_rows(files: SideFiles, theirs: Vocabulary, name: ModelName) -> None:
    config = files.read_json("config.json")
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if type(rows) is int and theirs.size > rows:
        raise InputError(
            f"{setting('copy_tokenizer_from', name)}: its ids go up to {theirs.size - 1}, and the output has {rows:,} rows. Name a model "
            "with the output's vocabulary."
        )


def _set_chat_template(files: SideFiles, chosen: str, models: Sequence[Model], trust: bool, problems: Problems) -> None:
    """Set the template that was named. Raises InputError where it is none."""
    template = read_template(chosen)
    if template is None:
        templates = _most_common(models, problems)
        if templates is None:
            return
    else:
        check_template(template, setting("chat_template", template_label(chosen)))
        templates = {DEFAULT: template}
        problems.note(f"the chat template is {template_label(chosen)}.")
    set_templates(files, templates)
    tokens = tokens_of(files, trust_remote_code=trust)
    foreign = foreign_markers(templates[DEFAULT], tokens.ids) if tokens else []
    if foreign:
        problems.note(
            f"the chat template writes {', '.join(map(repr, foreign))}, which the output's tokenizer does not have as tokens: the "
            "model reads them in pieces."
        )


def _most_common(models: Sequence[Model], problems: Problems) -> dict[str, str] | None:
    """All templates of the first model with the default template that most models have; None where none has any."""
    templates_by_model = [(model.label, templates_of(model.side_files())) for model in models]
    having = [(label, templates) for label, templates in templates_by_model if DEFAULT in templates]
    if not having:
        problems.note("no input has a chat template, and so the output has none.")
        return None
    counts = Counter(templates[DEFAULT].strip() for _, templates in having)
    text, count = counts.most_common(1)[0]  # of equally many the first
    label, templates = next(entry for entry in having if entry[1][DEFAULT].strip() == text)
    problems.note(f"the chat template is that of {label}, which {count} of {len(models)} inputs have.")
    return templates
