"""Every output tensor and its sources. Every refusal happens here, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from checkpoints.errors import ArgumentError, InputError, Refusals
from checkpoints.model import Model
from checkpoints.sidecars import SideFiles
from checkpoints.source import FLOAT_DTYPES, TensorInfo, dtype_name
from checkpoints.writer import Shard, plan_shards
from merging.methods import get_method
from merging.recipe import Recipe
from streaming.blocks import TensorSpec, kind_of
from streaming.layout import Arranged, arrange
from streaming.matching import check_plain, list_kinds
from streaming.output import bytes_read
from streaming.stream import PlannedTensor


@dataclass
class Plan:
    """What a merge will do.

    Attributes:
        tensors: every output tensor, in the order of the output's names.
        shards: the files to be written.
        files: the output's config, tokenizer and the rest.
        notes: what a user should know of it: tensors left out, rows matched by token.
        models: the fine-tuned models' labels, in order.
    """

    recipe: Recipe
    models: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]
    shards: list[Shard]
    files: SideFiles
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of every input tensor that is needed, each counted once."""
        return bytes_read(self.tensors)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def elements(self) -> int:
        """Numbers in the output."""
        return sum(tensor.spec.numel for tensor in self.tensors)

    def groups(self) -> list[dict[str, Any]]:
        """What happens to each kind of tensor: action, how many, elements, dtype, and why one is copied."""
        found: dict[tuple[str, str, str, str], list[int]] = {}
        for tensor in self.tensors:
            action = "merge" if tensor.method else "copy from base"
            key = (kind_of(tensor.spec.name), action, dtype_name(tensor.dtype), tensor.note)
            count = found.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += tensor.spec.numel
        return [
            {"tensors": kind, "action": action, "count": count, "elements": elements, "dtype": dtype, "why": why}
            for (kind, action, dtype, why), (count, elements) in found.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "refusals": [],
            "recipe": self.recipe.as_json(),
            "coefficients": coefficients(self.recipe),
            "tensors": len(self.tensors),
            "elements": self.elements,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "files": [{"name": shard.file_name, "bytes": shard.size} for shard in self.shards],
            "groups": self.groups(),
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """The plan for people."""
        recipe = self.recipe.as_json()
        lines = [f"method {recipe['merge_method']}, base {recipe['base_model']}"]
        lines += [
            f"  {key} = {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in {**recipe["parameters"], "seed": recipe["seed"]}.items()
            if value is not None
        ]
        lines += ["models:"]
        for entry in coefficients(self.recipe):
            numbers = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key != "model")
            lines.append(f"  {entry['model']}: {numbers}" if numbers else f"  {entry['model']}")
        lines += ["tensors:"]
        for group in self.groups():
            why = f" ({group['why']})" if group["why"] else ""
            lines.append(
                f"  {group['count']:5d} x {group['tensors']}: {group['action']}{why}, {group['elements']:,} elements, {group['dtype']}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines.append(
            f"reads {self.bytes_to_read:,} bytes; writes {self.bytes_to_write:,} bytes in {len(self.shards)} file(s). Nothing was written."
        )
        return "\n".join(lines)


def coefficients(recipe: Recipe) -> list[dict[str, Any]]:
    """Per model the parameters in force, and what its task vector (or weight) is multiplied with where no sign is elected."""
    weights = [model.parameters.get("weight") for model in recipe.models]
    scale = float(recipe.parameters.get("lambda", 1.0))
    additive = get_method(recipe.merge_method).additive
    if recipe.parameters.get("normalize") and additive:
        scale /= sum(weight for weight in weights if weight is not None)
    return [
        {
            "model": str(model.name),
            **model.parameters,
            **({"coefficient": weight * scale} if additive and weight is not None else {}),
        }
        for model, weight in zip(recipe.models, weights, strict=True)
    ]


def make_plan(recipe: Recipe, base: Model, models: Sequence[Model], *, max_shard_bytes: int) -> Plan:
    """Match every tensor of the base with the models' and decide what becomes of it.

    Args:
        recipe: what to do.
        base, models: opened inputs, in the recipe's order.
        max_shard_bytes: size of the output's files.

    Raises: Refusals: everything that does not fit, in one message.
    """
    problems: list[str | InputError] = []
    notes = [location.note for model in (base, *models) for location, _ in model.parts if location.note]
    for model in (base, *models):
        problems += check_plain(model)
    if problems:
        raise Refusals(problems)
    arranged = arrange(base, models, recipe.layout, optional=lambda name: bool(recipe.why_copied(name)))
    problems += arranged.problems
    notes += arranged.notes
    recipe = replace(recipe, layout=arranged.layout)
    names = arranged.names
    for flag, expression in (("--exclude", recipe.exclude), ("--only", recipe.only)):
        if expression and not any(re.search(expression, name) for name in names):
            problems.append(
                ArgumentError(f"{flag}: {expression!r} is found in no tensor's name. Names look like {names[0]}.")
            )
    if problems:
        raise Refusals(problems)
    wide = [name for name in names if arranged.dtypes[name] == torch.float64]
    if wide and recipe.out_dtype == "auto":
        notes.append(f"{base.label}: float64, in which nothing is computed, is written as float32: {list_kinds(wide)}.")
    embeddings = _embeddings(recipe, base)
    planned = tuple(_plan_tensor(recipe, arranged, name, name in embeddings) for name in names)
    shards = plan_shards(
        {tensor.spec.name: TensorInfo(tensor.dtype, tensor.spec.shape) for tensor in planned}, max_shard_bytes
    )
    by_name = {tensor.spec.name: tensor for tensor in planned}
    ordered = tuple(by_name[name] for shard in shards for name in shard.offsets)
    return Plan(recipe, tuple(model.label for model in models), ordered, shards, arranged.files, notes)


def _embeddings(recipe: Recipe, base: Model) -> set[str]:
    """The tensors that an `nn.Embedding` holds, where the method treats them differently."""
    if not get_method(recipe.merge_method).needs_embeddings:
        return set()
    return {name for name, placement in base.architecture.placements.items() if placement.kind == "embedding"}


def _plan_tensor(recipe: Recipe, arranged: Arranged, name: str, is_embedding: bool) -> PlannedTensor:
    reference, dtype = arranged.primary[name], arranged.dtypes[name]
    spec = TensorSpec(name, reference.info.shape, is_embedding)
    inputs = tuple(tensors[name] for tensors in arranged.others if name in tensors)
    note = ""
    if not dtype.is_floating_point:
        note = f"{dtype_name(dtype)}, not a weight"
    elif why := recipe.why_copied(name):
        note = why
    elif len(inputs) < len(arranged.others):
        note = "a buffer that not every model stores"
    if dtype.is_floating_point:
        dtype = FLOAT_DTYPES.get(recipe.out_dtype, torch.float32 if dtype == torch.float64 else dtype)
    return PlannedTensor(spec, dtype, reference, () if note else inputs, None if note else recipe.method(name), note)
