"""Check, before a byte of the output is written, whether it loads as its config.json says."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.folder import Folder
from checkpoints.model import Model
from checkpoints.placements import Architecture, Shape
from checkpoints.problems import Problems
from checkpoints.sidecars import SideFiles
from checkpoints.tensor_names import list_kinds


def check_output(files: SideFiles, shapes: Mapping[str, Shape], first: Model, problems: Problems) -> None:
    """Refuse an output of which a loader would fill in or drop tensors: where layers are put in other places, say.

    An output with the config and the shapes of the model that gives them loads as that does. Then that model's architecture,
    which is remembered on the disk, is the check: no second one is built.

    Args:
        files: of the output.
        shapes: of its tensors.
        first: gives the config. What its own files lack or have too many is warned of: it may be meant so.
        problems: gets what does not fit; a note where the class is not known.
    """
    if first.is_file:
        return  # no config.json, which is noted
    theirs = {name: info.shape for name, info in first.weights.tensors.items()}
    same_config = files.read("config.json") == (first.folder / "config.json").read_bytes()
    is_alike = same_config and all(theirs.get(name) == shape for name, shape in shapes.items())
    try:
        before = first.architecture
        architecture = before if is_alike else _describe(files, shapes, first)
    except InputError as error:
        problems.note(f"whether the output loads by its config.json was not looked at: {error}")
        return
    _warn_of(first, before, problems)
    lacking = [name for name in architecture.missing if name not in before.missing]
    over = [name for name in architecture.unplaced if name not in before.unplaced and name not in architecture.unused]
    wrong = {name: why for name, why in architecture.mismatched.items() if name not in before.mismatched}
    parts = _say(lacking, over, wrong)
    if parts:
        problems.add(
            f"the output would not load by its config.json, that of {first.label} with what changes: {'; '.join(parts)}. A layer's place "
            "decides what it is made of there. Stack layers of one kind into places of that kind, or merge whole models."
        )


def _warn_of(first: Model, before: Architecture, problems: Problems) -> None:
    """Warn of a model whose own files do not fit its config.json; nothing where that names no class."""
    if not first.config.get("architectures"):
        return  # another class than the one that was guessed may take them
    over = [name for name in before.unplaced if name not in before.unused]
    parts = _say(before.missing, over, before.mismatched)
    if parts:
        problems.warn(
            f"{first.label}: its files are not a whole {before.model_class}, which config.json names: {'; '.join(parts)}. The output loads as "
            "that does. Download it again, or mend config.json, unless it is meant so."
        )


def _say(lacking: Collection[str], over: Collection[str], wrong: Mapping[str, str]) -> list[str]:
    """What a loader would fill in, drop, or stumble over."""
    parts = [f"nothing would fill {list_kinds(lacking)}"] if lacking else []
    parts += [f"nothing would take {list_kinds(over)}"] if over else []
    parts += [f"{next(iter(wrong))} does not fit: {next(iter(wrong.values()))}"] if wrong else []
    return parts


def _describe(files: SideFiles, shapes: Mapping[str, Shape], first: Model) -> Architecture:
    """What holds each tensor of the output; see `checkpoints.architecture.describe`."""
    from checkpoints.architecture import describe

    with tempfile.TemporaryDirectory() as folder:
        with Folder.open(Path(folder)) as opened:
            files.write(opened)
        return describe(Path(folder), shapes, label="the output", trust_remote_code=first.trust_remote_code)
