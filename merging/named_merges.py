"""Merges that other merges use as a model: sources whose blocks are computed as they are read, so that nothing is written between stages.

A recipe names them under `merges`, or in documents of their own in one YAML file. Their numbers are float32 and rounded once, when the last
merge is written.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from checkpoints.errors import InputError
from checkpoints.location import Location, ModelName
from checkpoints.model import Model, close_all, open_models
from checkpoints.problems import Problems
from checkpoints.provenance import Digest, describe_input
from checkpoints.reader import WeightFile
from checkpoints.settings import setting
from checkpoints.sidecars import SideFiles
from checkpoints.source import Source, TensorInfo, TensorRef
from checkpoints.writer import HashName
from merging.plan import Plan, make_plan
from merging.recipe import ModelInput, Recipe, Slice
from streaming.blocks import GRID_ELEMENTS, Block, Partial, Region, TensorSpec, tile
from streaming.stream import PlannedTensor

CACHED_STATISTICS = 16
"""Tensors whose statistics are held: some for each of those that a run has at work."""


@dataclass(frozen=True)
class NamedMerge:
    """A merge under a name; what `ModelName.merged` of a model is that stands for it.

    Attributes:
        name: as other merges call it.
        recipe: what it is.
    """

    name: str
    recipe: Recipe

    def open(self, *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False) -> Model:
        """Open its inputs and plan it. Raises Refusals: everything that does not fit, each with the name before it."""
        opened: list[Model] = []
        problems = Problems()
        with problems.collect():
            opened = open_models(self.recipe.inputs, weights=weights, quiet=quiet, trust_remote_code=trust_remote_code)
            plan = make_plan(self.recipe, opened, max_shard_bytes=1 << 62)
            if plan.recipe.method_class.needs_data:
                raise InputError(
                    f"{self.recipe.merge_method} runs its models, which a merge that is computed as it is read cannot. Add "
                    f"{setting('keep_intermediate', self.name)}."
                )
        if problems:
            close_all(opened)
        Problems([InputError(f"{self.name}: {problem.marked}") for problem in problems]).raise_if_any()
        made = MergedWeights(self.name, plan, opened)
        location = Location(ModelName(str(made.folder)), made.folder)
        name = ModelName(self.name, merged=self)
        return Model(
            location,
            made,
            trust_remote_code,
            name,
            made_of=tuple(opened),
            notes=_notes(self, plan),
            described=made.described,
        )


def _notes(merge: NamedMerge, plan: Plan) -> tuple[str, ...]:
    """What to say of a named merge where it is used."""
    models = ", ".join(dict.fromkeys(map(str, merge.recipe.inputs)))
    layers = ["; ".join(map(str, plan.ranges))] if plan.ranges else []
    own = [f"{merge.name}: {note}" for note in (*layers, *plan.notes, *plan.warnings)]
    return (f"{merge.name}: merged as it is read, in float32: {plan.recipe.merge_method} of {models}.", *own)


class MergedWeights:
    """The tensors of a planned merge, computed as they are read; a `Weights`.

    Args:
        label: how messages name it.
        plan: what is merged with what.
        opened: its inputs, which are closed with it.

    Attributes:
        folder: with the config, tokenizer and side files that the merge would have; gone when it is closed.
    """

    def __init__(self, label: str, plan: Plan, opened: Sequence[Model]):
        self.label = label
        self.files: Sequence[WeightFile] = ()
        self._plan, self._opened = plan, opened
        self._planned = {tensor.spec.name: tensor for tensor in plan.tensors}
        behind = {name for model in opened[:1] for name in model.weights.modules.tensors}
        infos = {name: _info_of(tensor) for name, tensor in self._planned.items()}
        self.tensors: Mapping[str, TensorInfo] = {name: info for name, info in infos.items() if name not in behind}
        self.modules: Source = _Part(self, {name: info for name, info in infos.items() if name in behind})
        self._statistics: OrderedDict[str, Any] = OrderedDict()
        self._locks = {name: threading.Lock() for name in self._planned}
        self._lock = threading.Lock()
        self._temporary = TemporaryDirectory(prefix="merge_")
        self.folder = Path(self._temporary.name).resolve()
        for name in plan.files.names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plan.files.read(name))

    @property
    def is_here(self) -> bool:
        """See `Weights`."""
        return all(model.weights.is_here for model in self._opened)

    def adjust(self, files: SideFiles) -> None:
        """See `Weights`."""

    def check_unchanged(self) -> None:
        """See `Weights`."""
        for model in self._opened:
            model.weights.check_unchanged()

    def close(self) -> None:
        """See `Weights`."""
        close_all(self._opened)
        self._temporary.cleanup()

    def described(self, digest: Digest, hash_name: HashName) -> dict[str, Any]:
        """What merge_recipe.json says of it as an input: the recipe, and what it was made of."""
        inputs = [describe_input(model, digest, hash_name) for model in self._opened]
        recipe = self._plan.recipe.as_json()
        made = json.dumps([recipe, [entry["fingerprint"] for entry in inputs]], sort_keys=True)
        return {"merge": recipe, "inputs": inputs, "fingerprint": hashlib.sha256(made.encode()).hexdigest()}

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; whole rows around what is asked for are merged, where they are not too long."""
        tensor = self._planned[name]
        if tensor.method is None:
            return tensor.base.read(start, stop, buffer)
        statistics = self._measured(tensor)
        out = buffer[: 4 * (stop - start)].view(torch.float32)
        for region in _cover(tensor.spec, start, stop):
            low, high = max(region.start, start), min(region.stop, stop)
            merged = tensor.method.combine(_fetch(tensor, region), statistics)
            out[low - start : high - start] = merged[low - region.start : high - region.start]
        return out

    def _measured(self, tensor: PlannedTensor) -> Any:
        """A tensor's statistics, which one thread takes while the others wait."""
        assert tensor.method is not None
        name = tensor.spec.name
        with self._locks[name]:
            if name in self._statistics:
                return self._statistics[name]

            def scan(measure: Callable[[Block], Partial], regions: Sequence[Region] | None = None) -> Iterator[Partial]:
                for region in tile(tensor.spec, GRID_ELEMENTS) if regions is None else regions:
                    yield measure(_fetch(tensor, region))

            statistics = tensor.method.measure(tensor.spec, scan)
            with self._lock:
                self._statistics[name] = statistics
                while len(self._statistics) > CACHED_STATISTICS:
                    self._statistics.popitem(last=False)
            return statistics


class _Part:
    """Some tensors of a merge as a source of their own."""

    def __init__(self, whole: MergedWeights, tensors: Mapping[str, TensorInfo]):
        self.label = whole.label
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._whole = whole

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        return self._whole.read(name, start, stop, buffer)


def _info_of(tensor: PlannedTensor) -> TensorInfo:
    if tensor.method is None:
        info = tensor.base.info
        return TensorInfo(info.dtype, info.shape, tensor.dtype if info.dtype.is_floating_point else None)
    return TensorInfo(torch.float32, tensor.spec.shape, tensor.dtype)


def _cover(spec: TensorSpec, start: int, stop: int) -> Iterator[Region]:
    """Regions that hold the elements `start` to `stop`: whole rows of one matrix each, or pieces of rows that are too long."""
    columns = spec.columns
    if columns > GRID_ELEMENTS:
        while start < stop:
            end = min(stop, (start // columns + 1) * columns, start + GRID_ELEMENTS)
            yield Region(spec, start, end)
            start = end
        return
    per_matrix, most = spec.rows * columns, max(GRID_ELEMENTS // columns, 1) * columns
    start, stop = start // columns * columns, -(-stop // columns) * columns
    while start < stop:
        end = min(stop, (start // per_matrix + 1) * per_matrix, start + most)
        yield Region(spec, start, end)
        start = end


def _fetch(tensor: PlannedTensor, region: Region) -> Block:
    """A region of every input, as float32 on the CPU."""
    method = tensor.method
    assert method is not None
    base = _read(tensor.base, region) if method.reads_base or method.space == "task_vectors" else None
    models = [_read(reference, region) for reference in tensor.inputs]
    if method.space == "weights":
        return Block(region, base, [], models)
    assert base is not None
    return Block(region, base, [model.sub_(base) for model in models], [])


def _read(reference: TensorRef, region: Region) -> torch.Tensor:
    buffer = torch.empty(8 * region.numel, dtype=torch.uint8)
    return reference.read(region.start, region.stop, buffer).to(torch.float32, copy=True)


def with_folders(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """A recipe with folders in the place of named merges, wherever they are used.

    Args:
        folders: name -> where the merge of that name was written.
    """

    def of(name: ModelName) -> ModelName:
        if name.base is not None:
            return replace(name, base=of(name.base))
        if not isinstance(name.merged, NamedMerge):
            return name
        if name.path_or_id in folders:
            return ModelName(str(folders[name.path_or_id]))
        return replace(name, merged=NamedMerge(name.merged.name, with_folders(name.merged.recipe, folders)))

    def source_of(source: ModelInput) -> ModelInput:
        return replace(source, name=of(source.name))

    def slice_of(part: Slice) -> Slice:
        return replace(part, sources=tuple(map(source_of, part.sources)))

    left = {name: with_folders(merge, folders) for name, merge in recipe.merges.items() if name not in folders}
    base = None if recipe.base_model is None else of(recipe.base_model)
    source = recipe.layout.tokenizer_source
    layout = replace(recipe.layout, tokenizer_source=str(folders[source])) if source in folders else recipe.layout
    return replace(recipe, base_model=base, slices=tuple(map(slice_of, recipe.slices)), merges=left, layout=layout)


def in_order(merges: Mapping[str, Recipe], names: Sequence[str]) -> list[str]:
    """Names of merges so that each comes after those that it uses."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for used in merges[name].inputs:
            if used.merged is not None and used.path_or_id in names:
                add(used.path_or_id)
        if name in names and name not in ordered:
            ordered.append(name)

    for name in names:
        add(name)
    return ordered
