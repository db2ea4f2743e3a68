"""Make a recipe of what a user typed, and check it against the method before a model is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from alignment.layout import Layout
from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.location import ModelName, parse_model
from checkpoints.problems import Problems
from checkpoints.settings import setting
from merging.methods import canonical, get_method
from merging.methods.contract import Method
from merging.parameters import REQUIRED, Parameter
from merging.recipe import OUT_DTYPES, ModelInput, Recipe, Slice, check_count, check_expression, source_key, twice
from streaming.values import Value


def make_recipe(
    method: str,
    base_model: str,
    models: str,
    *,
    parameters: Mapping[str, str | float | bool | None] | None = None,
    seed: int | None = None,
    out_dtype: str = "auto",
    exclude: str | None = None,
    only: str | None = None,
    layout: Layout | None = None,
    model_data: str | None = None,
) -> Recipe:
    """Make a recipe from what a user typed; everything wrong is said at once.

    Args:
        method: name of a method, in any case, or `package.module:Class`, whose code runs.
        base_model: folder or hub name, `NAME@REVISION`.
        models: comma-separated, `A,B,C`, or with weights, `A:0.5,B:0.3`.
        parameters: recipe key (`weight`, `density`, `lambda`, `normalize`, `widen_ratio` ...) -> what was given, None where
            nothing was. A per-model one is a number for all or as many as models, comma-separated.
        seed: None for the default, 0 where the method draws.
        out_dtype, exclude, only: see `Recipe`.
        layout: see `Recipe`; None for the default, the union of the vocabularies where a model adds tokens.
        model_data: comma-separated files of text, of each model's own task, for methods that need them.

    Raises: Refusals (an InputError): every problem; exit code 2.
    """
    cls = get_method(method)
    method = canonical(method)
    declared = {key: parameter for key, (parameter, _) in cls.parameters().items()}
    problems = Problems()
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    # Models, with weights inline or none.
    names, inline = _split_models(models, problems)
    if inline:
        if "weight" in given:
            problems.add(
                ArgumentError(f"{setting('weight')}: the models already carry weights (NAME:WEIGHT). Give them once.")
            )
        given["weight"] = ",".join(inline)
    base = _parse("base_model", base_model, problems)
    if base is not None and cls.max_models is not None and len(names) == cls.max_models + 1:
        # mergekit lists the base of slerp among the models.
        names = [name for name in names if source_key(name) != source_key(base)]
    if names:
        try:
            check_count(cls, method, len(names))
        except ArgumentError as error:
            problems.add(ArgumentError(f"{setting('models')}: {error.marked}"))
    # Parameters: those that the method has, a value for each or for all models.
    _check_used(cls, method, given, seed, problems)
    values = {
        key: _read_values(parameter, method, given.get(key), len(names), problems)
        for key, parameter in declared.items()
    }
    _check_values(cls, values, problems)
    texts = _split_texts(model_data, cls, method, len(names), problems)
    # What does not depend on the method.
    if out_dtype not in OUT_DTYPES:
        problems.add(ArgumentError(f"{setting('out_dtype')}: {unknown('dtype', out_dtype, OUT_DTYPES)}"))
    check_expression(setting("exclude"), exclude, problems)
    check_expression(setting("only"), only, problems)
    for name in twice(names):
        problems.add(
            ArgumentError(f"{setting('models')}: {name} is named twice. Give it once, with the sum of its weights.")
        )
    problems.raise_if_any()
    assert base is not None
    # All is well: a model's own parameters go to it, the others to the recipe.
    own = {key for key, parameter in declared.items() if parameter.per_model}
    sources = tuple(
        ModelInput(name, {key: Value.constant(values[key][index]) for key in values if key in own}, data=text)
        for index, (name, text) in enumerate(zip(names, texts, strict=True))
    )
    shared = {key: Value.constant(value) for key, value in values.items() if key not in own and value is not None}
    return Recipe(
        merge_method=method,
        base_model=base,
        slices=(Slice(sources),),
        parameters=shared,
        seed=(seed or 0) if cls.draws else None,
        out_dtype=out_dtype,
        exclude=exclude,
        only=only,
        layout=layout or Layout(),
    )


def _parse(name: str, text: str, problems: Problems) -> ModelName | None:
    try:
        return parse_model(text)
    except InputError as error:
        problems.add(ArgumentError(f"{setting(name)}: {error.marked}"))
        return None


def _split_models(text: str, problems: Problems) -> tuple[list[ModelName], list[str]]:
    """`A,B` or `A:0.5,B:0.3` -> names, and the weights where they are given inline."""
    names: list[ModelName] = []
    weights: list[str] = []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        problems.add(ArgumentError(f"{setting('models')}: expected names separated by commas, got {text!r}."))
        return names, weights
    for part in parts:
        name, colon, weight = part.rpartition(":")
        if not colon or os.path.lexists(os.path.expanduser(part)) or "/" in weight or "\\" in weight:
            name = part
        elif _is_number(weight):
            weights.append(weight)
        else:
            problems.add(
                ArgumentError(f"{setting('models')}: {part}: expected a weight after the colon, got {weight!r}.")
            )
            continue
        parsed = _parse("models", name, problems)
        if parsed is not None:
            names.append(parsed)
    if weights and len(weights) != len(names):
        problems.add(
            ArgumentError(
                f"{setting('models')}: {len(weights)} of {len(names)} models carry a weight. Give it to all or to none."
            )
        )
        weights = []
    return names, weights


def _split_texts(text: str | None, cls: type[Method], method: str, models: int, problems: Problems) -> list[str | None]:
    """The file of text of each model, None for a method that needs none."""
    name = setting("model_data")
    if text is None and not cls.needs_data:
        return [None] * models
    if text is None:
        problems.add(
            ArgumentError(
                f"{name}: {method} needs text of each model's own task, one file for each. Add {setting('model_data', 'A.jsonl,B.jsonl')}."
            )
        )
        return [None] * models
    if not cls.needs_data:
        problems.add(ArgumentError(f"{name}: {method} does not use it. Leave it out."))
        return [None] * models
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != models or not all(parts):
        got = len([part for part in parts if part])
        problems.add(
            ArgumentError(
                f"{name}: expected a file for each of the {models} models, in their order, got {got}: {text}. Name one for each."
            )
        )
        return [None] * models
    return list(parts)


def _check_used(cls: type[Method], method: str, given: Mapping[str, Any], seed: int | None, problems: Problems) -> None:
    """A flag that the method does not use is an error, never ignored."""
    used = cls.parameters()
    for key in given:
        if key not in used:
            problems.add(
                ArgumentError(
                    f"{setting(key)}: {method} does not use it. Its parameters: {', '.join(map(setting, used))}."
                )
            )
    if seed is not None and not cls.draws:
        problems.add(ArgumentError(f"{setting('seed')}: {method} draws no random numbers. Leave it out."))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_values(cls: type[Method], values: Mapping[str, Any], problems: Problems) -> None:
    """Ranges, and what the values forbid each other."""
    fields = cls.parameters()
    faults: list[ArgumentError] = []
    if any(value is REQUIRED for value in values.values()):
        return  # said already
    for key, (parameter, _) in fields.items():
        try:
            for number in values[key] if parameter.per_model else (values[key],):
                parameter.check(number)
        except ArgumentError as error:
            faults.append(error)
    if not faults:
        try:
            cls(**{field: values[key] for key, (_, field) in fields.items()})
        except ArgumentError as error:
            faults.append(error)
    for problem in faults:  # a method names its parameter by the recipe's key
        key, colon, rest = problem.marked.partition(":")
        problems.add(ArgumentError(setting(key) + colon + rest if key in fields else problem.marked))


def _read_values(parameter: Parameter, method: str, text: Any, models: int, problems: Problems) -> Any:
    """One parameter's value, a tuple for a per-model one, from what was given or its default; REQUIRED where there is neither."""
    default = parameter.default
    if text is None and default is REQUIRED:
        problems.add(
            ArgumentError(
                f"{setting(parameter.key)}: {method} needs it: {parameter.expectation}. Add {setting(parameter.key)}."
            )
        )
        return REQUIRED
    fallback = (default,) * models if parameter.per_model and default is not REQUIRED else default
    if text is None:
        return fallback
    if parameter.is_switch or parameter.kind == "word":
        return text
    try:
        numbers = [_read_number(parameter, part) for part in str(text).split(",")]
    except ValueError:
        what = "numbers separated by commas" if parameter.per_model else "a number"
        problems.add(ArgumentError(f"{setting(parameter.key)}: expected {what}, got {text!r}."))
        return fallback
    if not parameter.per_model:
        if len(numbers) != 1:
            problems.add(ArgumentError(f"{setting(parameter.key)}: expected one number, got {text!r}."))
        return numbers[0]
    if len(numbers) not in (1, models):
        problems.add(
            ArgumentError(
                f"{setting(parameter.key)}: expected one number or {models}, one for each model, got {len(numbers)}: {text}."
            )
        )
        return fallback
    return tuple(numbers * models if len(numbers) == 1 else numbers)


def _read_number(parameter: Parameter, text: str) -> float | int:
    """A number as typed, an int for a whole one. Raises ValueError."""
    number = float(text)
    return int(number) if parameter.kind == "whole" and number.is_integer() else number
