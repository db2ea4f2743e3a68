"""Check, before a byte of the output is written, whether it loads as its config.json says."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
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

    An output with the config and the shapes of the model that gives them loads as that does, and is not looked at.

    Args:
        files: of the output.
        shapes: of its tensors.
        first: gives the config. What its own files lack or have too many is its own affair.
        problems: gets what does not fit; a note where the class is not known.
    """
    theirs = {name: info.shape for name, info in first.weights.tensors.items()}
    same_config = files.read("config.json") == (first.folder / "config.json").read_bytes()
    if same_config and all(theirs.get(name) == shape for name, shape in shapes.items()):
        return
    try:
        found = _describe(files, shapes, first)
        before = first.architecture
    except InputError as error:
        problems.note(f"whether the output loads by its config.json was not looked at: {error}")
        return
    lacking = [name for name in found.missing if name not in before.missing]
    over = [name for name in found.unplaced if name not in before.unplaced and name not in found.unused]
    wrong = {name: why for name, why in found.mismatched.items() if name not in before.mismatched}
    parts = [f"nothing would fill {list_kinds(lacking)}"] if lacking else []
    parts += [f"nothing would take {list_kinds(over)}"] if over else []
    parts += [f"{next(iter(wrong))} does not fit: {next(iter(wrong.values()))}"] if wrong else []
    if parts:
        problems.add(
            f"the output would not load by its config.json, that of {first.label} with what changes: {'; '.join(parts)}. A layer's place "
            "decides what it is made of there. Stack layers of one kind into places of that kind, or merge whole models."
        )


def _describe(files: SideFiles, shapes: Mapping[str, Shape], first: Model) -> Architecture:
    """What holds each tensor of the output; see `checkpoints.architecture.describe`."""
    from checkpoints.architecture import describe

    with tempfile.TemporaryDirectory() as folder:
        with Folder.open(Path(folder)) as opened:
            files.write(opened)
        return describe(Path(folder), shapes, label="the output", trust_remote_code=first.trust_remote_code)
