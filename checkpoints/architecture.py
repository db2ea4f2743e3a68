"""What holds each tensor of a checkpoint: the model's parameters, matched to the names on disk, without its weights.

The class named in config.json is built on torch's meta device, so nothing is allocated. Names are matched by the code
that transformers itself loads with, and what it fuses on loading is fused by its own operations, on meta tensors. So
there is no list of architectures here, and what a tensor is follows from the module that holds it, not from its name.

Fused experts: the experts of a layer are one module with three-dimensional parameters, `[experts, out, in]` or, where
the module says `is_transposed`, `[experts, in, out]`. On disk they may be fused alike (`Placement.expert` is None, one
tensor holds all experts) or be one tensor per expert (`expert` is its index). Statistics `[experts, in]` of the
parameter belong to the disk tensor as they are in the first case; in the second, row `expert` of them. Gate and up
weights, which are joined along the output dimension, have one input and so the same row.
Source: transformers 5.19, `core_model_loading.convert_and_load_state_dict_in_model`, `integrations/moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints.conversions import match_names, place_group
from checkpoints.errors import InputError, first_line
from checkpoints.limits import limited_building
from checkpoints.meta_model import build_meta_model, quiet
from checkpoints.module_kinds import classify
from checkpoints.placements import Architecture, Placement, Shape
from checkpoints.process import quick_start

# Modules, and parameters, of a model for each tensor that is stored: there are about as many of the former, fewer of the latter.
PARTS_EACH = 10
PARTS_AT_LEAST = 1000


@quick_start()
def describe(
    folder: Path, shapes: Mapping[str, Shape], *, label: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """Say for every tensor of a checkpoint what holds it.

    Args:
        folder: the checkpoint. Only config.json is read, and the code beside it if trusted.
        shapes: name and shape of every tensor in its weight files.
        label: what to call the checkpoint in messages; the folder by default.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        InputError: as `build_meta_model`; names or shapes that transformers fails on. Other tensors that do not fit raise
            nothing: they are in `unplaced`, `missing` and `mismatched`.
    """
    import transformers  # before, as it loads libraries that claim much more than they use

    assert transformers.AutoConfig
    with limited_building(PARTS_EACH * len(shapes) + PARTS_AT_LEAST):
        model: Any = build_meta_model(folder, label=label, trust_remote_code=trust_remote_code)
    try:
        return _describe(model, shapes)
    except Exception as error:  # conversions of transformers fail in every way there is on names and shapes of no model
        raise InputError(
            f"{label or folder}: its tensors are not those of a {type(model).__name__}, which config.json names: "
            f"{type(error).__name__}: {first_line(error)}. Use matching files."
        ) from error


def _describe(model: Any, shapes: Mapping[str, Shape]) -> Architecture:
    """See `describe`."""
    from transformers.utils.loading_report import LoadStateDictInfo

    with quiet():
        state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        computed = {name for name, _ in model.named_buffers(remove_duplicate=False)} - state.keys()
        # Place every disk tensor that some parameter is made of.
        groups, strangers = match_names(model, shapes)
        buffers: set[str] = set()
        placements: dict[str, Placement] = {}
        mismatched: dict[str, str] = {}
        for group in groups:
            if group.parameter not in parameters:
                buffers |= {name for name, _ in group.sources}
                continue
            placed, complaint = place_group(
                group, model, state, {name: tuple(shapes[name]) for name, _ in group.sources}
            )
            placements |= placed
            mismatched |= dict.fromkeys(placed, complaint) if complaint else {}

        # Ties fill parameters too.
        disk_names = {placement.parameter: name for name, placement in placements.items()}
        filled = {name for placement in placements.values() for name in (placement.parameter, *placement.others)}
        tied, shared = _resolve_ties(model, placements, disk_names)
        filled |= shared
        # The class's own rules on what may be missing or left over; they look at names in the model.
        left = LoadStateDictInfo(parameters - filled, set(strangers.values()) - computed, set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(left)
        unplaced = {name for name, target in strangers.items() if target in left.unexpected_keys}
        return Architecture(
            model_class=type(model).__name__,
            placements=placements,
            tied=tied,
            input_embedding=_weight_of(model, model.get_input_embeddings, nn.Embedding, disk_names),
            output_head=_weight_of(model, model.get_output_embeddings, nn.Module, disk_names),
            buffers=tuple(sorted(buffers)),
            ignored=tuple(sorted(strangers.keys() - unplaced)),
            unplaced=tuple(sorted(unplaced)),
            missing=tuple(sorted(left.missing_keys)),
            mismatched=mismatched,
            decoder=_decoder_of(model),
        )


def _resolve_ties(
    model: Any, placements: dict[str, Placement], disk_names: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """`Architecture.tied`, and every parameter that is tied to a stored one.

    Changes `placements` where only the other side of an embedding is stored: that is the embedding then.
    """
    families: dict[str, list[str]] = {}  # first the one that the class names as the source
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        families.setdefault(source, [source]).append(name)
    tied: dict[str, str] = {}
    shared: set[str] = set()
    for family in families.values():
        stored = [name for name in family if name in disk_names]
        holder = (stored or family)[0]
        holder_on_disk = _disk_name(model, holder, disk_names)
        tied |= {_disk_name(model, name, disk_names): holder_on_disk for name in family if name != holder}
        if stored:
            shared |= set(family)
            if any(classify(model, name)[0] == "embedding" for name in family if name not in stored):
                placements[holder_on_disk] = replace(placements[holder_on_disk], kind="embedding", input_dim=None)
    return tied, shared


def _disk_name(model: Any, parameter: str, disk_names: Mapping[str, str]) -> str:
    """The disk tensor that holds a parameter; if none does, the name that transformers would save it under."""
    from transformers.core_model_loading import revert_weight_conversion

    if parameter in disk_names:
        return disk_names[parameter]
    name: str = next(iter(revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})))
    return name


def _weight_of(
    model: Any, get_module: Callable[[], Any], kind: type[nn.Module], disk_names: Mapping[str, str]
) -> str | None:
    """Disk name of the weight of a module that one of the model's own methods returns; None if it has no such."""
    try:
        module = get_module()
    except (NotImplementedError, AttributeError):  # how models without words to embed answer
        return None
    path = next((path for path, other in model.named_modules() if other is module), None)
    if path is None or not isinstance(module, kind) or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    return _disk_name(model, f"{path}.weight", disk_names)


def _decoder_of(model: Any) -> str:
    """See `Architecture.decoder`."""
    try:
        module = model.get_decoder()
    except (NotImplementedError, AttributeError):
        return ""
    return next((path for path, other in model.named_modules() if other is module), "")
