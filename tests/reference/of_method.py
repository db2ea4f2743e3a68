"""What a method's test file says of it, so that the tests of all methods hold it to its formula.

`tests/test_method_<module>.py` has `REFERENCES`: the name of each method of `merging/methods/<module>.py` -> `Reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT32_STEP = 2.0**-24
Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class Reference:
    """A method in plain float64, written from its source alone, and how far float32 may be from it.

    A formula is `f(base, models, *, is_embedding, **arguments) -> float64 tensor`. Arguments are the fields of the method's class
    by name (`density`, `gamma` and `epsilon` for the plural ones), one number for each model where there is one.

    Attributes:
        formula: one whole tensor at a time, slow on purpose; imports nothing of `merging`.
        slack: `(base, models, result, **arguments)` -> a bound on the error of float32 arithmetic, float64, element by element.
        arguments: settings that tell every model from every other, for the tests of all methods; three models.
        single: settings under which a single model is itself to the bit; None where there are none.
        unclear: `(base, models, **arguments)` -> where float32 may decide otherwise (a sign, a threshold), bool.
        prepare: `(method, tensor, base, models, arguments)` -> arguments, with what the formula needs besides (masks).
        in_weights: the formula is a sum of weights, not the base plus a sum of task vectors.
        misplaced: a formula with the models in each other's places; None where the method knows no order or merges one model.
        jumps: one last bit may change much more (a rank, a threshold), as between a CPU and a GPU.
    """

    formula: Formula
    slack: Callable[..., Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    single: Mapping[str, Any] | None = field(default_factory=dict)
    unclear: Callable[..., Tensor] | None = None
    prepare: Callable[..., dict[str, Any]] | None = None
    in_weights: bool = False
    misplaced: Formula | None = None
    jumps: bool = False

    def flipped(self) -> Formula:
        """The formula with the sign of what it adds turned, or of everything: a comparison must notice."""
        if self.in_weights:
            return lambda base, models, **arguments: -self.formula(base, models, **arguments)
        return lambda base, models, **arguments: 2 * base.double() - self.formula(base, models, **arguments)


def shifted(formula: Formula) -> Formula:
    """A formula with every model in another one's place: a comparison must notice."""
    return lambda base, models, **arguments: formula(base, [*models[1:], models[0]], **arguments)


def by_steps(steps: int, growth: float = 1.0) -> Callable[..., Tensor]:
    """A bound for methods that only add up: so many roundings of everything that takes part.

    Args:
        steps: roundings one after the other; growth: what a task vector is multiplied with at most.
    """

    def slack(base: Tensor, models: Sequence[Tensor], result: Tensor, **arguments: object) -> Tensor:
        reach = torch.stack([(model.double() - base.double()).abs() for model in models]).sum(dim=0)
        return steps * FLOAT32_STEP * (growth * reach + base.double().abs())

    return slack


def find(name: str) -> Reference:
    """The reference of a method of METHODS. Raises KeyError saying what to add where there is none."""
    from merging.methods import METHODS

    test = f"tests.test_method_{METHODS[name].target.partition(':')[0]}"
    try:
        found: Reference = importlib.import_module(test).REFERENCES[name]
    except (ModuleNotFoundError, AttributeError, KeyError) as error:
        raise KeyError(
            f"{test.replace('.', '/')}.py: expected REFERENCES with {name!r}, got {error}. Add it."
        ) from error
    return found
