"""What a published checkpoint says of its inputs: hub names with commits, and folders by their last part and digest, no path of this machine.

A recipe and a card are written for whoever made them, and name folders as they were typed. Before a checkpoint is pushed, both are
written again without them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.chat_templates import is_literal
from checkpoints.files import in_utf8, write_text
from checkpoints.reader import ADAPTER_CONFIG
from checkpoints.save_path import RECIPE_FILE, read_recipe

CARD = "README.md"
DIGITS = 12
"""Of a fingerprint, in a name; `inputs` has all of it."""
_FRONT = re.compile(r"---\n(?:.*\n)*?---\n")
PRIVATE_KEYS = ("folder", "mtime_ns")
AS_IT_IS = ("exclude", "only", "filter", "text_field")
"""What names no file, and may look as if it did: regular expressions, parts of names."""
_PART = r"/[^\s/'\"`,:;()<>|]+"
# A path from home or from the current folder, or one of two parts from the root. What follows a letter, a digit, `:`, `<` or another
# slash is part of an address, a hub name or a tag.
_PATH = re.compile(rf"(?<![\w:/.~<])(?:(?:~[\w.-]*|\.{{1,2}})(?:{_PART})+|{_PART}(?:{_PART})+)/?")


def publish(folder: Path) -> bool:
    """Write a checkpoint's recipe and card again with public names only; whether anything was to be changed.

    Args:
        folder: a finished checkpoint. Doing it twice, or going on after a kill in between, gives the same files.
    """
    recipe = read_recipe(folder)
    if not isinstance(recipe, dict):
        return False
    names = PublicNames(recipe)
    public = names.of_recipe(recipe)
    card = folder / CARD
    changed = False
    if card.is_file():
        before = card.read_text("utf-8", errors="replace")
        front = _FRONT.match(before)  # the hub takes names there without their revisions, and it has none of folders
        begin = front.end() if front else 0
        after = before[:begin] + names.of_text(before[begin:])
        changed = before != after
        if changed:
            write_text(card, after)
            _note_digest(public, card)
    changed |= _publish_base(folder / ADAPTER_CONFIG, names)
    if public != recipe:
        changed = True
        text = in_utf8(json.dumps(public, indent=2, ensure_ascii=False) + "\n").decode()
        write_text(folder / RECIPE_FILE, text)
    return changed


def _publish_base(config: Path, names: PublicNames) -> bool:
    """Have an adapter's config name a base that is a folder by its last part: its path is nothing to anybody else; whether it did."""
    if not config.is_file():
        return False
    content = json.loads(config.read_text("utf-8"))
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not names.is_folder(base) or base == Path(base).name:
        return False
    content["base_model_name_or_path"] = Path(base).name
    write_text(config, json.dumps(content, indent=2) + "\n")
    return True


def _note_digest(recipe: Any, card: Path) -> None:
    """Where a recipe holds the size and digest of its card, put those of the new one."""
    content = card.read_bytes()
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for node in _nodes(recipe):
        entry = node.get(CARD)
        if isinstance(entry, dict):
            entry.update({key: value for key, value in new.items() if key in entry})


class PublicNames:
    """Public names of everything that a recipe names.

    Args:
        recipe: a merge_recipe.json; the recipe of a merged model inside of it counts too.
    """

    def __init__(self, recipe: Mapping[str, Any]):
        self.names: dict[str, str] = {}
        """Name as it was typed, or folder -> public name."""
        for node in _nodes(recipe):
            for entry in node.get("inputs") or () if isinstance(node.get("inputs"), list) else ():
                if isinstance(entry, dict) and isinstance(entry.get("model"), str):
                    self._add(entry)
        paths = sorted((name for name in self.names if "/" in name), key=len, reverse=True)
        self._known = re.compile("|".join(rf"(?<![\w./~-]){re.escape(path)}(?![\w/-])" for path in paths) or r"(?!)")

    def _add(self, entry: Mapping[str, Any]) -> None:
        adapters = [adapter for adapter in entry.get("adapters") or () if isinstance(adapter, dict)]
        public = public_name(
            entry["model"], [adapter.get("revision") for adapter in (entry, *adapters)], entry.get("fingerprint")
        )
        self.names[entry["model"]] = public
        for part in (entry, *adapters):
            if isinstance(part.get("folder"), str):
                self.names[part["folder"]] = public

    def is_folder(self, name: str) -> bool:
        """Whether a model was given as a folder: what is public of that has no commit."""
        return name in self.names and "@" not in self.names[name]

    def of_recipe(self, content: Any) -> Any:
        """A recipe, or a part of one, with public names; folders and times of files are left out."""
        if isinstance(content, dict):
            return {
                self.of_text(str(key)): self.of_command(value)
                if key == "command" and isinstance(value, list)
                else value
                if key in AS_IT_IS or (key == "chat_template" and is_literal(str(value)))
                else self.of_recipe(value)
                for key, value in content.items()
                if key not in PRIVATE_KEYS
            }
        if isinstance(content, list):
            return [self.of_recipe(entry) for entry in content]
        return self.of_text(content) if isinstance(content, str) else content

    def of_text(self, text: str) -> str:
        """A text in which paths are replaced: those of inputs by their public names, others by their last part."""
        if text in self.names:
            return self.names[text]
        known = self._known.sub(lambda match: self.names[match[0]], text)
        if known.startswith(("/", "~/")) and not re.search(r"[:,]\s|\n", known):  # one path, which may hold spaces
            return Path(known).name or known
        return _PATH.sub(lambda match: match[0].rstrip("/").rpartition("/")[2] or match[0], known)

    def of_command(self, words: Sequence[Any]) -> list[str]:
        """A command with public names of its models and the last part of every other path."""
        return [self._of_word(str(word)) for word in words]

    def _of_word(self, word: str) -> str:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        parts = []
        for part in value.split(","):
            name, colon, weight = part.rpartition(":")
            if colon and re.fullmatch(r"[-+.\deE]+", weight) and name in self.names:
                parts.append(f"{self.names[name]}:{weight}")
            else:
                parts.append(self.of_text(part))
        return f"{flag}{equals}{','.join(parts)}"


def public_name(model: str, revisions: Sequence[str | None], fingerprint: str | None) -> str:
    """How a published recipe names a model.

    Args:
        model: as it was typed, `BASE+ADAPTER` too.
        revisions: the commit of each of its parts, base first; None of a folder.
        fingerprint: of its weights; where a part is a folder, the name has its first digits.
    """
    digits = f" (fingerprint {str(fingerprint)[:DIGITS]})" if fingerprint else ""
    if digits and model.endswith(digits):  # it is published already
        return model
    pieces = model.rsplit("+", len(revisions) - 1) if len(revisions) > 1 else [model]
    own = revisions[len(revisions) - len(pieces) :]  # an adapter that was named alone has a base before it
    named = [
        f"{piece.partition('@')[0]}@{commit}" if commit else Path(piece.rstrip("/")).name or "folder"
        for piece, commit in zip(pieces, own, strict=True)
    ]
    return "+".join(named) + (digits if None in own else "")


def _nodes(content: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree."""
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
