"""What to merge, and how, whether flags say it (`recipe_flags.py`) or a file (`recipe_reader.py`).

The JSON of a recipe has the keys of mergekit's YAML, so that one schema serves flags, files and merge_recipe.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.layout import Layout
from checkpoints.errors import ArgumentError
from checkpoints.location import ModelName
from checkpoints.patterns import Pattern, pattern
from checkpoints.problems import Problems
from checkpoints.settings import Remark, setting
from merging.methods import canonical, get_method
from merging.methods.contract import Method
from merging.parameters import REQUIRED, Parameter
from streaming.values import NOTHING, Value

OUT_DTYPES = ("auto", "float32", "bfloat16", "float16")

Values = Mapping[str, Value]


@dataclass(frozen=True)
class ModelInput:
    """One model of a merge, and the parameters that are its own, by recipe key (`weight`, `density`).

    Attributes:
        layers: the first of its layers that take part, and the one after the last; None for all.
        data: a file of text of its own task, for methods that need that.
    """

    name: ModelName
    parameters: Values = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    data: str | None = None


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output; the one slice of most recipes is the whole model.

    Attributes:
        sources: the models merged here, in order.
        parameters: what holds for all of them.
        base_layers: the base's layers here; None for all, or where no base takes part.
        base_listed: whether the base stands among the sources in the file, for nothing but its layers.
        as_is: its one source is taken as it is, whatever the method.
    """

    sources: tuple[ModelInput, ...]
    parameters: Values = field(default_factory=dict)
    base_layers: tuple[int, int] | None = None
    base_listed: bool = False
    as_is: bool = False


@dataclass(frozen=True)
class Recipe:
    """A merge, whole and checked: what decides the output's bytes, and nothing else.

    Attributes:
        merge_method: a key of METHODS, or `package.module:Class`.
        base_model: gives config, tokenizer, vocabulary and, for most methods, numbers; None where the first model gives
            what is no number.
        slices: what is merged; one slice, unless layers are stacked.
        parameters: what holds for all slices, by recipe key (`lambda`, `normalize`).
        seed: of the random masks; None where the method draws nothing.
        out_dtype: `auto` keeps each tensor's dtype in the base.
        exclude: regular expression; output tensors in whose name it is found are taken from the base.
        only: regular expression; output tensors in whose name it is not found are taken from the base.
        layout: the output's vocabulary, head and chat template.
        aim: the block on relaxing, as the file has it; the command reads it.
        notes: what a user should know of how the recipe was read.
        merges: name -> a merge that this one, or another of them, uses as a model.
        places: setting -> where a file gives it, `recipe.yml: tokenizer_source`, for messages; empty where none was read.
    """

    merge_method: str
    base_model: ModelName | None
    slices: tuple[Slice, ...]
    parameters: Values
    seed: int | None = None
    out_dtype: str = "auto"
    exclude: str | None = None
    only: str | None = None
    layout: Layout = field(default_factory=Layout)
    aim: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    merges: Mapping[str, Recipe] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    def why_copied(self, tensor: str) -> str:
        """The setting by which an output tensor is taken from the base; empty where none is."""
        for key, expression, copied in (("exclude", self.exclude, True), ("only", self.only, False)):
            if expression and pattern(setting(key), expression).found_in(tensor) == copied:
                return Remark(setting(key))
        return ""

    @property
    def is_sliced(self) -> bool:
        """Whether layers were named."""
        return len(self.slices) > 1 or any(source.layers for source in self.slices[0].sources)

    @property
    def models(self) -> tuple[ModelInput, ...]:
        """The models of the first slice."""
        return self.slices[0].sources

    @property
    def inputs(self) -> tuple[ModelName, ...]:
        """Every model once: the base, or what stands in for it, then the others in order."""
        names = [self.base_model] if self.base_model else []
        names += [source.name for part in self.slices for source in part.sources]
        by_key: dict[Any, ModelName] = {}
        for name in names:
            by_key.setdefault(source_key(name), name)
        return tuple(by_key.values())

    @property
    def uses_merges(self) -> bool:
        """Whether one of its models is a named merge."""
        return any(name.merged is not None for name in self.inputs)

    def uses(self, key: str) -> bool:
        """Whether a parameter that holds for all models is anything but 0 somewhere."""
        values = [
            parameters[key]
            for parameters in (self.parameters, *(part.parameters for part in self.slices))
            if key in parameters
        ]
        return any(number != 0 for value in values for _, numbers in value.entries for number in numbers)

    @property
    def method_class(self) -> type[Method]:
        """The method's class, with or without a base."""
        return class_of(self.merge_method, self.base_model is not None)

    def method(self, tensor: str, t: float = 0.0, part: int = 0, names: Sequence[str] = ()) -> Method:
        """The method with its parameters for one output tensor.

        Args:
            tensor: its name.
            t: where among its slice's layers it is, see `Value.at`.
            part: the slice.
            names: what it is called in each source, where that is another name.

        Raises: ArgumentError: a value is missing for this tensor, or the method refuses it.
        """
        here = self.slices[part]
        cls = get_method("passthrough") if here.as_is else self.method_class
        values: dict[str, Any] = {}
        for key, (parameter, attribute) in cls.parameters().items():
            if here.as_is:
                values[attribute] = (1.0,)
            elif parameter.per_model:
                chains = [(source.parameters, here.parameters, self.parameters) for source in here.sources]
                called = names or [tensor] * len(chains)
                numbers = (resolve(key, chain, name, t) for chain, name in zip(chains, called, strict=True))
                values[attribute] = tuple(_or_default(parameter, number, tensor) for number in numbers)
            else:
                number = resolve(key, (here.parameters, self.parameters), tensor, t)
                values[attribute] = _or_default(parameter, number, tensor)
        if cls.draws:
            values["seed"] = self.seed
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """The recipe under mergekit's keys, every default written out."""
        content: dict[str, Any] = {
            "merge_method": self.merge_method,
            "base_model": str(self.base_model) if self.base_model else None,
        }
        if self.is_sliced:
            content["slices"] = [self._slice_as_json(part) for part in self.slices]
        else:
            content["models"] = [
                {
                    "model": str(part.name),
                    **({"data": part.data} if part.data is not None else {}),
                    "parameters": _values_as_json(part.parameters),
                }
                for part in self.models
            ]
        return {
            **content,
            "parameters": _values_as_json(self.parameters),
            **self.layout.as_json(),
            "out_dtype": self.out_dtype,
            "exclude": self.exclude,
            "only": self.only,
            "seed": self.seed,
            **({"merges": {name: merge.as_json() for name, merge in self.merges.items()}} if self.merges else {}),
        }

    def _slice_as_json(self, part: Slice) -> dict[str, Any]:
        base = [ModelInput(self.base_model, {}, part.base_layers)] if part.base_listed and self.base_model else []
        sources = [
            {
                "model": str(source.name),
                "layer_range": list(source.layers or ()),
                "parameters": _values_as_json(source.parameters),
            }
            for source in (*base, *part.sources)
        ]
        return {"sources": sources, "parameters": _values_as_json(part.parameters)}


def _values_as_json(values: Values) -> dict[str, Any]:
    return {key: value.as_json() for key, value in values.items()}


def resolve(key: str, chain: Iterable[Values], tensor: str, t: float) -> Any:
    """The first that any of the mappings says of a tensor; NOTHING where none does."""
    for values in chain:
        number = values[key].at(tensor, t) if key in values else NOTHING
        if number is not NOTHING:
            return number
    return NOTHING


def _or_default(parameter: Parameter, number: Any, tensor: str) -> Any:
    """A value that was found, else the default. Raises ArgumentError where there is none."""
    if number is not NOTHING:
        return number
    if parameter.default_in_files is REQUIRED:
        raise ArgumentError(
            f"{setting(parameter.key)}: says nothing of {tensor}, as no filter is in its name. Add an entry without a filter at the end."
        )
    return parameter.default_in_files


def source_key(name: ModelName) -> Any:
    """Equal for two names of one model, as far as that can be told without opening it."""
    own = os.path.realpath(name.path) if name.is_local else (name.path_or_id.lower(), name.revision)
    return own if name.base is None else (own, source_key(name.base))


def class_of(method: str, has_base: bool) -> type[Method]:
    """The class of a method, with a base or without. Raises ArgumentError where there is no such method, or it needs one."""
    cls = get_method(method)
    method_class = cls if has_base else cls.without_base()
    if method_class is None:
        raise ArgumentError(
            f"base_model: {canonical(method)} needs one. Name the model that the others were fine-tuned from."
        )
    return method_class


def check_count(cls: type[Method], method: str, count: int) -> None:
    """Raise ArgumentError where a method cannot merge so many models."""
    low, high = cls.min_models, cls.max_models
    if count < low or (high is not None and count > high):
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        noun = "model" if wanted == "1" else "models"
        beside = " besides the base" if cls.reads_base else ""
        raise ArgumentError(f"{method} merges {wanted} {noun}{beside}, got {count}.")


def check_expression(where: str, expression: str | None, problems: Problems) -> None:
    """Refuse an expression that is none."""
    if expression:  # asking starts a process
        with problems.collect():
            Pattern(where, expression)


def twice(names: Iterable[ModelName]) -> list[ModelName]:
    """The names of models that were named before, whichever way they are written: a slip."""
    seen: set[Any] = set()
    repeated = []
    for name in names:
        key = source_key(name)
        if key in seen:
            repeated.append(name)
        seen.add(key)
    return repeated
