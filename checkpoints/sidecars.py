"""The files of a checkpoint that are no weights: config, tokenizer, chat template, licence."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError
from checkpoints.files import write_file

CHAT_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
    *CHAT_TEMPLATE_FILES,
)
# Everything that loading or using the model may ask for. Weights, and what describes them, are never among them.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def list_side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of the side files it holds, sorted."""
    found = {path.relative_to(folder) for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


class SideFiles:
    """The side files that a checkpoint will have: another folder's, byte for byte, but for those that are changed here.

    Args:
        folder: whose side files to start from; label: how messages name them.
    """

    def __init__(self, folder: Path, label: str = ""):
        self.label = label or str(folder)
        self._content: dict[str, Path | bytes] = {path.as_posix(): folder / path for path in list_side_files(folder)}

    @property
    def names(self) -> list[str]:
        """Relative names, sorted."""
        return sorted(self._content)

    @property
    def nbytes(self) -> int:
        """Bytes that they, a model card and a recipe take, rounded up generously."""
        sizes = (len(one) if isinstance(one, bytes) else one.stat().st_size for one in self._content.values())
        return sum(sizes) + (1 << 20)

    def read(self, name: str) -> bytes:
        """The content of one of them."""
        content = self._content[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object of one of them; empty where there is no such file. Raises InputError: it holds something else."""
        return _parse(self.read(name), name, self.label) if name in self._content else {}

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Put a JSON object in the place of a file; one that says the same is left as it is."""
        if name not in self._content or self.read_json(name) != content:
            self._content[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    def write_text(self, name: str, text: str) -> None:
        """Put a text in the place of a file; one that says the same is left as it is."""
        if name not in self._content or self.read(name) != text.encode():
            self._content[name] = text.encode()

    def set_config(self, entries: Mapping[str, Any]) -> None:
        """Give entries of config.json other values, by dotted name (`text_config.num_hidden_layers`)."""
        config = self.read_json("config.json")
        for name, value in entries.items():
            *parents, key = name.split(".")
            place = config
            for parent in parents:
                place = place[parent]
            place[key] = value
        self.write_json("config.json", config)

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def drop(self, patterns: Sequence[str]) -> None:
        """Leave the files of these patterns out."""
        self._content = {name: one for name, one in self._content.items() if not _matches(name, patterns)}

    def take(self, folder: Path, patterns: Sequence[str]) -> None:
        """Take the files of these patterns from another folder, in place of all that there are."""
        self.drop(patterns)
        found = (path for path in list_side_files(folder) if _matches(path.as_posix(), patterns))
        self._content |= {path.as_posix(): folder / path for path in found}

    def digest(self) -> str:
        """Equal where the names and the bytes of all are."""
        each = (f"{name}\0{hashlib.sha256(self.read(name)).hexdigest()}\n" for name in self.names)
        return hashlib.sha256("".join(each).encode()).hexdigest()

    def write(self, target: Path, *, dtype: str | None = None) -> list[str]:
        """Write them into a folder that exists.

        Args:
            dtype: what the entries of config.json shall say that name a dtype; None leaves them as they are.

        Returns: the relative names of what was written.
        """
        for name in self.names:
            destination = target / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            content = self.read(name)
            if dtype is not None and name == "config.json":
                content = config_with_dtype(content, dtype)
            write_file(destination, content)
        return self.names


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a checkpoint. Raises InputError where it is missing or no JSON object."""
    return read_json(folder / "config.json", label)


def read_json(path: Path, label: str) -> dict[str, Any]:
    """A JSON object from a file of the model `label`. Raises InputError where it is missing, or something else."""
    try:
        return _parse(path.read_bytes(), path.name, label)
    except FileNotFoundError:
        raise InputError(
            f"{label}: expected {path.name} in {path.parent}, got none. Give the folder of a Hugging Face checkpoint."
        ) from None
    except OSError as error:
        raise InputError(f"{label}: {path.name}: expected JSON, got {error}. Download it again.") from None


def _parse(raw: bytes, name: str, label: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: {name}: expected JSON, got {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{label}: {name}: expected a JSON object, got {type(content).__name__}. Download it again.")
    return content


def config_with_dtype(content: bytes, dtype: str) -> bytes:
    """A config.json whose dtype entries say `dtype`, nested ones (`text_config`) too; every other byte as it was."""
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"\w*"', rb'\g<1>"' + dtype.encode() + b'"', content)


def licence_of(folder: Path) -> str | None:
    """The licence that a model card's front matter names; None where it names none, several or `other`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    entry = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return entry.group(1) if entry and entry.group(1) != "other" else None
