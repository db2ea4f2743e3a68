"""Find which tensor of which model goes into each output tensor: whole models by name, slices by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignment.align import Alignment, align
from alignment.aligned_model import Mismatches, same_kind_of_number
from alignment.layout import Layout
from alignment.stored import left_out
from checkpoints.errors import ArgumentError, InputError, UnknownClass
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.sidecars import SideFiles
from checkpoints.source import TensorRef
from checkpoints.tensor_names import LayerName, is_called_embedding, list_kinds
from merging.layers import Layers, find_layers, position
from merging.recipe import ModelInput, Recipe, Slice, source_key

SAME_ARCHITECTURE = "Stack layers of models of one architecture."


@dataclass(frozen=True)
class Place:
    """One output tensor.

    Attributes:
        name: its name.
        part: the recipe's slice.
        t: where among the slice's layers it is.
        reference: the tensor that decides the shape, and is copied where nothing is merged: the base's where there is one.
        dtype: as the reference is stored.
        inputs: of each source of the slice, in order; None where that does not store it.
        names: what each source calls it; empty where all call it so.
    """

    name: str
    part: int
    t: float
    reference: TensorRef
    dtype: torch.dtype
    inputs: tuple[TensorRef | None, ...]
    names: tuple[str, ...] = ()


@dataclass
class Places:
    """Every output tensor, and what stands in the way.

    Attributes:
        places: in the order of the reference's names.
        files: the output's side files.
        layout: the recipe's, decided where that says `auto`.
        problems: what does not fit, and notes.
        is_stacked: whether the output's layers are not simply the first model's.
        stacks: what comes before the number in the names of the layers that the recipe's slices mean.
    """

    files: SideFiles
    layout: Layout
    problems: Problems = field(default_factory=Problems)
    places: list[Place] = field(default_factory=list)
    is_stacked: bool = False
    stacks: Sequence[str] = ()


def find_places(recipe: Recipe, models: Mapping[Any, Model], primary: Model) -> Places:
    """Find the inputs of every output tensor.

    Args:
        recipe: what to merge.
        models: the opened inputs, by `source_key` of their names.
        primary: the base, or the model that stands in for it.
    """
    if _takes_whole_models(recipe, models, primary):
        return _place_whole_models(recipe, models, primary)
    if primary.is_file:
        _ = primary.architecture  # which says that there is none: nothing would state the number of layers
    stored = primary.weights.tensors
    dropped = left_out(primary, stored)
    names = [name for name in stored if name not in dropped]
    return _Stack(recipe, models, primary, names).place()


def _takes_whole_models(recipe: Recipe, models: Mapping[Any, Model], primary: Model) -> bool:
    """Whether the one slice has every layer of every model."""
    if len(recipe.slices) > 1:
        return False
    only = recipe.slices[0]
    ranges = [(models[source_key(source.name)], source.layers) for source in only.sources]
    ranges += [(primary, only.base_layers)] if only.base_layers else []
    return all(layers is None or layers in _whole_ranges(model) for model, layers in ranges)


def _whole_ranges(model: Model) -> set[tuple[int, int]]:
    return {(0, count) for count in find_layers(model.weights.tensors).counts.values()}


def _place_whole_models(recipe: Recipe, models: Mapping[Any, Model], primary: Model) -> Places:
    sources = [models[source_key(source.name)] for source in recipe.models]
    alignment = _align(recipe, sources, primary)
    aligned = [alignment.of(model) for model in sources]
    names = list(alignment.dtypes)
    layers = find_layers(names)
    places = [
        Place(
            name,
            0,
            layers.position(name),
            alignment.first.tensors[name],
            alignment.dtypes[name],
            tuple(model.tensors.get(name) for model in aligned),
            tuple(model.own_names.get(name, name) for model in aligned),
        )
        for name in names
    ]
    named = recipe.models[0].layers
    stacks = [prefix for prefix, count in layers.counts.items() if named == (0, count)]
    return Places(alignment.files, alignment.layout, alignment.problems, places, stacks=stacks)


def _align(recipe: Recipe, sources: Sequence[Model], primary: Model, **options: Any) -> Alignment:
    """Bring the sources into the output's shape, each once. `options`: see `align`."""
    others = list({id(model): model for model in sources if model is not primary}.values())
    return align(primary, others, recipe.layout, optional=lambda name: bool(recipe.why_copied(name)), **options)


class _Stack:
    """Layers of the models on top of each other, as the recipe's slices say.

    Tensors outside of the layers come from the first slice's sources where the model uses them before its layers
    (embeddings), else from the last slice's.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[Any, Model],
        primary: Model,
        names: Sequence[str],
    ):
        self.recipe = recipe
        self.models = models
        self.primary = primary
        self.names = names
        self.layers = find_layers(names)
        self.result = Places(primary.side_files(), recipe.layout, is_stacked=True)
        self._known_kinds: dict[int, dict[int, list[str]]] = {}

    def place(self) -> Places:
        """Find everything."""
        stack = self._stack_of_layers()
        if stack is None:
            return self.result
        self.result.stacks = [stack]
        too_far = [problem for part in self.recipe.slices for problem in self._check_ranges(part, stack)]
        self.result.problems.extend(too_far)
        if too_far:
            return self.result
        self._place_outside([name for name in self.names if not self._is_layer(name, stack)])
        first = 0
        origins: list[tuple[Model, int]] = []
        for index, part in enumerate(self.recipe.slices):
            origins += self._place_slice(index, part, stack, first)
            first = len(origins)
        self.result.files.set_config(self._config(origins, stack))
        return self.result

    def _is_layer(self, name: str, stack: str) -> bool:
        parts = self.layers.split(name)
        return parts is not None and parts.prefix == stack

    def _stack_of_layers(self) -> str | None:
        """The prefix of the layers that slices mean; refused where that is not clear."""
        counts = self.layers.counts
        if len(counts) == 1:
            return next(iter(counts))
        expected = {value for _, value in _entries(self.primary.config, {_layers_key(self.primary)})}
        fitting = [prefix for prefix, count in counts.items() if count in expected]
        if len(fitting) == 1:
            return fitting[0]
        stacks = ", ".join(f"{prefix}0 to {count - 1}" for prefix, count in counts.items()) or "no layers"
        self.result.problems.add(
            f"slices: {self.primary.label}: expected one stack of layers, got {stacks}. Merge whole models instead."
        )
        return None

    def _model(self, source: ModelInput) -> Model:
        return self.models[source_key(source.name)]

    def _check_ranges(self, part: Slice, stack: str) -> Iterator[InputError]:
        ranges = [(self._model(source), source.layers) for source in part.sources]
        ranges += [(self.primary, part.base_layers)] if part.base_layers else []
        for model, layers in ranges:
            count = find_layers(model.weights.tensors).counts.get(stack, 0)
            if layers and layers[1] > count:
                yield ArgumentError(
                    f"layer_range {list(layers)} of {model.label}: has {count} layers named {stack}0 and so on, the last of "
                    f"which is {count - 1}. Name at most [0, {count}]."
                )

    def _place_outside(self, names: Sequence[str]) -> None:
        """Match what is not in the layers: by name, vocabulary rows by token."""
        ends = (0, len(self.recipe.slices) - 1)
        sources = {end: [self._model(source) for source in self.recipe.slices[end].sources] for end in ends}
        models = [model for end in ends for model in sources[end]]
        alignment = _align(self.recipe, models, self.primary, part=lambda model: self._outside_of(model, names))
        self.result.files, self.result.layout = alignment.files, alignment.layout
        self.result.problems.take(alignment.problems)
        out = list(alignment.dtypes)
        before = self._used_before_layers(out) if len(self.recipe.slices) > 1 else set(out)
        for name in out:
            part = 0 if name in before else ends[-1]
            inputs = tuple(alignment.of(model).tensors.get(name) for model in sources[part])
            reference, dtype = alignment.first.tensors[name], alignment.dtypes[name]
            self.result.places.append(Place(name, part, 0.0, reference, dtype, inputs))

    def _outside_of(self, model: Model, names: Sequence[str]) -> Sequence[str]:
        """The tensors of a model that are not in its layers."""
        if model is self.primary:
            return names
        stored = find_layers(model.weights.tensors)
        return [name for name in model.weights.tensors if stored.split(name) is None or name in names]

    def _used_before_layers(self, names: Sequence[str]) -> set[str]:
        """The tensors that the model class lists before its layers, and all embeddings; by their names where it is not known."""
        from checkpoints.meta_model import build_meta_model  # few merges build the model's class

        primary = self.primary
        try:
            built = build_meta_model(primary.folder, label=primary.label, trust_remote_code=primary.trust_remote_code)
        except UnknownClass:
            before = [name for name in names if is_called_embedding(name)]
            behind = [name for name in names if name not in before]
            self.result.problems.note(
                f"{primary.label}: transformers does not know its class, so names tell what comes before the layers: "
                f"{list_kinds(before) or 'nothing'} from the first slice, {list_kinds(behind) or 'nothing'} from the last."
            )
            return set(before)
        order = {
            parameter: index for index, (parameter, _) in enumerate(built.named_parameters(remove_duplicate=False))
        }
        placed = primary.architecture.placements
        numbers = [
            order.get(placed[name].parameter, 0) for name in self.names if name in placed and self.layers.split(name)
        ]
        first = min(numbers, default=0)
        return {
            name
            for name in names
            if name in placed and (placed[name].kind == "embedding" or order.get(placed[name].parameter, first) < first)
        }

    def _place_slice(self, index: int, part: Slice, stack: str, first: int) -> list[tuple[Model, int]]:
        """Place the layers of a slice from the output's layer `first` on; which layer of which model decides each."""
        has_base = self.recipe.base_model is not None and part.base_layers is not None
        sources = [(self._model(source), source.layers or (0, 0)) for source in part.sources]
        deciding, range_ = (self.primary, part.base_layers or (0, 0)) if has_base else sources[0]
        kinds = self._kinds(deciding, stack)
        mismatches = [Mismatches(model.label, SAME_ARCHITECTURE) for model, _ in sources]
        count = range_[1] - range_[0]
        for offset in range(count):
            own = kinds.get(range_[0] + offset, [])
            for rest in own:
                out = LayerName(stack, first + offset, rest)
                reference = TensorRef(deciding.weights, out.at(range_[0] + offset))
                names = tuple(out.at(layers[0] + offset) for _, layers in sources)
                inputs = tuple(
                    _take(model, name, reference, deciding.label, unfit)
                    for (model, _), name, unfit in zip(sources, names, mismatches, strict=True)
                )
                where = position(offset, count)
                place = Place(out.at(out.layer), index, where, reference, reference.info.plain_dtype, inputs, names)
                self.result.places.append(place)
            for (model, layers), unfit in zip(sources, mismatches, strict=True):
                for rest in self._kinds(model, stack).get(layers[0] + offset, []):
                    if rest not in own:
                        unfit.add_extra(f"{stack}{layers[0] + offset}{rest}", deciding.label)
        for unfit in mismatches:
            unfit.report_to(self.result.problems)
        return [(deciding, range_[0] + offset) for offset in range(count)]

    def _kinds(self, model: Model, stack: str) -> dict[int, list[str]]:
        """Per layer of a model the ends of its tensors' names, without what loading ignores."""
        if id(model) not in self._known_kinds:
            dropped = set(left_out(model, model.weights.tensors))
            kinds = self._known_kinds[id(model)] = {}
            for name in model.weights.tensors:
                parts = Layers({stack: 0}).split(name)
                if parts and name not in dropped:
                    kinds.setdefault(parts.layer, []).append(parts.rest)
        return self._known_kinds[id(model)]

    def _config(self, origins: Sequence[tuple[Model, int]], stack: str) -> dict[str, Any]:
        """Entries of config.json that change: how many layers there are, and, where it lists the layers, what each is."""
        old = self.layers.counts[stack]
        if origins == [(self.primary, layer) for layer in range(old)]:
            return {}
        changed: dict[str, Any] = {}
        key = _layers_key(self.primary)
        entries = list(_entries(self.primary.config, {key}))
        for name in [name for name, value in entries if value == old] or [key]:
            changed[name] = len(origins)
            parent = name.rpartition(".")[0]
            for entry, value in _entries(self.primary.config, None):
                if entry.rpartition(".")[0] == parent and isinstance(value, list) and len(value) == old:
                    changed[entry] = [_listed(model, entry, layer, value) for model, layer in origins]
        return changed


def _take(model: Model, name: str, reference: TensorRef, owner: str, mismatches: Mismatches) -> TensorRef | None:
    """A source's tensor of a layer, where it fits the one that decides."""
    if name not in model.weights.tensors:
        mismatches.add_missing(name, owner)
        return None
    info = model.weights.tensors[name]
    if info.shape != reference.info.shape:
        mismatches.add_shape(name, reference.info, info, owner)
    elif not same_kind_of_number(info, reference.info):
        mismatches.add_dtype(name, reference.info, info, owner)
    return TensorRef(model.weights, name)


def _layers_key(model: Model) -> str:
    """What the model's config class calls the number of layers on disk."""
    from transformers import CONFIG_MAPPING

    kind = model.config.get("model_type")
    known = kind in CONFIG_MAPPING
    names: Mapping[str, str] = CONFIG_MAPPING[kind].attribute_map if known else {}
    return names.get("num_hidden_layers", "num_hidden_layers")


def _entries(config: Mapping[str, Any], keys: set[str] | None, parent: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a config and of the configs in it, by dotted name: those of certain keys, or all."""
    for key, value in config.items():
        if keys is None or key in keys:
            yield parent + key, value
        if isinstance(value, dict):
            yield from _entries(value, keys, f"{parent}{key}.")


def _listed(model: Model, entry: str, layer: int, fallback: Sequence[Any]) -> Any:
    """What a config's list of layers says of one layer."""
    there = dict(_entries(model.config, None)).get(entry)
    listed = there if isinstance(there, list) and layer < len(there) else fallback
    return listed[min(layer, len(listed) - 1)]
