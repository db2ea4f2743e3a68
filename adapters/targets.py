"""What becomes of each tensor of a base in an adapter: two factors, the whole tensor, or nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoints.errors import ArgumentError
from checkpoints.placements import Placement
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.source import TensorInfo

How = Literal["factors", "whole", "lost"]
ALL, BIAS = "all", "bias"
PRODUCTS = ("linear", "conv1d")
"""Kinds of placements that multiply the input with a matrix of their own."""
PREFIX = "base_model.model."
"""What peft puts before the names of modules."""


@dataclass(frozen=True)
class Target:
    """What becomes of one tensor.

    Attributes:
        name: in the base's files.
        parameter: in the model.
        how: it goes into the adapter, where it was changed.
        turned: whether it is stored input first, `[in, out]`.
        as_bias: whether it is stored as a trained bias, and not as a part of a whole module.
        why: it is lost, for people; empty where it is not.
        can_be_whole: whether a tensor that is lost could be stored whole.
    """

    name: str
    parameter: str
    how: How
    turned: bool = False
    as_bias: bool = False
    why: str = ""
    can_be_whole: bool = False

    @property
    def module(self) -> str:
        """Dotted name of the module that holds it."""
        return self.parameter.rpartition(".")[0]


def find_targets(
    tensors: dict[str, TensorInfo], placements: dict[str, Placement], save_whole: Sequence[str]
) -> list[Target]:
    """Say what becomes of each tensor.

    Args:
        tensors: of the base, those that a fine-tune may change.
        placements: where each ends up in the model; a tensor without one is lost.
        save_whole: see `LoraChoice`.

    Raises: Refusals: a name of `save_whole` that fits no module.
    """
    modules = {placement.module for placement in placements.values()}
    problems = Problems()
    for name in save_whole:
        if name not in (ALL, BIAS) and not any(_ends_with(module, name) for module in modules):
            near = difflib.get_close_matches(name, {module.rpartition(".")[2] for module in modules}, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            problems.add(
                ArgumentError(
                    f"{setting('modules_to_save', name)}: expected the end of the name of a module of the base, got no such one.{hint} Name a module."
                )
            )
    problems.raise_if_any()
    products = {placement.module for placement in placements.values() if placement.kind in PRODUCTS}
    return [_target(name, info, placements.get(name), save_whole, products) for name, info in tensors.items()]


def _target(
    name: str, info: TensorInfo, placement: Placement | None, save_whole: Collection[str], products: Collection[str]
) -> Target:
    if placement is None:
        return Target(name, name, "lost", why="no parameter of the model")
    # A tensor that is one parameter as it stands; peft knows no other.
    is_plain = placement.expert is None and not placement.others and placement.start == 0
    parameter, kind = placement.parameter, placement.kind
    if not is_plain or kind == "experts":
        return Target(name, parameter, "lost", why="a part of a fused parameter, which no plain adapter changes")
    if any(_ends_with(placement.module, end) for end in save_whole):
        return Target(name, parameter, "whole")
    if kind in PRODUCTS and len(info.shape) == 2 and parameter.endswith(".weight"):
        return Target(name, parameter, "factors", turned=kind == "conv1d")
    # A bias of what is not whole; of a module with factors, it cannot be.
    is_apart = kind == "bias" and (placement.module in products or ALL not in save_whole)
    if ALL in save_whole or (is_apart and BIAS in save_whole):
        return Target(name, parameter, "whole", as_bias=is_apart)
    by = BIAS if kind == "bias" else placement.module.rpartition(".")[2]
    why = f"no matrix product; {setting('modules_to_save', by)} keeps it whole"
    return Target(name, parameter, "lost", why=why, can_be_whole=True)


def _ends_with(module: str, end: str) -> bool:
    return f".{module}".endswith(f".{end}")


def short_names(chosen: Collection[str], modules: Collection[str]) -> list[str]:
    """Names of modules as peft's config has them: their last part, where no other module's name ends so, else the whole name.

    Args:
        chosen: dotted names.
        modules: of every module that has weights.
    """
    others = set(modules) - set(chosen)

    def short(name: str) -> str:
        end = name.rpartition(".")[2]
        return name if any(other.endswith(end) for other in others) else end

    return sorted(set(map(short, chosen)))
