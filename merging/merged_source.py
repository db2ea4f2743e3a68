"""The merge so far as a source of tensors: what a pass reads that runs the merged model while it is being made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from checkpoints.source import Source, TensorInfo, TensorRef
from streaming.blocks import Block, Region
from streaming.stream import Output, PlannedTensor, StreamOptions, stream


class MergedSource:
    """Merged tensors under the names that one model has for them, in float32; a `checkpoints.source.Source`.

    A layer's tensors are merged whole when `hold` is told how; all others, an embedding say, element by element as they are read.

    Args:
        own: the model's tensors.
        tensors: what is planned.
        index: of the model among their inputs.
        options: of the stream.

    Attributes:
        label: as messages name it.
        tensors: the model's names, with the shapes of what is merged.
    """

    def __init__(self, own: Source, tensors: Sequence[PlannedTensor], index: int, options: StreamOptions):
        self.label = f"the merge of {own.label} and others"
        self._own, self._options = own, options
        self._planned = {_name(tensor, index, own): tensor for tensor in tensors}
        self._names = {tensor.spec.name: name for name, tensor in self._planned.items()}
        self._held: dict[str, torch.Tensor] = {}
        merged = {
            name: TensorInfo(torch.float32, tensor.spec.shape)
            for name, tensor in self._planned.items()
            if tensor.method is not None
        }
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({**own.tensors, **merged})

    def hold(self, merged: Mapping[str, torch.Tensor]) -> None:
        """Have a layer's merged tensors there, by the names of the output, `[numel]` float32 each; those of the last one are dropped."""
        self._held = {self._names[name]: values for name, values in merged.items()}

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        if name in self._held:
            return self._held[name][start:stop]
        tensor = self._planned.get(name)
        if tensor is None or tensor.method is None:
            return self._own.read(name, start, stop, buffer)
        region = Region(tensor.spec, start, stop)
        base = _floats(tensor.base, region)
        block = Block(region, base, [_floats(ref, region) - base for ref in tensor.inputs], [])
        return tensor.method.combine(block, None)


def merged_whole(tensors: Sequence[PlannedTensor], options: StreamOptions) -> dict[str, torch.Tensor]:
    """Merge some tensors in memory: name -> `[numel]` float32 on the CPU."""
    memory = _Memory({tensor.spec.name: torch.empty(tensor.spec.numel) for tensor in tensors})
    stream([replace(tensor, dtype=torch.float32) for tensor in tensors], [Output(memory)], options=options)
    return memory.tensors


class _Memory:
    """Takes what a stream writes; see `streaming.stream.Writer`."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        self.tensors[name][start : start + len(values)] = values


def _name(tensor: PlannedTensor, index: int, own: Source) -> str:
    """What a model calls an output tensor."""
    if index < len(tensor.inputs) and tensor.inputs[index].name in own.tensors:
        return tensor.inputs[index].name
    return tensor.spec.name


def _floats(ref: TensorRef, region: Region) -> torch.Tensor:
    """A region's numbers, float32."""
    return ref.read(region.start, region.stop, torch.empty(region.numel * 8, dtype=torch.uint8)).to(torch.float32)
