"""Second moments of models' inputs in files, taken once for many merges of the same models, and mapped when a matrix is merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.safetensors_format import save_tensors
from merging.methods.regmean import InputMoments, RegMean, Solved, System, add_solved, solve
from merging.moments_pass import MomentsPass
from streaming.blocks import Block, Scan, TensorSpec
from streaming.stream import PlannedTensor

DONE = "complete.json"
"""The file that is written when all layers' are."""
NUMBERS = "numbers"
"""Metadata of a layer's file: of each tensor the number of every model's moments, null where it saw no input."""


Keep = Callable[[Any, Callable[[], Any]], Any]
"""Gives what is kept under a key, or else what a function makes, which it keeps where there is room."""


@dataclass(frozen=True)
class WithMoments(RegMean):
    """RegMean of a matrix whose moments are fetched when it is merged. Another ridge is solved from the same sums over models, as long as
    they are kept, and another lambda needs nothing solved.

    Attributes:
        system_of: gives what is solved, all but the ridge, and its right side, of a tensor that a scan reads.
        dim: the tensor's dimension that runs over the input channels.
    """

    name: ClassVar[str] = ""
    unmeasured: ClassVar[tuple[str, ...]] = ("lambda_", "rest_lambda", "system_of", "dim")

    system_of: Callable[[RegMean, TensorSpec, Scan], tuple[System, torch.Tensor]] = field(kw_only=True)
    dim: int = field(kw_only=True)

    def measure(self, tensor: TensorSpec, scan: Scan) -> torch.Tensor:
        """See `Solved.measure`."""
        system, answers = self.system_of(self, tensor, scan)
        return solve(answers, system.factor(self.ridge, tensor.name), is_in_rows=self.dim == len(tensor.shape) - 1)

    def combine(self, block: Block, statistics: torch.Tensor) -> torch.Tensor:
        """See `Method.combine`."""
        return add_solved(block, statistics, self.lambda_)


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

    def prepare(self, tensors: Sequence[PlannedTensor], keep: Keep = lambda key, make: make()) -> list[PlannedTensor]:
        """The tensors of a plan, those that regmean merges by moments with what fetches them; `keep`: what no lambda and no ridge changes."""
        return [self._prepared(tensor, keep) for tensor in tensors]

    def _prepared(self, tensor: PlannedTensor, keep: Keep) -> PlannedTensor:
        method, name = tensor.method, tensor.spec.name
        if not isinstance(method, RegMean) or name not in self._places:
            return tensor
        file, numbers = self._places[name]
        matrix = self._matrices[name]
        if all(number is None for number in numbers[: matrix.count]):
            return tensor

        def fetched(method: RegMean) -> list[InputMoments]:
            return matrix.complete(_fetched(file, numbers), method)

        if method.moments == "diagonal":
            squares = keep((name, "diagonal"), lambda: [replace(one, rest=one.rest.clone()) for one in fetched(method)])
            return replace(tensor, method=matrix.prepared(squares, method))

        def system_of(method: RegMean, spec: TensorSpec, scan: Scan) -> tuple[System, torch.Tensor]:
            def make() -> tuple[System, torch.Tensor]:
                solved = matrix.prepared(fetched(method), method)
                assert isinstance(solved, Solved)
                return solved.system, solved.answers(spec, scan)

            return keep((name, type(method), method.gram_scale, method.base_weight), make)  # type: ignore[no-any-return]

        values = {one.name: getattr(method, one.name) for one in fields(method)}
        return replace(tensor, method=WithMoments(**values, system_of=system_of, dim=matrix.input_dim))


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}.safetensors"


def _fetched(file: Any, numbers: Sequence[int | None]) -> list[InputMoments | None]:
    """The moments of each model, mapped; those of the first tokens are in them."""
    tensors = (None if number is None else file.get_tensor(str(number)) for number in numbers)
    return [None if rest is None else InputMoments(rest, rest.new_zeros([1] * rest.ndim)) for rest in tensors]
