"""The files of a checkpoint that are no weights: config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import re
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


def copy_side_files(folder: Path, target: Path, *, config: dict[str, Any] | None = None) -> list[str]:
    """Copy the side files byte for byte.

    Args:
        folder, target: from where, to where (exists).
        config: written as config.json instead of the copy, where given.

    Returns: the relative names of what was written.
    """
    names = []
    for relative in list_side_files(folder):
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        changed = config is not None and str(relative) == "config.json"
        content = (
            (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            if changed
            else (folder / relative).read_bytes()
        )
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
            f"{label}: expected {path.name} in {path.parent}, got none. Is this a Hugging Face checkpoint folder?"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{label}: {path.name}: expected JSON, got {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{label}: {path.name}: expected a JSON object, got {type(content).__name__}. Download it again."
        )
    return content


def config_with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any] | None:
    """The config with every dtype entry set to `dtype`, nested ones (`text_config`) too; None where that changes nothing."""

    def change(node: dict[str, Any]) -> dict[str, Any]:
        def value(key: str, old: Any) -> Any:
            if key in ("dtype", "torch_dtype") and isinstance(old, str):
                return dtype
            return change(old) if isinstance(old, dict) else old

        return {key: value(key, old) for key, old in node.items()}

    changed = change(config)
    if "dtype" not in changed and "torch_dtype" not in changed:
        changed["torch_dtype"] = dtype
    return None if changed == config else changed


def licence_of(folder: Path) -> str | None:
    """The licence that a model card's front matter names, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    entry = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return entry.group(1) if entry else None
