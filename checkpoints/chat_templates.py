"""Chat templates: those that are known by name, those that a checkpoint holds, and how they are replaced.

A checkpoint holds one template or several by name, `default` among them: in `chat_template.jinja` and
`additional_chat_templates/NAME.jinja`, or in older ones in `tokenizer_config.json`, or for processors in
`chat_template.json`. Where several of these are there, transformers 5 takes the first, and so does this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from checkpoints.errors import ArgumentError, InputError, first_line, unknown
from checkpoints.settings import setting
from checkpoints.side_names import CHAT_TEMPLATE_FILES
from checkpoints.sidecars import SideFiles
from checkpoints.strangers import STRANGERS, StrangersError

AUTO = "auto"
DEFAULT = "default"
FILE = "chat_template.jinja"
FURTHER = "additional_chat_templates/"
CONFIGS = ("tokenizer_config.json", "processor_config.json")
"""Files whose entry `chat_template` an older checkpoint has its template in."""
_KNOWN = Path(__file__).parent / "templates"
_MARKER = re.compile(r"<\|[^|<>{}\s'\"]+\|>|\[\|[^|\[\]{}\s'\"]+\|\]")

_SHORT = re.compile(r"<[^<>{}\s'\"]{1,64}>|\[[^\[\]{}\s'\"]{1,64}\]")
_ENDS = re.compile(r"</s>|end|eot|eos", re.IGNORECASE)


def known_templates() -> list[str]:
    """The names of the templates that come with the toolkit."""
    return sorted(path.stem for path in _KNOWN.glob("*.jinja"))


def read_template(text: str) -> str | None:
    """The template that a user means: the name of a known one, a file, or the template itself; None for `auto`.

    Raises: ArgumentError: it is nothing of that; InputError: the file cannot be read.
    """
    if text == AUTO:
        return None
    if text in known_templates():
        return (_KNOWN / f"{text}.jinja").read_text("utf-8")
    if is_literal(text):
        return text
    path = Path(os.path.expanduser(text))
    if not path.is_file():
        message = unknown("template", text, [AUTO, *known_templates()])
        raise ArgumentError(f"{setting('chat_template')}: {message} Or give a file that exists.")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{setting('chat_template', text)}: expected a text file, got {first_line(error)}.") from None


def is_literal(text: str) -> bool:
    """Whether a text is a template itself, no name of one."""
    return "{{" in text or "{%" in text


def check_template(template: str, label: str) -> None:
    """Raise InputError where transformers cannot compile a template. `label`: how the message names it."""
    try:
        STRANGERS.ask("compile_template", template=template)
    except StrangersError as error:
        where = f"line {error.line}: " if error.line else ""
        raise InputError(f"{label}: expected a Jinja template, got an error: {where}{first_line(error)}.") from None


def foreign_markers(template: str, tokens: Collection[str]) -> list[str]:
    """The markers that a template writes, such as `<|im_start|>`, that are no tokens: a tokenizer would spell them out."""
    written = _without_comments(template)
    return [marker for marker in dict.fromkeys(_MARKER.findall(written)) if marker not in tokens]


def end_markers(template: str, eos_token: str | None, tokens: Collection[str]) -> list[str]:
    """The tokens that a template writes and that may end a turn, by what they are called; what it calls `eos_token` is one.

    Read off the text: the template, which may be a stranger's, is not run.
    """
    written = _without_comments(template)
    named = [eos_token] if eos_token is not None and "eos_token" in written else []
    return [
        marker for marker in dict.fromkeys([*filter(_ENDS.search, _SHORT.findall(written)), *named]) if marker in tokens
    ]


def _without_comments(template: str) -> str:
    """A template without `{# ... #}`, in one pass: a regular expression would look for the end from every beginning."""
    kept, at = [], 0
    while (begin := template.find("{#", at)) >= 0 and (end := template.find("#}", begin + 2)) >= 0:
        kept.append(template[at:begin])
        at = end + 2
    return "".join([*kept, template[at:]])


def templates_of(files: SideFiles) -> dict[str, str]:
    """The templates that a checkpoint holds, by name; empty where it holds none."""
    templates = {
        name.removeprefix(FURTHER).removesuffix(".jinja"): files.read(name).decode(errors="replace")
        for name in files.names
        if name.startswith(FURTHER)
    }
    if FILE in files:
        templates[DEFAULT] = files.read(FILE).decode(errors="replace")
    if templates:
        return templates
    for name in (CONFIGS[0], "chat_template.json", CONFIGS[1]):
        entry = files.read_json(name).get("chat_template")
        if isinstance(entry, str):
            return {DEFAULT: entry}
        if isinstance(entry, list):
            named = [
                named_template
                for named_template in entry
                if isinstance(named_template, dict) and {"name", "template"} <= named_template.keys()
            ]
            return {str(named_template["name"]): str(named_template["template"]) for named_template in named}
    return {}


def set_templates(files: SideFiles, templates: Mapping[str, str]) -> None:
    """Put templates, by name, in the place of all that there are."""
    files.drop(CHAT_TEMPLATE_FILES)
    for name in CONFIGS:
        content = files.read_json(name)
        if content.pop("chat_template", None) is not None:
            files.write_json(name, content)
    for name, template in templates.items():
        files.write_text(FILE if name == DEFAULT else f"{FURTHER}{name}.jinja", template)


def take_templates(files: SideFiles, donor: SideFiles) -> bool:
    """Take another model's templates where there are none; whether there were any to take."""
    theirs = {} if templates_of(files) else templates_of(donor)
    if theirs:
        set_templates(files, theirs)
    return bool(theirs)
