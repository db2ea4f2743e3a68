"""A sweep: one merge for each value of lambda, of density, or of both, planned side by side and written from one reading."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace

from checkpoints.errors import ArgumentError, InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.save_path import SWEEP_PREFIXES
from checkpoints.settings import Remark, setting
from merging.merge_work import Merge, card_head, card_text, make_work
from merging.plan import make_plan
from merging.recipe import Recipe
from streaming.output import RunOptions
from streaming.values import Value
from streaming.work import Variant

SWEPT = {"lambdas": "lambda", "densities": "density"}
"""Setting of a sweep -> the parameter that it goes through."""


def read_sweep(given: Mapping[str, str | None], recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of a sweep by the folder that each is written to; empty where none is asked for.

    Args:
        given: `lambdas` and `densities` as typed, numbers separated by commas.
        recipe: what is merged; the values take the place of its own.

    Raises: Refusals: no numbers, numbers that the method cannot have, twice the same.
    """
    problems = Problems()
    values: dict[str, list[float]] = {}
    declared = recipe.method_class.parameters()
    for name, text in given.items():
        if text is None:
            continue
        key = SWEPT[name]
        with problems.collect():
            if key not in declared:
                raise ArgumentError(f"{setting(name)}: {recipe.merge_method} has no {key}. Leave it out.")
            values[key] = _numbers(name, text)
            for number in values[key]:
                try:
                    declared[key][0].check(number, place=False)
                except InputError as error:
                    raise ArgumentError(f"{setting(name)}: {error.marked}") from None
    problems.raise_if_any()
    recipes: dict[str, Recipe] = {}
    for numbers in itertools.product(*values.values()) if values else ():
        chosen = dict(zip(values, numbers, strict=True))
        folder = "_".join(f"{key}_{number:g}" for key, number in chosen.items())
        assert folder.startswith(SWEEP_PREFIXES)
        recipes[folder] = functools.reduce(_with, chosen.items(), recipe)
    return recipes


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{setting(name)}: expected numbers separated by commas, got {text!r}.") from None
    if len({f"{number:g}" for number in numbers}) < len(numbers):
        raise ArgumentError(f"{setting(name)}: expected different numbers, got {text}. Leave one out.")
    return numbers


def _with(recipe: Recipe, chosen: tuple[str, float]) -> Recipe:
    """A recipe with one number for a parameter, for all models, layers and tensors."""
    key, number = chosen
    value = Value.constant(number)
    per_model = recipe.method_class.parameters()[key][0].per_model

    def without(values: Mapping[str, Value]) -> dict[str, Value]:
        return {name: one for name, one in values.items() if name != key}

    slices = tuple(
        replace(
            part,
            parameters=without(part.parameters),
            sources=tuple(
                replace(source, parameters={**without(source.parameters), **({key: value} if per_model else {})})
                for source in part.sources
            ),
        )
        for part in recipe.slices
    )
    parameters = {**without(recipe.parameters), **({} if per_model else {key: value})}
    return replace(recipe, parameters=parameters, slices=slices)


def make_sweep(recipes: Mapping[str, Recipe], opened: list[Model], options: RunOptions) -> Merge:
    """Plan all merges of a sweep of opened models as one work.

    Args:
        recipes: folder -> recipe; they differ in parameters alone.

    Raises: Refusals: everything that does not fit.
    """
    first = next(iter(recipes.values()))
    work = make_work(first, opened, options)
    work.plan.notes.append(Remark(f"{len(recipes)} merges are written from one reading."))
    if work.moments is not None and work.moments.is_merged:
        raise ArgumentError(
            f"{setting('inputs', 'merged')}: runs every model behind the layers of one merge, so that a sweep cannot have it. Leave one out."
        )
    plans = {
        folder: make_plan(recipe, opened, max_shard_bytes=options.max_shard_bytes) for folder, recipe in recipes.items()
    }
    work.card = card_head(first, opened)
    work.decides = {**work.decides, "sweep": {folder: recipe.as_json() for folder, recipe in recipes.items()}}
    work.sweep = tuple(
        Variant(
            folder=folder,
            details=plan.recipe.as_json,
            card=card_text(plan.recipe),
            methods={tensor.spec.name: tensor.method for tensor in plan.tensors},
        )
        for folder, plan in plans.items()
    )
    return work
