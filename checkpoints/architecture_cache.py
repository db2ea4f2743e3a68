"""Keep on the disk what is known of an architecture: finding it out takes two seconds, most of them to import transformers.

One JSON file for each config.json and set of tensors, below `$XDG_CACHE_HOME/merge_aim` (`~/.cache/merge_aim`). Its name is
a digest of everything that decides what is in it, so that none is ever out of date; its first line is the sha256 of the rest, and
what does not fit, or is no plain file of ours, is found out again. Nothing of a user's weights is in it, and
nothing is lost with it: `MERGE_AIM_CACHE=off` does without, as does a disk that takes no files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from checkpoints.errors import InputError
from checkpoints.files import parse_json
from checkpoints.folder import Folder
from checkpoints.placements import Architecture, Kind, Placement, Shape

MOST_FILES = 200
ELSEWHERE = ("auto_map", "configuration_files")
"""Entries of a config.json that name further files, which decide too."""


def remembered(config: bytes, shapes: Mapping[str, Shape], find_out: Callable[[], Architecture]) -> Architecture:
    """What `find_out` says, or said of the same config and tensors before.

    Args:
        config: the bytes of config.json.
        shapes: name and shape of every stored tensor.

    Raises: as `find_out`, whose refusals are not kept.
    """
    path = _path(config, shapes)
    if path is None:
        return find_out()
    with suppress(InputError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return _read(path)
    architecture = find_out()
    with suppress(InputError, OSError):
        _write(path, architecture)
    return architecture


def _path(config: bytes, shapes: Mapping[str, Shape]) -> Path | None:
    """The file of an architecture; None where none is to be kept."""
    if os.environ.get("MERGE_AIM_CACHE") == "off" or any(f'"{entry}"'.encode() in config for entry in ELSEWHERE):
        return None
    code = [Path(__file__).with_name(f"{name}.py") for name in ("architecture", "architecture_cache", "placements")]
    facts = [
        *(f"{name} {version(name)}" for name in ("transformers", "torch")),
        *(hashlib.sha256(content).hexdigest() for content in (config, *(path.read_bytes() for path in code))),
        *(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())),
    ]
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return home / "merge_aim" / "architectures" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"


def _read(path: Path) -> Architecture:
    with Folder.open(path.parent) as folder:
        raw = folder.read(path.name)
    if raw is None:
        raise FileNotFoundError(path)
    digest, _, text = raw.partition(b"\n")
    if digest != hashlib.sha256(text).hexdigest().encode():
        raise ValueError("is not as it was written")
    content: dict[str, Any] = parse_json(text)
    for name in ("buffers", "ignored", "unplaced", "missing"):
        content[name] = tuple(content[name])
    content["placements"] = {
        name: Placement(**{**entry, "others": tuple(entry["others"]), "axes": tuple(entry["axes"])})
        for name, entry in content["placements"].items()
    }
    architecture = Architecture(**content)
    _check(architecture)
    return architecture


def _check(architecture: Architecture) -> None:
    """Raise ValueError where the types are not those that the classes say: a file can have been written by anybody."""
    names = [
        *architecture.buffers,
        *architecture.ignored,
        *architecture.unplaced,
        *architecture.missing,
        architecture.model_class,
    ]
    for mapping in (architecture.tied, architecture.mismatched, architecture.placements):
        names += [*mapping, *(value for value in mapping.values() if not isinstance(value, Placement))]
    names += [name for name in (architecture.input_embedding, architecture.output_head) if name is not None]
    for placement in architecture.placements.values():
        names += [placement.parameter, *placement.others]
        if placement.kind not in get_args(Kind) or any(
            type(n) not in (int, type(None)) for n in (placement.input_dim, placement.expert)
        ):
            raise ValueError("a placement of no known kind")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name that is no text")


def _write(path: Path, architecture: Architecture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(architecture)).encode()
    with Folder.open(path.parent) as folder:
        folder.replace(path.name, [hashlib.sha256(text).hexdigest().encode(), b"\n", text])
    others = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in others[MOST_FILES:]:
        old.unlink(missing_ok=True)
