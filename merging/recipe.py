"""What to merge, and how: from flags (and later from files), checked against the method before a model is opened.

The JSON of a recipe has the keys of mergekit's YAML, so that one schema serves flags, files and merge_recipe.json.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.errors import ArgumentError, InputError, Refusals, unknown
from checkpoints.location import ModelName, parse_model
from merging.methods import get_method
from merging.methods.contract import Method, check_range
from streaming.layout import Layout

OUT_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelInput:
    """One fine-tuned model and the parameters that are its own, by recipe key (`weight`, `density`)."""

    name: ModelName
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """A merge, whole and checked: what decides the output's bytes, and nothing else.

    Attributes:
        merge_method: a key of METHODS.
        base_model: gives config, tokenizer, vocabulary and, for most methods, numbers.
        models: the fine-tuned models; their order is part of the recipe.
        parameters: the method's own parameters by recipe key (`lambda`, `normalize`).
        seed: of the random masks; None where the method draws nothing.
        out_dtype: `auto` keeps each tensor's dtype in the base.
        exclude: regular expression; output tensors in whose name it is found are taken from the base.
        layout: the output's vocabulary and head.
        only: regular expression; output tensors in whose name it is not found are taken from the base.
    """

    merge_method: str
    base_model: ModelName
    models: tuple[ModelInput, ...]
    parameters: Mapping[str, float | bool]
    seed: int | None = None
    out_dtype: str = "auto"
    exclude: str | None = None
    layout: Layout = dataclasses.field(default_factory=Layout)
    only: str | None = None

    def why_copied(self, tensor: str) -> str:
        """The flag by which an output tensor is taken from the base; empty where none is."""
        if self.exclude and re.search(self.exclude, tensor):
            return "--exclude"
        return "--only" if self.only and not re.search(self.only, tensor) else ""

    def method(self, tensor: str) -> Method:
        """The method with its parameters for one output tensor."""
        cls = get_method(self.merge_method)
        values: dict[str, Any] = {}
        for key, field in cls.parameters().items():
            per_model = field.metadata["per_model"]
            values[field.name] = (
                tuple(model.parameters[key] for model in self.models) if per_model else self.parameters[key]
            )
        if cls.draws:
            values["seed"] = self.seed
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """The recipe under mergekit's keys, every default written out."""
        return {
            "merge_method": self.merge_method,
            "base_model": str(self.base_model),
            "models": [{"model": str(model.name), "parameters": dict(model.parameters)} for model in self.models],
            "parameters": dict(self.parameters),
            **self.layout.as_json(),
            "out_dtype": self.out_dtype,
            "exclude": self.exclude,
            "only": self.only,
            "seed": self.seed,
        }


def make_recipe(
    method: str,
    base_model: str,
    models: str,
    *,
    parameters: Mapping[str, str | float | bool | None] | None = None,
    seed: int | None = None,
    out_dtype: str = "auto",
    exclude: str | None = None,
    layout: Layout | None = None,
    only: str | None = None,
) -> Recipe:
    """Make a recipe from what a user typed; everything wrong is said at once.

    Args:
        method: name of a method, in any case.
        base_model: folder or hub name, `NAME@REVISION`.
        models: comma-separated, `A,B,C`, or with weights, `A:0.5,B:0.3`.
        parameters: recipe key (`weight`, `density`, `lambda`, `normalize`, `widen_ratio` ...) -> what was given, None where
            nothing was. A per-model one is a number for all or as many as models, comma-separated.
        seed: None for the default, 0 where the method draws.
        out_dtype, exclude, layout, only: see `Recipe`.

    Raises: Refusals (an InputError): every problem; exit code 2.
    """
    cls = get_method(method)
    problems: list[str | InputError] = []
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    names, inline = _split_models(models, problems)
    if inline:
        if "weight" in given:
            problems.append(ArgumentError("--weights: the models already carry weights (NAME:WEIGHT). Give them once."))
        given["weight"] = ",".join(inline)
    _check_used(cls, method, given, seed, problems)
    values = {
        key: _read_values(key, field, given.get(key), len(names), problems) for key, field in cls.parameters().items()
    }
    _check_values(cls, values, problems)
    if out_dtype not in OUT_DTYPES:
        problems.append(ArgumentError(f"--dtype: {unknown('dtype', out_dtype, OUT_DTYPES)}"))
    _check_expression("--exclude", exclude, problems)
    _check_expression("--only", only, problems)
    _check_twice(names, problems)
    base = _parse("--base_model", base_model, problems)
    if problems:
        raise Refusals(problems)
    assert base is not None
    fields = cls.parameters()
    return Recipe(
        merge_method=method.lower(),
        base_model=base,
        models=tuple(
            ModelInput(name, {key: value[index] for key, value in values.items() if fields[key].metadata["per_model"]})
            for index, name in enumerate(names)
        ),
        parameters={key: value for key, value in values.items() if not fields[key].metadata["per_model"]},
        seed=(seed or 0) if cls.draws else None,
        out_dtype=out_dtype,
        exclude=exclude,
        layout=layout or Layout(),
        only=only,
    )


def _parse(flag: str, text: str, problems: list[str | InputError]) -> ModelName | None:
    try:
        return parse_model(text)
    except InputError as error:
        problems.append(ArgumentError(f"{flag}: {error}"))
        return None


def _split_models(text: str, problems: list[str | InputError]) -> tuple[list[ModelName], list[str]]:
    """`A,B` or `A:0.5,B:0.3` -> names, and the weights where they are given inline."""
    names: list[ModelName] = []
    weights: list[str] = []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        problems.append(ArgumentError(f"--models_to_merge: expected names separated by commas, got {text!r}."))
        return names, weights
    for part in parts:
        name, colon, weight = part.rpartition(":")
        if not colon or os.path.lexists(os.path.expanduser(part)) or "/" in weight or "\\" in weight:
            name = part
        elif _is_number(weight):
            weights.append(weight)
        else:
            problems.append(
                ArgumentError(f"--models_to_merge: {part}: expected a weight after the colon, got {weight!r}.")
            )
            continue
        parsed = _parse("--models_to_merge", name, problems)
        if parsed is not None:
            names.append(parsed)
    if weights and len(weights) != len(names):
        problems.append(
            ArgumentError(
                f"--models_to_merge: {len(weights)} of {len(names)} models carry a weight. Give it to all or to none."
            )
        )
        weights = []
    return names, weights


def _check_used(
    cls: type[Method], method: str, given: Mapping[str, Any], seed: int | None, problems: list[str | InputError]
) -> None:
    """A flag that the method does not use is an error, never ignored."""
    used = cls.parameters()
    for key in given:
        if key not in used:
            problems.append(
                ArgumentError(
                    f"{flag_of(key)}: {method.lower()} does not use it. Its parameters: {', '.join(map(flag_of, used))}."
                )
            )
    if seed is not None and not cls.draws:
        problems.append(ArgumentError(f"--seed: {method.lower()} draws no random numbers. Leave it out."))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_values(cls: type[Method], values: Mapping[str, Any], problems: list[str | InputError]) -> None:
    """Ranges, and what the values forbid each other."""
    fields = cls.parameters()
    found: list[ArgumentError] = []
    for key, field in fields.items():
        try:
            check_range(field, values[key])
        except ArgumentError as error:
            found.append(error)
    if not found:
        try:
            cls(**{field.name: values[key] for key, field in fields.items()})
        except ArgumentError as error:
            found.append(error)
    for problem in found:  # a method names its parameter by the recipe's key
        key, colon, rest = str(problem).partition(":")
        problems.append(ArgumentError(flag_of(key) + colon + rest if key in fields else str(problem)))


def flag_of(key: str) -> str:
    """The flag of a recipe key: `--weights` for `weight`, else the key itself."""
    return "--weights" if key == "weight" else f"--{key}"


def _read_values(
    key: str, field: dataclasses.Field[Any], text: Any, models: int, problems: list[str | InputError]
) -> Any:
    """One parameter's value, a tuple for a per-model one, from what was given or its default."""
    default = field.metadata["default"]
    fallback = (default,) * models if field.metadata["per_model"] else default
    if text is None:
        return fallback
    if isinstance(default, bool):
        return text
    try:
        numbers = [float(part) for part in str(text).split(",")]
    except ValueError:
        problems.append(
            ArgumentError(
                f"{flag_of(key)}: expected {'numbers separated by commas' if field.metadata['per_model'] else 'a number'}, got {text!r}."
            )
        )
        return fallback
    if not field.metadata["per_model"]:
        if len(numbers) != 1:
            problems.append(ArgumentError(f"{flag_of(key)}: expected one number, got {text!r}."))
        return numbers[0]
    if len(numbers) not in (1, models):
        problems.append(
            ArgumentError(
                f"{flag_of(key)}: expected one number or {models}, one for each model, got {len(numbers)}: {text}."
            )
        )
        return fallback
    return tuple(numbers * models if len(numbers) == 1 else numbers)


def _check_expression(flag: str, expression: str | None, problems: list[str | InputError]) -> None:
    try:
        re.compile(expression or "")
    except re.error as error:
        problems.append(ArgumentError(f"{flag}: expected a regular expression, got {expression!r}: {error}."))


def _check_twice(names: list[ModelName], problems: list[str | InputError]) -> None:
    """One model named twice is a slip, whichever way it is written."""
    seen: dict[Any, ModelName] = {}
    for name in names:
        own = os.path.realpath(name.path) if name.is_local else (name.path_or_id.lower(), name.revision)
        key = (own, name.base)
        if key in seen:
            problems.append(
                ArgumentError(f"--models_to_merge: {name} is named twice. Give it once, with the sum of its weights.")
            )
        seen[key] = name
