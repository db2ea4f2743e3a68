"""A model without its weights, whose parts get them from the checkpoint when they run, and let go of them afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoints.conversions import Conversion
from checkpoints.model import Model
from checkpoints.reader import read_tensor
from forward.loading import class_of, config_of, has_caps


def build_skeleton(base: Model, dtype: torch.dtype, *, exact_caps: bool = True) -> Any:
    """The model that `forward.loading.load` would load to run in a dtype: parameters on the meta device, buffers with their numbers."""
    from accelerate import init_empty_weights
    from transformers import initialization

    build = class_of(base)
    make: Callable[..., Any] = getattr(build, "_from_config", None) or build.from_config
    with initialization.no_init_weights(), init_empty_weights(include_buffers=False):
        try:
            model = make(_plain_config(base), dtype=dtype, attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model = make(_plain_config(base), dtype=dtype)
    if has_caps(model) and exact_caps:
        model.set_attn_implementation("eager")
    model.tie_weights()
    return model.eval()


def _plain_config(base: Model) -> Any:
    """A new config each time, as a constructor that fails leaves its mark on it."""
    config = config_of(base)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of weights that are plain numbers by now
    return config


class Weights:
    """Reads what a part of a skeleton holds straight from the checkpoint.

    Args:
        base: the checkpoint.
        model: its skeleton, which has the dtype of the pass.
        device: where the weights go.
    """

    def __init__(self, base: Model, model: Any, device: torch.device):
        self._base, self._model, self._device = base, model, device
        self._dtype = model.dtype
        names = {name: info.shape for name, info in base.weights.tensors.items()}
        self._conversion = Conversion(model, names)
        self._sources: dict[int, str] = {}  # id of a parameter or buffer -> the group that makes it
        owners = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        for target in self._conversion.targets:
            for name in self._conversion.made(target):
                if name in owners:
                    self._sources.setdefault(id(owners[name]), target)
        self._names = {id(owner): name for name, owner in reversed(owners.items())}
        self._wide = {
            re.compile(pattern)
            for pattern, dtype in getattr(model, "_get_dtype_plan", lambda dtype: {})(self._dtype).items()
            if dtype == torch.float32
        }
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
        self._ahead: dict[int, Future[dict[str, torch.Tensor]]] = {}

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def read_ahead(self, part: nn.Module) -> None:
        """Begin to read what a part will need, into the machine's memory."""
        if id(part) not in self._ahead:
            self._ahead[id(part)] = self._reader.submit(self._read, list(_owned(part)))

    @contextmanager
    def loaded(self, part: nn.Module, *, recurse: bool = True) -> Iterator[None]:
        """Have a part's parameters and buffers there for the length of the context."""
        undo = self.load(part, recurse=recurse)
        try:
            yield
        finally:
            undo()

    def load(self, part: nn.Module, *, recurse: bool = True) -> Callable[[], None]:
        """Read a part's parameters and buffers from the checkpoint. Returns: what lets go of them again."""
        owned = list(_owned(part, recurse))
        waiting = self._ahead.pop(id(part), None) if recurse else None
        stored = waiting.result() if waiting else self._read(owned)
        made = self._make(owned, stored)
        undo: list[tuple[Any, str, torch.Tensor]] = []
        for module in part.modules() if recurse else [part]:
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for own in holders:
                for leaf, old in list(own.items()):
                    if old is None or id(old) not in made:
                        continue
                    undo.append((own, leaf, old))
                    own[leaf] = made[id(old)]

        def let_go() -> None:
            for own, leaf, old in undo:
                own[leaf] = old

        return let_go

    def rows(self, parameter: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding, `[...]` indices -> `[..., width]`, read one by one."""
        name = self._conversion.plain_source(self._sources[id(parameter)])
        if name is None:  # fused or turned on the way: then all of it
            table = self._make([parameter], self._read([parameter]))[id(parameter)]
            return nn.functional.embedding(indices, table)
        info = self._base.weights.tensors[name]
        width = info.shape[1]
        wanted, places = indices.cpu().unique(return_inverse=True)
        buffer = torch.empty(width * 8, dtype=torch.uint8)
        read = [
            self._base.weights.read(name, row * width, (row + 1) * width, buffer).clone() for row in wanted.tolist()
        ]
        table = torch.stack(read).to(info.plain_dtype)
        return self._cast(table, self._names[id(parameter)])[places.to(self._device)]

    def _read(self, owned: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors that make these parameters and buffers."""
        targets = {self._sources[id(tensor)] for tensor in owned if id(tensor) in self._sources}
        names = [name for target in sorted(targets) for name in self._conversion.sources(target)]
        weights = self._base.weights
        return {name: read_tensor(weights, name).to(weights.tensors[name].plain_dtype) for name in names}

    def _make(self, owned: Collection[torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        """What the stored tensors become, by the id of the parameter or buffer whose place it takes; `stored` is emptied."""
        wanted = {self._names[id(one)]: one for one in owned}
        made: dict[int, torch.Tensor] = {}
        for target in dict.fromkeys(self._sources[id(tensor)] for tensor in owned if id(tensor) in self._sources):
            parts = {name: stored.pop(name) for name in self._conversion.sources(target)}
            for name, tensor in self._conversion.make(target, parts).items():
                old = wanted.get(self._same(name))
                if old is not None:
                    moved = self._cast(tensor, name)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return made

    def _same(self, name: str) -> str:
        """The name under which a parameter is known here, of several that it has."""
        owner: Any = self._model
        for step in name.split("."):
            owner = getattr(owner, step)
        stored: str = self._names.get(id(owner), name)
        return stored

    def _cast(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        if any(pattern.search(name) for pattern in self._wide):
            dtype = torch.float32
        return tensor.to(device=self._device, dtype=dtype).contiguous()


class RowReader(TorchFunctionMode):
    """Looks up rows of embeddings that are not loaded, in the checkpoint."""

    def __init__(self, weights: Weights):
        super().__init__()
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            indices, table = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
            if table.device.type == "meta":
                return self._weights.rows(table, indices)
        return func(*args, **(kwargs or {}))


def _owned(part: nn.Module, recurse: bool = True) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    for tensor in (*part.parameters(recurse=recurse), *part.buffers(recurse=recurse)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
