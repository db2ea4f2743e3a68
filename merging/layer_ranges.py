"""Say which layers of which models the output is made of, for the plan of a recipe with slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoints.tensor_names import list_kinds
from merging.layers import find_layers, span
from merging.places import Places
from merging.recipe import ModelInput, Recipe, Slice


@dataclass(frozen=True)
class Contribution:
    """What one model gives to a part of the output.

    Attributes:
        model: its name in the recipe.
        first: the first of its layers there.
        is_base: whether the others are merged against it.
    """

    model: str
    first: int
    is_base: bool

    @property
    def label(self) -> str:
        """The model for people."""
        return f"base {self.model}" if self.is_base else self.model

    def as_json(self) -> dict[str, Any]:
        """The model for programs."""
        return {"model": self.model, **({"base": True} if self.is_base else {})}


@dataclass(frozen=True)
class LayerRange:
    """Consecutive layers of the output.

    Attributes:
        first, count: of the output's layers.
        models: what each gives, as many layers; the base first where the others are merged against it.
    """

    first: int
    count: int
    models: tuple[Contribution, ...]

    def __str__(self) -> str:
        """For people: `layers 8-15: models/a layers 4-11`."""
        models = (f"{model.label} {span(model.first, self.count)}" for model in self.models)
        return f"{span(self.first, self.count)}: {', '.join(models)}"

    def as_json(self) -> dict[str, Any]:
        """For programs; layers as a recipe's `layer_range` has them, the first and the one after the last."""
        models = [{**model.as_json(), "layers": [model.first, model.first + self.count]} for model in self.models]
        return {"layers": [self.first, self.first + self.count], "from": models}

    def goes_on(self, models: Sequence[Contribution]) -> bool:
        """Whether these begin where this range ends, in every model."""
        return self.models == tuple(replace(model, first=model.first - self.count) for model in models)


@dataclass(frozen=True)
class Outside:
    """Tensors outside of the layers.

    Attributes:
        tensors: their names.
        models: which give them, and nothing of their layers.
    """

    tensors: tuple[str, ...]
    models: tuple[Contribution, ...]

    def __str__(self) -> str:
        """For people: `lm_head.weight, model.norm.weight: models/b`."""
        return f"{list_kinds(self.tensors)}: {', '.join(model.label for model in self.models)}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"tensors": list(self.tensors), "from": [model.as_json() for model in self.models]}


def find_layer_ranges(recipe: Recipe, places: Places) -> tuple[LayerRange | Outside, ...]:
    """The output's layers in order, then the tensors outside of them. Slices that go on from each other are one range.

    Args:
        recipe: with slices.
        places: of its tensors.
    """
    ranges: list[LayerRange] = []
    first = 0
    for part in recipe.slices:
        count, models = _contributions(recipe, part)
        if ranges and ranges[-1].goes_on(models):
            ranges[-1] = replace(ranges[-1], count=ranges[-1].count + count)
        else:
            ranges.append(LayerRange(first, count, models))
        first += count
    return (*ranges, *(Outside(tuple(names), models) for models, names in _outside(recipe, places).items()))


def _outside(recipe: Recipe, places: Places) -> Mapping[tuple[Contribution, ...], Sequence[str]]:
    """The tensors outside of the layers, by the models that give them; the first slice's before the last one's."""
    layers = find_layers(place.name for place in places.places)
    names: dict[tuple[Contribution, ...], list[str]] = {}
    for place in sorted(places.places, key=lambda place: place.part):
        parts = layers.split(place.name)
        if parts is None or parts.prefix not in places.stacks:
            _, models = _contributions(recipe, recipe.slices[place.part])
            names.setdefault(tuple(replace(model, first=0) for model in models), []).append(place.name)
    return names


def _contributions(recipe: Recipe, part: Slice) -> tuple[int, tuple[Contribution, ...]]:
    """How many layers a slice has, and its models."""
    sources = [(source, False) for source in part.sources]
    if part.base_layers and recipe.base_model:
        sources.insert(0, (ModelInput(recipe.base_model, layers=part.base_layers), True))
    models = [Contribution(str(source.name), (source.layers or (0,))[0], is_base) for source, is_base in sources]
    first, end = sources[0][0].layers or (0, 0)
    return end - first, tuple(models)
