"""The files of a checkpoint that are no weights: config, tokenizer, chat template, licence."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError
from checkpoints.files import is_plain_name, parse_json, write_file

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


Stamps = dict[Path, tuple[int, int]]
# What a cache of the hub calls the files that its snapshots link to.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def list_side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of the side files it holds, sorted.

    Raises: InputError: a link out of the folder to something of another name. It can come with a checkpoint (in an archive,
        say), and the output, which may be published, would hold what it points to.
    """
    found = {path.relative_to(folder) for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    home = folder.resolve()
    for relative in found:
        target = (folder / relative).resolve()
        if home not in target.parents and target.name != relative.name and not _BLOB.fullmatch(target.name):
            raise InputError(
                f"{folder / relative}: expected a file, got a link out of the folder, to {target}. Do not trust this checkpoint, or "
                "replace the link by a copy."
            )
    return sorted(found)


def side_file_stamps(folder: Path) -> Stamps:
    """Name, size and time of change of every side file."""
    found: Stamps = {}
    for pattern in SIDE_FILES:
        for path in folder.glob(pattern):
            status = path.stat() if path.is_file() else None
            if status:
                found[path.relative_to(folder)] = status.st_size, status.st_mtime_ns
    return found


def side_file_bytes(folder: Path) -> int:
    """Bytes that the side files, a model card and a recipe take, rounded up generously."""
    return sum((folder / relative).stat().st_size for relative in list_side_files(folder)) + (1 << 20)


def copy_side_files(folder: Path, target: Path, *, dtype: str | None = None, stamps: Stamps | None = None) -> list[str]:
    """Copy the side files byte for byte.

    Args:
        folder, target: from where, to where (exists).
        dtype: what the entries of config.json shall say that name a dtype; None leaves them as they are.
        stamps: what `side_file_stamps` told before the weights were read; None where that does not matter.

    Returns: the relative names of what was written.

    Raises: InputError: they are not what they were; as `list_side_files`.
    """
    if stamps is not None and side_file_stamps(folder) != stamps:
        raise InputError(
            f"{folder}: config, tokenizer or other files changed while the weights were read. Run the command again when they are at rest."
        )
    names = []
    for relative in list_side_files(folder):
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        content = (folder / relative).read_bytes()
        if dtype is not None and str(relative) == "config.json":
            content = config_with_dtype(content, dtype)
        write_file(destination, content)
        names.append(str(relative))
    return names


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
        content = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{label}: {path.name}: expected JSON, got {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{label}: {path.name}: expected a JSON object, got {type(content).__name__}. Download it again."
        )
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
