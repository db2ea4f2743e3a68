"""Watch a model run: mean |x| and mean x² of every weight's input, per channel, by hooks on the modules themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aim.statistics import ChannelStatistics
from checkpoints.errors import InputError
from checkpoints.settings import setting

ROWS_AT_ONCE = 1024
"""Rows of an input that are turned to float32 at a time, which bounds the memory that watching takes."""
SUMMED_AT_ONCE = 32
"""Rows that are added up in float32, before their sum goes to float64."""


Key = tuple[str, str, int | None]
"""Module, parameter where it has several, expert."""


@dataclass(frozen=True)
class Target:
    """A checkpoint tensor whose input is watched.

    module: name of the module that multiplies the input with it; parameter: its name there, `weight` for most; width: input
    channels; expert: which expert of a fused parameter the tensor is; experts: number of experts where it holds all of them.
    """

    module: str
    parameter: str
    width: int
    expert: int | None = None
    experts: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether each row of the input goes to one expert of several."""
        return self.expert is not None or self.experts is not None

    def key(self, expert: int | None) -> Key:
        """Under which its input, of one expert where there are several, is summed."""
        return (self.module, self.parameter if self.is_expert else "", expert)


class _Sums:
    """Sums over rows, `[in]` float64 each, on the device of the module."""

    def __init__(self, width: int, device: torch.device):
        self.abs = torch.zeros(width, dtype=torch.float64, device=device)
        self.sq = torch.zeros(width, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, absolute: torch.Tensor, square: torch.Tensor, rows: int) -> None:
        self.abs = self.abs.to(absolute.device).add_(absolute)  # what was restored is on the CPU
        self.sq = self.sq.to(square.device).add_(square)
        self.rows += rows

    def statistics(self) -> ChannelStatistics:
        rows = max(1, self.rows)
        return ChannelStatistics(
            (self.abs / rows).float().cpu(), (self.sq / rows).float().cpu(), torch.tensor(self.rows)
        )


def channel_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum |x| and sum x² over all dimensions but the last, `[..., in]` -> `[in]` float64 twice."""
    rows = x.reshape(-1, x.shape[-1])
    absolute = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    square = torch.zeros_like(absolute)
    for piece in rows.split(ROWS_AT_ONCE):
        values = piece.to(torch.float32, copy=True).abs_()
        absolute += _column_sums(values)
        square += _column_sums(values.square_())
    return absolute, square


def _column_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums over rows, `[rows, in]` float32 -> `[in]` float64.

    A product with ones adds up columns faster than a sum does, but is off by 1e-6 after some hundred rows: so it adds
    `SUMMED_AT_ONCE` rows, which lie `groups` apart, and float64 does the rest.
    """
    groups = len(values) // SUMMED_AT_ONCE
    whole = values[: groups * SUMMED_AT_ONCE].view(SUMMED_AT_ONCE, groups * values.shape[1])
    partial = (values.new_ones(1, SUMMED_AT_ONCE) @ whole).view(groups, values.shape[1])
    total = partial.sum(dim=0, dtype=torch.float64)
    rest = values[groups * SUMMED_AT_ONCE :]
    return total + rest.sum(dim=0, dtype=torch.float64) if len(rest) else total


class Watcher:
    """Collects statistics while the model runs under `watching`.

    Args:
        model: any module tree; its forward is not changed.
        targets: checkpoint tensor -> where its input shows up.
    """

    def __init__(self, model: torch.nn.Module, targets: Mapping[str, Target]):
        self._model = model
        self._targets = targets
        self._sums: dict[Key, _Sums] = {}
        self._last: tuple[torch.Tensor, int, torch.Tensor, torch.Tensor] | None = None
        self._experts = _ExpertWatch(self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the hooks on for the length of the context."""
        plain = {target.module for target in self._targets.values() if not target.is_expert}
        fused = {target.module for target in self._targets.values() if target.is_expert}
        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in sorted(plain)
        ]
        for name in sorted(fused):
            module = self._model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._experts.entering(name)))
            handles.append(module.register_forward_hook(self._experts.leaving, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _hook(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(
                (
                    value
                    for value in (*args, *kwargs.values())
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                ),
                None,
            )
            if x is not None:
                self.observe((name, "", None), x)

        return hook

    def observe(self, key: Key, x: torch.Tensor) -> None:
        """Add an input `[..., in]` of (module, parameter, expert); one that several modules share is summed once."""
        if not x.numel():
            return
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            # Holding x keeps its memory from being reused, so identity means the same numbers.
            self._last = (x, x._version, *channel_sums(x.detach()))
        if key not in self._sums:
            self._sums[key] = _Sums(x.shape[-1], x.device)
        if x.shape[-1] == self._sums[key].abs.numel():
            self._sums[key].add(self._last[2], self._last[3], x.numel() // x.shape[-1])

    def sums(self) -> dict[str, torch.Tensor]:
        """All that has been added up, under names that `restore` knows."""
        found: dict[str, torch.Tensor] = {}
        for place, (key, sums) in enumerate(self._sums.items()):
            name = json.dumps([place, *key])
            found |= {f"{name}.abs": sums.abs, f"{name}.sq": sums.sq, f"{name}.rows": torch.tensor(sums.rows)}
        return found

    @staticmethod
    def check_sums(tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError where this is not what `sums` gave, but somebody else wrote it."""
        for name in {name.rpartition(".")[0] for name in tensors if not name.endswith(".means")}:
            key = json.loads(name)
            place, module, parameter, expert = key if isinstance(key, list) and len(key) == 4 else (None,) * 4
            is_key = type(place) is int and isinstance(module, str) and isinstance(parameter, str)
            parts = [tensors.get(f"{name}.{part}") for part in ("abs", "sq", "rows")]
            if not (is_key and (expert is None or type(expert) is int)) or not all(part is not None for part in parts):
                raise ValueError(f"{name}: no sums of a module's input")
            absolute, square, rows = (part for part in parts if part is not None)
            if absolute.shape != square.shape or absolute.ndim != 1 or rows.numel() != 1 or rows.is_floating_point():
                raise ValueError(f"{name}: sums that do not fit each other")
            if {absolute.dtype, square.dtype} != {torch.float64}:
                raise ValueError(f"{name}: expected float64")

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what another watcher's `sums` gave."""
        names = sorted((name.removesuffix(".abs") for name in tensors if name.endswith(".abs")), key=json.loads)
        for name in names:
            _, module, parameter, expert = json.loads(name)
            sums = _Sums(tensors[f"{name}.abs"].numel(), torch.device("cpu"))
            sums.add(tensors[f"{name}.abs"], tensors[f"{name}.sq"], int(tensors[f"{name}.rows"]))
            self._sums[module, parameter, expert] = sums

    def check_finite(self) -> None:
        """Raise InputError where an input held NaN or an infinity, naming the first such module of the forward pass."""
        for (module, _, _), sums in self._sums.items():  # in the order in which they were first seen
            if not bool(sums.sq.isfinite().all()):
                raise InputError(
                    f"{module}: its input holds NaN or an infinity, the first to do so. Use {setting('calibration.dtype', 'float32')}, or check the base model."
                )

    def results(self) -> tuple[dict[str, ChannelStatistics], dict[str, str]]:
        """Statistics per checkpoint tensor, and for each tensor without any the reason.

        Raises: InputError: an input that holds NaN or an infinity, naming the module.
        """
        self.check_finite()
        found: dict[str, ChannelStatistics] = {}
        silent: dict[str, str] = {}
        for tensor, target in self._targets.items():
            experts = range(target.experts) if target.experts is not None else [target.expert]
            sums = [self._sums.get(target.key(expert)) for expert in experts]
            seen = [one for one in sums if one is not None]
            if not seen:
                silent[tensor] = "its module saw no token"
                continue
            if seen[0].abs.numel() != target.width:
                silent[tensor] = f"its module's input has {seen[0].abs.numel()} channels, the weight {target.width}"
                continue
            parts = [(one or _Sums(target.width, torch.device("cpu"))).statistics() for one in sums]
            stacked = ChannelStatistics(
                *(torch.stack([getattr(part, key) for part in parts]) for key in ("mean_abs", "mean_sq", "tokens"))
            )
            one = stacked if target.experts is not None else parts[0]
            if not bool(one.mean_abs.any()):
                silent[tensor] = "its module's input is zero throughout"
                continue
            found[tensor] = one
        return found, silent


class _ExpertWatch(TorchFunctionMode):
    """Watches experts, which share one module: the products with slices of its fused parameters, while its forward runs.

    The module must compute expert by expert (transformers' `eager` implementation), as in
    `linear(x, gate_up_proj[e])`, or `x @ gate_up_proj[e]` where weights are stored input first.
    """

    PRODUCTS = (
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.Tensor.mm,
    )

    def __init__(self, watcher: Watcher):
        super().__init__()
        self._watcher = watcher
        self._name = ""
        self._module = torch.nn.Module()

    def entering(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            self._name, self._module = name, module
            self.__enter__()  # type: ignore[no-untyped-call]

        return hook

    def leaving(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].ndim == 2:
            storage = args[1].untyped_storage().data_ptr()
            # Looked up here and not on entering: an offloaded module has no numbers before its forward.
            for key, parameter in self._module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.untyped_storage().data_ptr() == storage:
                    expert = (args[1].storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                    self._watcher.observe((self._name, key, expert), args[0])
        return func(*args, **(kwargs or {}))
