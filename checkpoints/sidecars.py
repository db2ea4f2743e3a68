"""The files of a checkpoint that are no weights: config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError
from checkpoints.writer import write_file

# Everything that loading or using the model may ask for. Weights, and what describes them, are never among them.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def list_side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of the side files it holds, sorted."""
    found = {path.relative_to(folder) for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def side_file_bytes(folder: Path) -> int:
    """Bytes that the side files, a model card and a recipe take, rounded up generously."""
    return sum((folder / relative).stat().st_size for relative in list_side_files(folder)) + (1 << 20)


def copy_side_files(
    folder: Path, target: Path, *, dtype: str | None = None, config: Mapping[str, Any] | None = None
) -> list[str]:
    """Copy the side files byte for byte.

    Args:
        folder, target: from where, to where (exists).
        dtype: what the entries of config.json shall say that name a dtype; None leaves them as they are.
        config: entries of config.json that change, by dotted name (`text_config.num_hidden_layers`).

    Returns: the relative names of what was written.
    """
    names = []
    for relative in list_side_files(folder):
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        content = (folder / relative).read_bytes()
        if dtype is not None and str(relative) == "config.json":
            content = config_with_dtype(content, dtype)
        if config and str(relative) == "config.json":
            content = config_with(content, config)
        write_file(destination, content)
        names.append(str(relative))
    return names


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a checkpoint. Raises InputError where it is missing or no JSON object."""
    return read_json(folder / "config.json", label)


def read_json(path: Path, label: str) -> dict[str, Any]:
    """A JSON object from a file of the model `label`. Raises InputError where it is missing, or something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{label}: expected {path.name} in {path.parent}, got none. Give the folder of a Hugging Face checkpoint."
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{label}: {path.name}: expected JSON, got {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{label}: {path.name}: expected a JSON object, got {type(content).__name__}. Download it again."
        )
    return content


def config_with_dtype(content: bytes, dtype: str) -> bytes:
    """A config.json whose dtype entries say `dtype`, nested ones (`text_config`) too; every other byte as it was."""
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"\w*"', rb'\g<1>"' + dtype.encode() + b'"', content)


def config_with(content: bytes, entries: Mapping[str, Any]) -> bytes:
    """A config.json with other values for some entries, by dotted name."""
    config = json.loads(content)
    for name, value in entries.items():
        *parents, key = name.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[key] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def licence_of(folder: Path) -> str | None:
    """The licence that a model card's front matter names; None where it names none, several or `other`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    entry = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return entry.group(1) if entry and entry.group(1) != "other" else None
