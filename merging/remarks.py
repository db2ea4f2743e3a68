"""Warn of parameters that do nothing, or more than they seem to, before a recipe is carried out."""

from __future__ import annotations

import math
from typing import Any

from merging.recipe import Recipe


def remarks(recipe: Recipe) -> list[str]:
    """One sentence or two for each thing a user may not have meant; only of values that hold for every tensor."""
    values = _constants(recipe)
    cls = recipe.method_class
    weights, densities, lambda_ = values.get("weight", []), values.get("density", []), values.get("lambda", [1.0])
    lines = []
    if lambda_ == [0.0]:
        lines.append("lambda 0: nothing of the task vectors is added, and the output is the base.")
    if weights and not any(weights):
        lines.append("weight 0 for every model: the output is the base.")
    if densities and not any(densities):
        lines.append("density 0: every change is dropped, and the output is the base.")
    elif densities and all(density == 1.0 for density in densities):
        lines.append(f"density 1: {recipe.merge_method} drops and trims nothing.")
    total = math.fsum(weights)
    if not weights or values.get("normalize") == [True] or not any(weights):
        return lines
    if not cls.reads_base and cls.additive and not math.isclose(total, 1.0):
        lines.append(
            f"weights that sum to {total:g} without normalize: the output is {total:g} times a mean of the models."
        )
    elif cls.reads_base and total <= 0:
        lines.append(f"weights that sum to {total:g}: the task vectors are subtracted as much as added.")
    elif cls.reads_base and len(lambda_) == 1 and total * lambda_[0] > len(weights):
        size = total * lambda_[0]
        lines.append(
            f"weights times lambda sum to {size:g} for {len(weights)} models: task vectors are added more than once each, "
            "which mostly goes too far. Look at |merge|/|b| in the report."
        )
    return lines


def _constants(recipe: Recipe) -> dict[str, list[Any]]:
    """Recipe key -> its value, or one for each model; without those that differ between tensors or slices."""
    if len(recipe.slices) > 1:
        return {}
    (part,) = recipe.slices
    constants: dict[str, list[Any]] = {}
    for key, (parameter, _) in recipe.method_class.parameters().items():
        chains = [(source.parameters, part.parameters, recipe.parameters) for source in part.sources]
        chains = chains if parameter.per_model else chains[:1]
        values = [next((values[key] for values in chain if key in values), None) for chain in chains]
        if all(value is not None and value.is_constant for value in values):
            constants[key] = [value.as_json() for value in values if value is not None]
    return constants
