"""Score candidates of a model that is larger than the memory: each layer is merged when its turn comes, and forgotten after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.model import Model
from forward.layers import find_layers
from forward.layerwise import Layerwise
from forward.skeleton import build_skeleton
from merging.merged_tensors import MergedTensors
from search.losses import AskedRows, Batch, batches
from search.memory import check_shapes
from search.texts import Document
from streaming.stream import PlannedTensor, StreamOptions, Transform


class MergedWeights:
    """The weights of a candidate, merged as they are read; a `Weights` with the base's files.

    Args:
        base: gives all but the numbers.
        tensors, transform, options: see `MergedTensors`.
    """

    def __init__(
        self, base: Model, tensors: Sequence[PlannedTensor], transform: Transform | None, options: StreamOptions
    ):
        self._base = base.weights
        self._merged = MergedTensors(base.label, tensors, options, transform)
        self.tensors = self._merged.tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        return self._merged.read(name, start, stop, buffer)


class LayerByLayer:
    """A model of which never more than a layer is in memory, and the next one on its way; a `search.candidates.Place`.

    Args:
        base: the checkpoint whose class, names and shapes the model has.
        dtype: of the forward pass.
        device: where layers run.

    Raises: InputError: its layers cannot be told apart.
    """

    can_score_in_parts = False
    """Each time it is scored, all weights are merged and read."""

    def __init__(self, base: Model, dtype: torch.dtype, device: torch.device):
        self._base, self._device = base, device
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in base.weights.tensors.items()}
        self.model = self._skeleton = build_skeleton(base, dtype)
        self._weights: Any = base.weights
        if not find_layers(self._skeleton):
            raise InputError(
                f"{base.label}: is larger than the memory, and its layers cannot be told apart. Use a machine with more."
            )

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `search.memory.check_shapes`."""
        check_shapes(self._base.label, self.shapes, tensors)

    def put(self, tensors: Sequence[PlannedTensor], transform: Transform | None, options: StreamOptions) -> None:
        """Have these weights from now on; they are merged while it is scored."""
        self._weights = MergedWeights(self._base, tensors, transform, options)

    def score(self, documents: Sequence[Document]) -> list[float]:
        """The loss of each document."""
        order = batches(documents)
        made = [Batch([documents[index] for index in indices], self._device) for indices in order]
        coming = iter(made)
        found: list[list[float]] = []
        head = self._skeleton.get_output_embeddings()
        candidate = replace(self._base, weights=self._weights)
        with AskedRows(self._skeleton, coming) as rows:
            handle = head.register_forward_hook(lambda module, args, output: self._take(rows, output, found))
            try:
                with Layerwise(candidate, self._skeleton, self._device, fails=self._fails) as layers, torch.no_grad():
                    layers.run([batch.ids for batch in made])
            finally:
                handle.remove()
        losses = {
            index: loss
            for indices, scored in zip(order, found, strict=True)
            for index, loss in zip(indices, scored, strict=True)
        }
        return [losses[index] for index in range(len(documents))]

    @staticmethod
    def _take(rows: AskedRows, output: torch.Tensor, found: list[list[float]]) -> None:
        assert rows.batch is not None
        found.append(rows.batch.losses(rows.logits(output, rows.batch)))

    def _fails(self, error: Exception) -> InputError:
        return InputError(f"{self._base.label}: cannot be run layer by layer: {first_line(error)}. Use another base.")
