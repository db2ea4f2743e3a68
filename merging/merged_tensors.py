"""A merge as a source: its tensors, computed as they are read, in float32, and written nowhere."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from checkpoints.source import TensorInfo
from streaming.stream import Output, PlannedTensor, StreamOptions, Transform, stream

HELD = 2
"""Tensors that are held after they were read: whoever reads one piece by piece asks for the same again."""


class MergedTensors:
    """The tensors of a planned merge; a `Source`.

    Args:
        label: how messages name it.
        tensors: as planned; those without a method are the base's.
        options: of the stream.
        transform: what becomes of the merge (AIM).
    """

    def __init__(
        self,
        label: str,
        tensors: Sequence[PlannedTensor],
        options: StreamOptions,
        transform: Transform | None = None,
    ):
        self.label, self._options, self._transform = label, options, transform
        self._planned = {tensor.spec.name: tensor for tensor in tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(torch.float32, tensor.spec.shape, tensor.dtype) if tensor.method else tensor.base.info
            for name, tensor in self._planned.items()
        }
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        tensor = self._planned[name]
        if tensor.method is None:
            return tensor.base.read(start, stop, buffer)
        with self._lock:
            if name not in self._held:
                whole = _Whole(tensor.spec.numel)
                stream([replace(tensor, dtype=torch.float32)], [Output(whole, self._transform)], options=self._options)
                self._held[name] = whole.values
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            return self._held[name][start:stop]


class _Whole:
    """One tensor in memory; a `streaming.stream.Writer`."""

    def __init__(self, numel: int):
        self.values = torch.empty(numel, dtype=torch.float32)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put numbers at their place."""
        self.values[start : start + len(values)].copy_(values)
