"""The files of a checkpoint that are no weights: config, tokenizer, chat template, licence."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, cannot_open
from checkpoints.files import is_plain_name, parse_json
from checkpoints.folder import Folder
from checkpoints.side_names import KNOWN_FILES, SideNames, choose_side_files, matches, module_weights

MOST_SEEN = 10_000
"""Files of a folder that are looked at."""

# What a cache of the hub calls the files that its snapshots link to.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def list_side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of the side files it holds, sorted; see `choose_side_files`.

    Raises: InputError: a link out of the folder to something of another name. It can come with a checkpoint (in an archive,
        say), and the output, which may be published, would hold what it points to. One of a name that nothing asks for is
        left out.
    """
    return [Path(name) for name in _choose(folder).copied]


def list_left_out(folder: Path) -> list[str]:
    """Relative names of the files that no output gets, although they are no weights of the model; see `choose_side_files`."""
    return list(_choose(folder).left_out)


def list_module_weights(folder: Path) -> list[str]:
    """Relative names of the files with the weights of modules behind the model; see `module_weights`."""
    return module_weights(list(_sizes(folder)))


def _choose(folder: Path) -> SideNames:
    chosen = choose_side_files(_sizes(folder))
    home = folder.resolve()
    copied, left_out = [], list(chosen.left_out)
    for name in chosen.copied:
        path = folder / name
        target = path.resolve()
        if home in target.parents or target.name == path.name or _BLOB.fullmatch(target.name):
            copied.append(name)
        elif matches(name, KNOWN_FILES):
            raise InputError(
                f"{path}: expected a file, got a link out of the folder, to {target}. Do not trust this checkpoint, or "
                "replace the link by a copy."
            )
        else:
            left_out.append(name)
    return SideNames(tuple(copied), tuple(sorted(left_out)))


def _sizes(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of every plain file, hidden ones and linked folders left out, at most `MOST_SEEN` of them."""
    sizes: dict[str, int] = {}
    waiting = [] if folder.is_file() else [""]  # nothing belongs to tensors in a file by itself
    while waiting and len(sizes) < MOST_SEEN:
        parent = waiting.pop()
        try:
            with os.scandir(folder / parent) as listed:
                entries = [entry for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            raise cannot_open(str(folder / parent), error) from error
        for entry in entries:
            with suppress(OSError):  # of a link that leads in a circle
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{parent}{entry.name}/")
                elif entry.is_file():
                    sizes[f"{parent}{entry.name}"] = entry.stat().st_size
    return sizes


class SideFiles:
    """The side files that a checkpoint will have: another folder's, byte for byte, but for those that are changed here.

    Args:
        folder: whose side files to start from.
        label: how messages name them.
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
        sizes = (
            len(content) if isinstance(content, bytes) else content.stat().st_size for content in self._content.values()
        )
        return sum(sizes) + (1 << 20)

    def read(self, name: str) -> bytes:
        """The content of one of them, as it was when first asked for."""
        content = self._content[name]
        if isinstance(content, Path):
            content = self._content[name] = content.read_bytes()
        return content

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

    def drop(self, patterns: tuple[str, ...]) -> None:
        """Leave the files of these patterns out."""
        self._content = {name: content for name, content in self._content.items() if not matches(name, patterns)}

    def take(self, folder: Path, patterns: tuple[str, ...]) -> None:
        """Take the files of these patterns from another folder, in place of all that there are."""
        self.drop(patterns)
        paths = (path for path in list_side_files(folder) if matches(path.as_posix(), patterns))
        self._content |= {path.as_posix(): folder / path for path in paths}

    def digest(self) -> str:
        """Equal where the names and the bytes of all are, which are read now: what changes in a folder later is not seen."""
        each = (f"{name}\0{hashlib.sha256(self.read(name)).hexdigest()}\n" for name in self.names)
        return hashlib.sha256("".join(each).encode()).hexdigest()

    def write(self, target: Folder, *, dtype: str | None = None) -> list[str]:
        """Write them into an open folder.

        Args:
            target: of the checkpoint.
            dtype: what the entries of config.json shall say that name a dtype; None leaves them as they are.

        Returns: the relative names of what was written.
        """
        for name in self.names:
            content = self.read(name)
            if dtype is not None and name == "config.json":
                content = config_with_dtype(content, dtype)
            target.write(name, content)
        return self.names


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises: InputError: it is missing or no JSON object; or it, or tokenizer_config.json, names a file outside the folder that
        transformers would read in its place.
    """
    config = read_json(folder / "config.json", label)
    _check_names(f"{label}: config.json", config.get("configuration_files", []))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content: dict[str, Any] = {}
        with suppress(InputError):  # whoever needs it will say what is wrong with it
            content = read_json(settings, label)
        _check_names(f"{label}: {settings.name}", content.get("fast_tokenizer_files", []))
    return config


def _check_names(where: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and is_plain_name(name) for name in names):
        raise InputError(
            f"{where}: expected plain names of files in its folder, got {names!r:.200}, which may lie outside. Do not trust this checkpoint."
        )


def read_json(path: Path, label: str) -> dict[str, Any]:
    """A JSON object from a file of the model `label`. Raises InputError where it is missing, or something else."""
    if not path.is_file():  # a pipe would be waited for, and a device has no end
        got = "no plain file" if path.exists() else "none"
        raise InputError(
            f"{label}: expected {path.name} in {path.parent}, got {got}. Give the folder of a Hugging Face checkpoint."
        )
    try:
        return _parse(path.read_bytes(), path.name, label)
    except OSError as error:
        raise InputError(f"{label}: {path.name}: expected JSON, got {error}. Download it again.") from None


def _parse(raw: bytes, name: str, label: str) -> dict[str, Any]:
    try:
        content = parse_json(raw)
    except ValueError as error:
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
    front = re.match(r"---[ \t\r]*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    entry = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return entry.group(1) if entry and entry.group(1) != "other" else None
