"""The merging methods, one per file. Importing this package imports no torch: `--help` lists them at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import setting

if TYPE_CHECKING:
    from merging.methods.contract import Method


class Entry(NamedTuple):
    """One method: `module:Class` in this package, and the defaults of its parameters by recipe key."""

    target: str
    defaults: dict[str, Any]


# `rescale` is None by default: the method's own rule, which its card states.
METHODS = {
    "linear": Entry("linear:Linear", {"weight": 1.0, "normalize": True}),
    "task_arithmetic": Entry("task_arithmetic:TaskArithmetic", {"weight": 1.0, "lambda": 1.0, "normalize": False}),
    "ties": Entry("ties:Ties", {"weight": 1.0, "density": 0.5, "lambda": 1.0, "normalize": True, "rescale": None}),
    "dare_linear": Entry("dare:DareLinear", {"weight": 1.0, "density": 0.5, "lambda": 1.0, "normalize": False, "rescale": None}),
    "dare_ties": Entry("dare:DareTies", {"weight": 1.0, "density": 0.5, "lambda": 1.0, "normalize": False, "rescale": None}),
    "widen": Entry("widen:Widen", {"widen_ratio": 1.0, "widen_calibration": 1.0}),
    "breadcrumbs": Entry("breadcrumbs:Breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.01, "lambda": 1.0, "normalize": False, "rescale": None}),
    "breadcrumbs_ties": Entry("breadcrumbs:BreadcrumbsTies", {"weight": 1.0, "density": 0.5, "gamma": 0.01, "lambda": 1.0, "normalize": False, "rescale": None}),
    "della": Entry("della:Della", {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "lambda": 1.0, "normalize": True, "rescale": None}),
    "della_linear": Entry("della:DellaLinear", {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "lambda": 1.0, "normalize": False, "rescale": None}),
    "sce": Entry("sce:Sce", {"select_topk": 1.0}),
    "model_stock": Entry("model_stock:ModelStock", {"filter_wise": False}),
    "slerp": Entry("slerp:Slerp", {"t": 0.5}),
    "nuslerp": Entry("nuslerp:NuSlerp", {"weight": 1.0, "nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "karcher": Entry("karcher:Karcher", {"max_iter": 10, "tol": 1e-5}),
    "passthrough": Entry("passthrough:Passthrough", {"scale": 1.0}),
}  # fmt: skip
"""Name in recipes and flags -> where the method is and the defaults of its parameters."""


def get_method(name: str) -> type[Method]:
    """The class of the method `name`, in any case. Raises ArgumentError naming the nearest one where there is none."""
    if name.lower() not in METHODS:
        raise ArgumentError(f"{setting('method')}: {unknown('method', name, METHODS)}")
    module, _, cls = METHODS[name.lower()].target.partition(":")
    found: type[Method] = getattr(importlib.import_module(f"merging.methods.{module}"), cls)
    return found
