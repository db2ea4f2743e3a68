"""Where a checkpoint came from: digests of inputs and outputs, versions, the recipe file and the model card."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import torch

from checkpoints import VERSION
from checkpoints.escaping import markdown, shell, yaml_text
from checkpoints.files import in_utf8
from checkpoints.folder import Folder
from checkpoints.location import Location
from checkpoints.model import Model
from checkpoints.reader import WeightFile
from checkpoints.save_path import RECIPE_FILE
from checkpoints.weights import Weights
from checkpoints.writer import DIGEST_KEYS, HashName, chunked_digest

RECIPE_SCHEMA = 1
Digest = Literal["none", "outputs", "full"]
FINGERPRINT_ELEMENTS = 4096


def describe_input(model: Model, digest: Digest, hash_name: HashName = "blake3") -> dict[str, Any]:
    """What identifies one input: its weights' fingerprint, a hub model's commit and the hub's own sha256, a local file's
    size, time and header.

    Args:
        model: the opened model.
        digest: `full` reads every weight file once more and takes its digest.
        hash_name: with which hash.
    """
    if model.described is not None:
        return {"model": model.label, **model.described(digest, hash_name)}
    first, *adapters = (_describe_part(location, files, digest, hash_name) for location, files in model.parts)
    return {
        "model": model.label,
        **first,
        "fingerprint": fingerprint(model.weights),
        **({"adapters": adapters} if adapters else {}),
    }


def _describe_part(
    location: Location, files: Sequence[WeightFile], digest: Digest, hash_name: HashName
) -> dict[str, Any]:
    """One folder of an input."""
    return {
        "folder": str(location.folder),
        **({"revision": location.revision} if location.revision else {}),
        "files": {file.name: _describe_file(file, location.hub_sha256, digest, hash_name) for file in files},
    }


def fingerprint(weights: Weights) -> str:
    """Tells one set of weights from another at the cost of a few pages: sha256 over every tensor's name, dtype and shape
    and over 4096 elements each at its start, middle and end."""
    digest = hashlib.sha256()
    buffer = torch.empty(8 * FINGERPRINT_ELEMENTS, dtype=torch.uint8)
    for name, info in weights.tensors.items():
        digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
        last = max(0, info.numel - FINGERPRINT_ELEMENTS)
        for start in sorted({0, last // 2, last}):
            stop = min(start + FINGERPRINT_ELEMENTS, info.numel)
            if start < stop:
                digest.update(weights.read(name, start, stop, buffer).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_file(
    file: WeightFile, hub_sha256: Mapping[str, str], digest: Digest, hash_name: HashName
) -> dict[str, Any]:
    tensors = {name: [str(info.dtype), list(info.shape)] for name, info in sorted(file.tensors.items())}
    entry: dict[str, Any] = {
        "bytes": file.size,
        "tensors_sha256": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
    }
    if file.name in hub_sha256:
        entry["sha256"] = hub_sha256[file.name]
    else:
        entry["mtime_ns"] = file.mtime_ns
    if digest == "full":
        entry[DIGEST_KEYS[hash_name]] = chunked_digest(file.path, hash_name)
    return entry


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    packages = {name: metadata.version(name) for name in ("torch", "safetensors", "transformers")}
    return {"toolkit": VERSION, "python": platform.python_version(), **packages}


def write_recipe(folder: Folder, recipe: Mapping[str, Any]) -> None:
    """Write merge_recipe.json, after everything else: the recipe's keys, what came of it, and digests of the side files."""
    content = {"schema": RECIPE_SCHEMA, **recipe, "side_files": dict(sorted(folder.written.items()))}
    folder.write(RECIPE_FILE, in_utf8(json.dumps(content, indent=2, ensure_ascii=False) + "\n"))


def common_licence(models: Sequence[Model]) -> str | None:
    """The licence of all models, where all name the same one."""
    licences = {model.licence for model in models}
    return licences.pop() if len(licences) == 1 else None


def model_card(
    *,
    title: str,
    models: Sequence[Model],
    text: str,
    command: Sequence[str] | None,
    library: str = "transformers",
    tag: str = "merge",
) -> str:
    """README.md of a model that was made of others: YAML front matter for the hub, what was made, the command that did it.

    Args:
        title: the model's name.
        models: the inputs, the base first; the front matter names those that are on the hub, without their revisions.
        text: Markdown between the title and the command: what was made of which models, and how.
        command: argument list as run; None where it was called from Python.
        library, tag: what loads it and what it is, as the hub has it.
    """
    origins = [origin for model in models for origin in model.origins]
    named = [location.name for model in origins for location, _ in model.parts]
    on_hub = dict.fromkeys(
        name.path_or_id for name in named if not name.is_local
    )  # it refuses a card that names others
    front = [
        "---",
        *(["base_model:"] if on_hub else []),
        *(f"- {yaml_text(name)}" for name in on_hub),
    ]
    front += [f"library_name: {library}", "tags:", f"- {tag}"]
    licence = common_licence(origins)
    if licence:
        front.append(f"license: {yaml_text(licence)}")
    front.append("---")
    parts = [*front, "", f"# {markdown(title)}", "", text.strip()]
    if command:
        parts += ["", "Made by", "", "```sh", shell(command), "```"]
    parts += ["", f"`{RECIPE_FILE}` has every parameter, and what identifies each file that was read or written.", ""]
    return "\n".join(parts)
