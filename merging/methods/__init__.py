"""The merging methods, one per file. Importing this package imports no torch: `--help` lists them at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from checkpoints.errors import ArgumentError, unknown

if TYPE_CHECKING:
    from merging.methods.contract import Method

METHODS = {
    "linear": "linear:Linear",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "ties": "ties:Ties",
    "dare_linear": "dare:DareLinear",
    "dare_ties": "dare:DareTies",
    "widen": "widen:Widen",
}
"""Name in recipes and flags -> module here and class in it."""


def get_method(name: str) -> type[Method]:
    """The class of the method `name`, in any case. Raises ArgumentError naming the nearest one where there is none."""
    if name.lower() not in METHODS:
        raise ArgumentError(f"--method: {unknown('method', name, METHODS)}")
    module, _, cls = METHODS[name.lower()].partition(":")
    found: type[Method] = getattr(importlib.import_module(f"merging.methods.{module}"), cls)
    return found
