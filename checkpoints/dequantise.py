"""Float8 weights with scales, read as the numbers that they stand for: `W = scale * q`, in float32.

A scale is one number, one for each output row, or one for each block of rows and columns:

    quantised by                      tensor               shape for a weight [out, in]
    DeepSeek, Qwen3 (fp8)             X.weight_scale_inv   [ceil(out / 128), ceil(in / 128)]; the config has the 128
    compressed-tensors, fbgemm        X.weight_scale       [], [1], [out] or [out, 1]; [out, in / group]
    ModelOpt (fp8)                    X.weight_scale       []

Scales of activations, which only a quantised forward pass needs, are no tensors of the model any more.

Source: transformers 5.19, `integrations/finegrained_fp8.py`, `integrations/fbgemm_fp8.py`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from checkpoints.problems import Problems
from checkpoints.reader import Checkpoint, WeightFile, read_tensor
from checkpoints.source import FLOAT8, FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from checkpoints.sidecars import SideFiles

CONFIG_KEYS = ("quantization_config", "compression_config")
CACHED_SCALES = 64

_ENDS = ("scale_inv", "scale")
_SCALE = re.compile(r"\.(weight|input|output|activation|[qkv]|kv)_scale(_inv|_ub)?$")


class DecodedWeights(ABC):
    """A checkpoint whose tensors are read as other numbers than its files hold; a `Weights`.

    Args:
        inner: the checkpoint.
    """

    tensors: Mapping[str, TensorInfo]

    def __init__(self, inner: Checkpoint):
        self.label, self.folder = inner.label, inner.folder
        self.files: Sequence[WeightFile] = inner.files
        self.modules = inner.modules
        self._inner = inner

    @property
    def is_here(self) -> bool:
        """See `Weights`."""
        return self._inner.is_here

    @abstractmethod
    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""

    def adjust(self, files: SideFiles) -> None:
        """See `Weights`: what it is read as is not quantised."""
        if "config.json" not in files:  # of a file by itself
            return
        config = files.read_json("config.json")
        files.write_json("config.json", {key: value for key, value in config.items() if key not in CONFIG_KEYS})

    def check_unchanged(self) -> None:
        """See `Weights`."""
        self._inner.check_unchanged()

    def close(self) -> None:
        """See `Weights`."""
        self._inner.close()


class DequantisedWeights(DecodedWeights):
    """A checkpoint whose float8 tensors are read multiplied with their scales; a `Weights`.

    Args:
        inner: the checkpoint.
        config: its config.json.

    Raises: Refusals: a float8 tensor without a scale, or with one of a shape that fits it in no known way.
    """

    def __init__(self, inner: Checkpoint, config: Mapping[str, Any]):
        super().__init__(inner)
        self._scales: dict[str, tuple[str, tuple[int, ...]]] = {}
        blocks = _block_size(config)
        saved_as = _plain_dtype(config)
        infos: dict[str, TensorInfo] = {}
        problems = Problems()
        own = {f"{name}_{end}" for name, info in inner.tensors.items() if info.dtype in FLOAT8 for end in _ENDS}
        for name, info in inner.tensors.items():
            if name in own or _SCALE.search(name):
                continue
            infos[name] = info
            if info.dtype not in FLOAT8:
                continue
            infos[name] = TensorInfo(torch.float32, info.shape, saved_as)
            scale = next((f"{name}_{end}" for end in _ENDS if f"{name}_{end}" in inner.tensors), None)
            if scale is None:
                problems.add(
                    f"{self.label}: {name}: expected {name}_scale or {name}_scale_inv beside it, got none. Use the unquantised model."
                )
                continue
            block = _fit(info.shape, inner.tensors[scale].shape, blocks)
            if block is None:
                problems.add(
                    f"{self.label}: {scale}: expected scales for shape {list(info.shape)}, got {list(inner.tensors[scale].shape)}. Use the unquantised model."
                )
                continue
            self._scales[name] = (scale, block)
        problems.raise_if_any()
        self.tensors = infos
        self._read_scale = lru_cache(CACHED_SCALES)(lambda name: read_tensor(inner, name).float())

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        if name not in self._scales:
            return self._inner.read(name, start, stop, buffer)
        out = buffer[: 4 * (stop - start)].view(torch.float32)
        out.copy_(self._inner.read(name, start, stop, torch.empty_like(buffer)))
        scale_name, block = self._scales[name]
        scale = self._read_scale(scale_name)
        return out.mul_(scale) if scale.numel() == 1 else out.mul_(self._spread(name, scale, block, start, stop))

    def _spread(self, name: str, scale: torch.Tensor, block: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """The scale of each element from `start` to `stop`: `[stop - start]` float32."""
        shape = self.tensors[name].shape
        scale = scale.view([-(-size // step) for size, step in zip(shape, block, strict=True)])
        columns = shape[-1]
        first, last = start // columns, -(-stop // columns)
        row = torch.arange(first, last)
        places: list[torch.Tensor] = []
        for size, step in zip(reversed(shape[:-1]), reversed(block[:-1]), strict=True):
            places.insert(0, row % size // step)
            row = row // size
        by_row = scale[tuple(places)]  # [rows, column blocks]
        spread = by_row.repeat_interleave(block[-1], dim=-1)[:, :columns].reshape(-1)
        return spread[start - first * columns : stop - first * columns]


def _fit(shape: Sequence[int], scale: Sequence[int], blocks: tuple[int, int] | None) -> tuple[int, ...] | None:
    """How many elements of each dimension share a scale; None where the shapes do not fit.

    Args:
        blocks: rows and columns of a block, where the config says so.
    """
    if all(size == 1 for size in scale):
        return tuple(shape)
    if len(scale) == len(shape) - 1 and list(scale) == list(shape[:-1]):
        return (*[1] * len(scale), shape[-1])
    if len(scale) != len(shape):
        return None
    steps: list[int] = []
    for place, (size, count) in enumerate(zip(shape, scale, strict=True)):
        stated = blocks[place - len(shape)] if blocks and place >= len(shape) - 2 else 0
        # The last block may be a part of one only where the config says how large the others are.
        step = stated if stated and -(-size // stated) == count else size // max(count, 1)
        if step < 1 or -(-size // step) != count or (size % step and step != stated):
            return None
        steps.append(step)
    return tuple(steps)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where a config says so, wherever it does."""
    match = re.search(r'"(?:weight_block_size|block_structure)": \[(\d+), (\d+)\]', json.dumps(config))
    return (int(match[1]), int(match[2])) if match else None


def _plain_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the config names for what is not quantised; bfloat16 where it names none."""
    inner = config.get("text_config") or {}
    named = [entry.get(key) for entry in (config, inner) for key in ("dtype", "torch_dtype")]
    return next((FLOAT_DTYPES[str(name)] for name in named if name in FLOAT_DTYPES), torch.bfloat16)
