"""Second moments of models' inputs in files, taken once for many merges of the same models, and mapped when a matrix is merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.safetensors_format import save_tensors
from merging.input_moments import MomentsPass
from merging.methods.regmean import InputMoments, Projected, RegMean, add_merged, part_of
from streaming.blocks import Block, Scan, TensorSpec
from streaming.stream import PlannedTensor

DONE = "complete.json"
"""The file that is written when all layers' are."""
NUMBERS = "numbers"
"""Metadata of a layer's file: of each tensor the number of every model's moments, null where it saw no input."""


@dataclass(frozen=True)
class WithMoments(RegMean):
    """RegMean of a matrix whose moments are fetched when it is merged; the merged task vector is what it measures, so that another lambda
    can have it too.

    Attributes:
        projected: fetches the moments, and makes what merges the matrix.
    """

    name: ClassVar[str] = ""
    unmeasured: ClassVar[tuple[str, ...]] = ("lambda_", "rest_lambda", "projected")

    projected: Callable[[RegMean], Projected] = field(kw_only=True)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """The merged task vector of the whole tensor, `[matrices, rows, columns]` float64."""
        return self.projected(self).merged(tensor, scan)

    def combine(self, block: Block, statistics: torch.Tensor) -> torch.Tensor:
        """See `Method.combine`."""
        return add_merged(block, part_of(block, statistics), self.lambda_)


class KeptMoments:
    """The moments of a pass in a folder, a file for each layer.

    Args:
        moments: the pass, checked, whose tensors are those of any merge to come.

    Attributes:
        nbytes: what the files take at most: as if no two weights shared an input.
        layers: how many the models have.
    """

    def __init__(self, moments: MomentsPass):
        self._pass = moments
        layer_of = moments.layer_of()
        self.layers = 1 + max(layer_of.values(), default=-1)
        self._planned = {tensor.spec.name: tensor for tensor in moments.tensors if tensor.spec.name in layer_of}
        self._matrices = {name: moments.matrix(tensor) for name, tensor in self._planned.items()}
        self.nbytes = moments.models * sum(map(self._bytes_of, self._planned.values()))
        self._places: dict[str, tuple[Any, list[int | None]]] = {}

    def _bytes_of(self, tensor: PlannedTensor) -> int:
        matrix, method = self._matrices[tensor.spec.name], tensor.method
        assert isinstance(method, RegMean)
        width = tensor.spec.shape[matrix.input_dim]
        experts = tensor.spec.shape[0] if matrix.is_stacked else 1
        return 8 * experts * (width if method.moments == "diagonal" else width * width)

    def take(self, folder: Path, progress: Callable[[int], object] = lambda count: None) -> None:
        """Run the models and write the files that no call before has written; then have them for `prepare`.

        Args:
            folder: made where it is missing; what it holds is of the same models and texts.
            progress: called with the number of layers that every model has gone through.

        Raises: InputError: a model cannot be run, the disk is full or fails.
        """
        if not (folder / DONE).is_file():
            for layer, by_model in self._pass.take(lambda layer: _file(folder, layer).is_file()):
                if by_model[0]:
                    self._write(_file(folder, layer), by_model)
                progress(1)
            save_tensors(folder / DONE, {}, {})
        self._open(folder)

    def _write(self, path: Path, by_model: Sequence[Mapping[str, InputMoments | None]]) -> None:
        """One layer: each input's moments once, the first tokens' with their weight among them."""
        numbers: dict[tuple[int, float], int] = {}
        tensors: dict[str, torch.Tensor] = {}
        said: dict[str, list[int | None]] = {name: [] for name in by_model[0]}
        for by_tensor in by_model:
            for name, moments in by_tensor.items():
                if moments is None:
                    said[name].append(None)
                    continue
                method = self._planned[name].method
                assert isinstance(method, RegMean)
                key = (id(moments), method.first_token_weight)
                if key not in numbers:
                    numbers[key] = len(numbers)
                    tensors[str(numbers[key])] = (moments.rest + method.first_token_weight * moments.first).cpu()
                said[name].append(numbers[key])
        save_tensors(path, tensors, {NUMBERS: json.dumps(said)})

    def _open(self, folder: Path) -> None:
        from safetensors import safe_open

        for path in sorted(folder.glob("layer_*.safetensors")):
            file: Any = safe_open(path, "pt")
            for name, numbers in json.loads(file.metadata()[NUMBERS]).items():
                self._places[name] = (file, numbers)

    def prepare(self, tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
        """The tensors of a plan, those that regmean merges by moments with what fetches them."""
        return [self._prepared(tensor) for tensor in tensors]

    def _prepared(self, tensor: PlannedTensor) -> PlannedTensor:
        method, name = tensor.method, tensor.spec.name
        if not isinstance(method, RegMean) or name not in self._places:
            return tensor
        file, numbers = self._places[name]
        matrix = self._matrices[name]
        if all(number is None for number in numbers[: matrix.count]):
            return tensor
        values = {one.name: getattr(method, one.name) for one in fields(method)}

        def projected(method: RegMean) -> Projected:
            return matrix.projected(matrix.complete(_fetched(file, numbers), method), method)

        return replace(tensor, method=WithMoments(**values, projected=projected))


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}.safetensors"


def _fetched(file: Any, numbers: Sequence[int | None]) -> list[InputMoments | None]:
    """The moments of each model, mapped; those of the first tokens are in them."""
    tensors = (None if number is None else file.get_tensor(str(number)) for number in numbers)
    return [None if rest is None else InputMoments(rest, rest.new_zeros([1] * rest.ndim)) for rest in tensors]
