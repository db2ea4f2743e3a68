"""Check whether a result on the disk is what its run wrote: digests, finite numbers, shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.chat_templates import DEFAULT, end_markers, templates_of
from checkpoints.errors import InputError
from checkpoints.files import is_plain_name, parse_json
from checkpoints.model import Model, open_model
from checkpoints.problems import Problems
from checkpoints.save_path import RECIPE_FILE, SWEEP_PREFIXES
from checkpoints.settings import setting
from checkpoints.source import READ_ELEMENTS, Source
from checkpoints.tokenizer_files import end_tokens
from checkpoints.writer import DIGEST_KEYS, HashName, chunked_digest
from streaming.stream import all_finite
from streaming.workers import Workers


@dataclass
class Verified:
    """What was looked at.

    Attributes:
        files, tensors, bytes: how many.
        undigested: files of which the run took no digest, so that their bytes are unproved.
        notes: what could not be checked.
        side_files: how many of the files are no weights.
    """

    files: int = 0
    side_files: int = 0
    tensors: int = 0
    bytes: int = 0
    undigested: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def results_in(folder: Path) -> list[Path]:
    """The checkpoints of a run: the folder itself, or those of a sweep in it. Raises InputError where no run wrote it."""
    recipes = (
        [folder]
        if (folder / RECIPE_FILE).is_file()
        else sorted(path for prefix in SWEEP_PREFIXES for path in folder.glob(f"{prefix}*/{RECIPE_FILE}"))
    )
    if not recipes:
        raise InputError(
            f"{setting('verify', folder)}: expected {RECIPE_FILE}, got none. Name a folder that merge.py or performAIM.py wrote."
        )
    return [path if path.is_dir() else path.parent for path in recipes]


def bytes_in(folder: Path) -> int:
    """Bytes that `verify` reads: the weight files, once for the digest and once for the numbers."""
    return 2 * sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def verify(
    folder: Path, *, trust_remote_code: bool = False, progress: Callable[[int], object] = lambda count: None
) -> Verified:
    """Check one checkpoint against its merge_recipe.json.

    Args:
        folder: with the recipe.
        trust_remote_code: let model code that comes with it run, to know its shapes.
        progress: called with numbers of bytes read.

    Raises: Refusals: everything that is wrong; InputError: the recipe cannot be read.
    """
    verified = Verified()
    problems = Problems()
    outputs, side_files = _read_files(folder)
    with closing(Workers()) as workers:
        present = {name: entry for name, entry in outputs.items() if _has_size(folder / name, entry, problems)}
        problems.extend(_check_side_files(folder, side_files))
        if side_files is None:
            verified.notes.append(
                f"{folder / RECIPE_FILE}: has no digests of config, tokenizer and other small files; an earlier version wrote it, and only "
                "weights were looked at."
            )
            added = [path for path in folder.glob("*.safetensors") if path.name not in outputs]
        else:
            known = {RECIPE_FILE, *outputs, *side_files}
            files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
            added = [path for path in files if not _is_aside(path.relative_to(folder), known)]
        problems.extend([f"{path}: the run did not write it." for path in sorted(added)])
        # Digests of what is there.
        digests = workers.map_ordered(lambda name: _digest(folder / name, present[name], progress), list(present))
        for name, digest in zip(present, digests, strict=True):
            expected = _digest_of(present[name])[1]
            if expected is None:
                verified.undigested.append(name)
            elif digest != expected:
                problems.add(f"{folder / name}: its bytes are not those that the run wrote.")
        problems.raise_if_any()
        verified.side_files = len(side_files or ())
        verified.files, verified.bytes = (
            len(outputs) + verified.side_files,
            sum(entry["bytes"] for entry in outputs.values()),
        )
        # The model as anybody would load it.
        model = open_model(str(folder), trust_remote_code=trust_remote_code)
        with closing(model.weights):
            problems.extend(_check_shapes(model, verified))
            problems.extend(_check_end(model))
            problems.extend(_check_numbers(model, workers, progress))
            verified.tensors = len(model.weights.tensors) + len(model.weights.modules.tensors)
    problems.raise_if_any()
    return verified


Files = Mapping[str, Mapping[str, Any]]
"""Name -> `bytes`, and digests where they were taken."""


def _read_files(folder: Path) -> tuple[Files, Files | None]:
    """Weight files and side files of a recipe; None for the second where an earlier version of ours wrote it."""
    try:
        recipe = parse_json((folder / RECIPE_FILE).read_bytes())
        outputs, side_files = recipe["outputs"], recipe.get("side_files")
        if not all(_is_entry(name, entry) for name, entry in outputs.items()):
            raise ValueError("its outputs are no list of files")
        if side_files is not None and not all(
            _is_entry(name, entry) and isinstance(entry["sha256"], str) for name, entry in side_files.items()
        ):
            raise ValueError("its side_files are no list of files")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RECIPE_FILE}: expected a recipe of ours, got {error!r}.") from None
    return outputs, side_files


def _is_entry(name: str, entry: Any) -> bool:
    digest = _digest_of(entry)[1]
    is_size = type(entry["bytes"]) is int and 0 <= entry["bytes"] < 1 << 62
    return is_size and (digest is None or isinstance(digest, str)) and all(map(is_plain_name, name.split("/")))


def _check_side_files(folder: Path, side_files: Files | None) -> Problems:
    problems = Problems()
    for name, entry in (side_files or {}).items():
        path = folder / name
        if _has_size(path, entry, problems) and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            problems.add(f"{path}: its bytes are not those that the run wrote.")
    return problems


def _is_aside(path: Path, known: Collection[str]) -> bool:
    """Whether a file is the run's, or hidden, as those of git and of the hub's client are, which nothing loads."""
    return path.as_posix() in known or path.parts[0].startswith(".")


def _has_size(path: Path, entry: Mapping[str, Any], problems: Problems) -> bool:
    if not path.is_file():
        problems.add(f"{path}: {'is no file' if path.exists() else 'is missing'}.")
        return False
    size = path.stat().st_size
    if size != entry["bytes"]:
        problems.add(f"{path}: expected {entry['bytes']:,} bytes, got {size:,}.")
    return bool(size == entry["bytes"])


def _digest_of(entry: Mapping[str, Any]) -> tuple[HashName, Any]:
    """With which hash a file's digest was taken, and what it is; None where none was."""
    taken = [(name, entry[key]) for name, key in DIGEST_KEYS.items() if key in entry]
    return taken[0] if taken else ("blake3", None)


def _digest(path: Path, entry: Mapping[str, Any], progress: Callable[[int], object]) -> str | None:
    name, expected = _digest_of(entry)
    digest = None if expected is None else chunked_digest(path, name)
    progress(entry["bytes"])
    return digest


def _check_shapes(model: Model, verified: Verified) -> list[str]:
    """What does not fit config.json; a note where its architecture is not known."""
    try:
        architecture = model.architecture
    except InputError as error:
        verified.notes.append(f"shapes were not compared with config.json: {error}")
        return []
    problems = [
        f"{model.label}: {name}: does not fit config.json: {why}." for name, why in architecture.mismatched.items()
    ]
    strangers = [name for name in architecture.unplaced if name not in architecture.unused]
    problems.extend(
        [f"{model.label}: no tensor fills {name}, which config.json asks for." for name in architecture.missing]
    )
    problems.extend([f"{model.label}: {name}: nothing in config.json's model takes it." for name in strangers])
    return problems


def _check_end(model: Model) -> list[str]:
    """A chat template that ends a turn with a token at which the model's text does not end: it would talk on."""
    files = model.side_files()
    template = templates_of(files).get(DEFAULT)
    tokens = model.vocabulary if template is not None else None
    if template is None or tokens is None:
        return []
    eos_token = files.read_json("tokenizer_config.json").get("eos_token")
    named = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    markers = end_markers(template, named if isinstance(named, str) else None, tokens.ids)
    ends = end_tokens(files, tokens)
    if not markers or not ends or set(markers) & set(ends):
        return []
    return [
        f"{model.label}: its chat template ends a turn with {' or '.join(map(repr, markers))}, and eos_token_id lists {', '.join(map(repr, ends))} "
        "only: the model will not stop. Add the token's id to eos_token_id in generation_config.json."
    ]


def _check_numbers(model: Model, workers: Workers, progress: Callable[[int], object]) -> list[str]:
    """The tensors that hold a NaN or an infinity."""
    pieces = [
        (source, name, start, min(start + READ_ELEMENTS, info.numel))
        for source in (model.weights, model.weights.modules)
        for name, info in source.tensors.items()
        for start in range(0, info.numel, READ_ELEMENTS)
    ]

    def look(piece: tuple[Source, str, int, int]) -> bool:
        source, name, start, stop = piece
        values = source.read(name, start, stop, torch.empty(8 * (stop - start), dtype=torch.uint8))
        progress(values.nbytes)
        return not values.dtype.is_floating_point or all_finite(values.float())

    bad: dict[str, int] = {}
    for (_, name, start, _), is_fine in zip(pieces, workers.map_ordered(look, pieces), strict=True):
        if not is_fine:
            bad.setdefault(name, start)
    return [f"{model.label}: {name}: holds a NaN or an infinity." for name in bad]
