"""Plan every output tensor and its sources; refuse everything that metadata shows, before the merge reads a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from alignment.configs import check_configs
from alignment.output_check import check_output
from alignment.stored import check_plain
from checkpoints.errors import ArgumentError, UnknownClass
from checkpoints.model import Model
from checkpoints.patterns import pattern
from checkpoints.problems import Problems
from checkpoints.settings import Show, as_in_python, setting, shown
from checkpoints.sidecars import SideFiles
from checkpoints.source import FLOAT_DTYPES, TensorInfo, dtype_name
from checkpoints.tensor_names import is_called_embedding, kind_of, list_kinds
from checkpoints.writer import Shard, plan_shards
from merging.layers import span
from merging.parameters import text_of
from merging.places import Place, find_places
from merging.recipe import Recipe, Slice, source_key
from merging.remarks import remarks
from streaming.blocks import TensorSpec
from streaming.stream import PlannedTensor, bytes_read

if TYPE_CHECKING:
    from merging.layer_ranges import LayerRange, Outside


@dataclass
class Plan:
    """What a merge will do.

    Attributes:
        tensors: every output tensor, in the order of the output's names.
        shards: the files to be written.
        files: the output's config, tokenizer and the rest.
        notes: what a user should know of it: tensors left out, rows matched by token.
        warnings: parameters that a user may not have meant.
        models: the fine-tuned models' labels, in order.
        is_stacked: whether the output's layers are not simply the base's.
        ranges: of a recipe with slices, which layers of which models the output's layers are made of.
    """

    recipe: Recipe
    models: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]
    shards: list[Shard]
    files: SideFiles
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_stacked: bool = False
    ranges: tuple[LayerRange | Outside, ...] = ()

    @property
    def has_deltas(self) -> bool:
        """Whether every tensor is made of the same models, fine-tuned from a base: whether there are task vectors to look at."""
        return self.recipe.base_model is not None and not self.is_stacked

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
        groups: dict[tuple[str, str, str, str], list[int]] = {}
        for tensor in self.tensors:
            action = (
                "merge"
                if tensor.method
                else f"copy from {'base' if self.recipe.base_model else tensor.base.source.label}"
            )
            key = (kind_of(tensor.spec.name), action, dtype_name(tensor.dtype), tensor.note)
            count = groups.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += tensor.spec.numel
        return [
            {"tensors": kind, "action": action, "count": count, "elements": elements, "dtype": dtype, "why": why}
            for (kind, action, dtype, why), (count, elements) in groups.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "refusals": [],
            "recipe": self.recipe.as_json(),
            "coefficients": coefficients(self.recipe),
            **({"layers": [range_.as_json() for range_ in self.ranges]} if self.ranges else {}),
            "tensors": len(self.tensors),
            "elements": self.elements,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "files": [{"name": shard.file_name, "bytes": shard.size} for shard in self.shards],
            "groups": self.groups(),
            "notes": self.notes,
            "warnings": self.warnings,
        }

    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""
        recipe = self.recipe.as_json()
        lines = [f"method {recipe['merge_method']}, base {recipe['base_model'] or 'none'}"]
        lines += [
            f"  {key} = {text_of(value) if isinstance(value, bool | list) else value}"
            for key, value in {**recipe["parameters"], "seed": recipe["seed"]}.items()
            if value is not None
        ]
        lines += ["models:"]
        for entry in coefficients(self.recipe):
            numbers = ", ".join(
                span(value[0], value[1] - value[0]) if key == "layers" else f"{key} {text_of(value)}"
                for key, value in entry.items()
                if key != "model"
            )
            lines.append(f"  {entry['model']}: {numbers}" if numbers else f"  {entry['model']}")
        lines += ["layers:", *(f"  {range_}" for range_ in self.ranges)] if self.ranges else []
        lines += ["tensors:"]
        for group in self.groups():
            why = f" ({shown(group['why'], show)})" if group["why"] else ""
            lines.append(
                f"  {group['count']:5d} x {group['tensors']}: {group['action']}{why}, {group['elements']:,} elements, {group['dtype']}"
            )
        lines += [f"note: {shown(note, show)}" for note in self.notes]
        lines += [f"warning: {shown(warning, show)}" for warning in self.warnings]
        lines.append(
            f"reads {self.bytes_to_read:,} bytes; writes {self.bytes_to_write:,} bytes in {len(self.shards)} file(s). Nothing was written."
        )
        return "\n".join(lines)


def coefficients(recipe: Recipe) -> list[dict[str, Any]]:
    """Per model the parameters in force, and what its task vector (or weight) is multiplied with where no sign is elected
    and that is the same for every tensor. A model of several slices is listed for each, with its layers."""
    listed = []
    declared = recipe.method_class.parameters()
    for part in recipe.slices:
        scales = _coefficients(recipe, part)
        for source, scale in zip(part.sources, scales, strict=True):
            entry: dict[str, Any] = {"model": str(source.name)}
            if source.layers:
                entry["layers"] = list(source.layers)
            chain = {**recipe.parameters, **part.parameters, **source.parameters}
            entry |= {key: value.as_json() for key, value in chain.items() if declared[key][0].per_model}
            listed.append(entry if scale is None else {**entry, "coefficient": scale})
    return listed


def _coefficients(recipe: Recipe, part: Slice) -> Sequence[float | None]:
    """What each model of a slice is multiplied with; None where a plan cannot name it."""
    stated = [*recipe.parameters.values(), *part.parameters.values()]
    stated += [value for source in part.sources for value in source.parameters.values()]
    if part.as_is or not recipe.method_class.additive or not all(value.is_constant for value in stated):
        return [None] * len(part.sources)
    numbers = vars(recipe.method("", part=recipe.slices.index(part)))
    weights = numbers["weights"]
    scale = numbers.get("lambda_", 1.0) / (sum(weights) if numbers.get("normalize") else 1.0)
    return [weight * scale for weight in weights]


def make_plan(recipe: Recipe, opened: Sequence[Model], *, max_shard_bytes: int) -> Plan:
    """Match the inputs and plan every output tensor.

    Args:
        recipe: what to merge.
        opened: the recipe's inputs, in its order.
        max_shard_bytes: size of the output's files.

    Raises: Refusals: every problem that metadata shows.
    """
    problems = Problems()
    for model in opened:
        problems.take(check_plain(model))
    problems.raise_if_any()
    # Which tensors of which model go where; configs; tokenizer files that a user chose.
    primary = opened[0]
    models = {source_key(name): model for name, model in zip(recipe.inputs, opened, strict=True)}
    places = find_places(recipe, models, primary)
    problems.take(places.problems)
    recipe = replace(recipe, layout=places.layout)
    check_configs(opened, recipe.layout.allow_config_difference, problems, is_base=recipe.base_model is not None)
    if recipe.layout.copy_tokenizer_from is not None or recipe.layout.chat_template is not None:
        from alignment.tokenizer_choice import choose_tokenizer_files

        choose_tokenizer_files(places.files, recipe.layout, opened, problems)
    # Filters by name must find something.
    names = [place.name for place in places.places]
    for key, expression in (("exclude", recipe.exclude), ("only", recipe.only)):
        with problems.collect():
            if expression and names and not any(pattern(setting(key), expression).find(names)):
                looked = f"{setting(key)}: {expression!r} is found in no tensor's name"
                raise ArgumentError(f"{looked}. Names look like {names[0]}.")
    problems.raise_if_any()
    wide = [place.name for place in places.places if place.dtype == torch.float64]
    if wide and recipe.out_dtype == "auto":
        problems.note(
            f"{primary.label}: float64, in which nothing is computed, is written as float32: {list_kinds(wide)}."
        )
    # Each tensor with its method; then whether the whole of it would load.
    embeddings = _embeddings(recipe, primary, problems)
    head = primary.known_architecture.output_head if recipe.method_class.needs_embeddings else None
    by_name: dict[str, PlannedTensor] = {}
    for place in places.places:
        with problems.collect():
            by_name[place.name] = _plan_tensor(recipe, place, place.name in embeddings, place.name == head)
    problems.raise_if_any()
    infos = {name: TensorInfo(tensor.dtype, tensor.spec.shape) for name, tensor in by_name.items()}
    modules = primary.weights.modules.tensors
    own = {name: info.shape for name, info in infos.items() if name not in modules}
    check_output(places.files, own, primary, problems)
    problems.raise_if_any()
    # Files, and what to say.
    shards = plan_shards(infos, max_shard_bytes, modules.keys())
    ordered = tuple(by_name[name] for shard in shards for name in shard.offsets)
    labels = tuple(models[source_key(source.name)].label for source in recipe.models)
    where = [location.note for model in opened for location, _ in model.parts if location.note]
    notes = [*recipe.notes, *where, *problems.notes]
    warnings = [*problems.warnings, *remarks(recipe)]
    ranges: tuple[LayerRange | Outside, ...] = ()
    if recipe.is_sliced:
        from merging.layer_ranges import find_layer_ranges  # few recipes name layers

        ranges = find_layer_ranges(recipe, places)
    return Plan(recipe, labels, ordered, shards, places.files, notes, warnings, places.is_stacked, ranges)


def _embeddings(recipe: Recipe, base: Model, problems: Problems) -> set[str]:
    """The tensors that an `nn.Embedding` holds, where the method treats them differently; by their names where the class is not known."""
    if not recipe.method_class.needs_embeddings:
        return set()
    try:
        return {name for name, placement in base.architecture.placements.items() if placement.kind == "embedding"}
    except UnknownClass:
        named = [name for name in base.weights.tensors if is_called_embedding(name)]
        problems.note(
            f"{base.label}: transformers does not know its class, so names tell what {recipe.merge_method} takes for embeddings: "
            f"{list_kinds(named) or 'nothing'}."
        )
        return set(named)


def _plan_tensor(recipe: Recipe, place: Place, is_embedding: bool, is_head: bool) -> PlannedTensor:
    dtype = place.dtype
    spec = TensorSpec(place.name, place.reference.info.shape, is_embedding, is_head)
    inputs = tuple(ref for ref in place.inputs if ref is not None)
    note = ""
    if not dtype.is_floating_point:
        note = f"{dtype_name(dtype)}, not a weight"
    elif why := recipe.why_copied(place.name):
        note = why
    elif len(inputs) < len(place.inputs):
        note = "not stored by every model"
    if dtype.is_floating_point:
        dtype = FLOAT_DTYPES.get(recipe.out_dtype, torch.float32 if dtype == torch.float64 else dtype)
    if note:
        return PlannedTensor(spec, dtype, place.reference, (), None, note)
    method = recipe.method(place.name, place.t, place.part, place.names)
    return PlannedTensor(spec, dtype, place.reference, inputs, method)
