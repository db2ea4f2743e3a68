"""Write an output's tensors into the parameters of a loaded model, in place of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from checkpoints.conversions import Conversion
from checkpoints.errors import InputError
from checkpoints.model import Model
from forward.tuning import threads
from search.losses import score
from search.texts import Document
from streaming.stream import Output, PlannedTensor, StreamOptions, Transform, stream


class LoadedModel:
    """A model whose weights are replaced again and again; a `streaming.stream.Writer`, and a `search.candidates.Place`.

    A tensor that is one run of its parameter goes straight there. What transformers transposes or cuts when it loads is
    gathered and made by its own conversion at the end (`finish`).

    Args:
        base: the checkpoint whose class, names and shapes the model has.
        model: as `forward.loading.load` loads it.
        device: where it is.
        count: threads of torch in forward passes; None for as many as there are.
    """

    can_score_in_parts = True
    """Scoring takes no time but for the documents'."""

    def __init__(self, base: Model, model: Any, device: torch.device | None = None, count: int | None = None):
        self.model, self._label = model, base.label
        self._device, self._threads = device or torch.device("cpu"), count or torch.get_num_threads()
        for parameter in model.parameters():  # which may be views of a mapped file
            parameter.data = parameter.data.clone()
        placements = base.architecture.placements
        state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
        shapes = {name: info.shape for name, info in base.weights.tensors.items()}
        self._conversion = Conversion(model, shapes)
        self._state = state
        self._runs: dict[str, torch.Tensor] = {}
        self._gathered: dict[str, dict[str, torch.Tensor]] = {}
        self._target_of: dict[str, str] = {}
        for target in self._conversion.targets:
            names = self._conversion.sources(target)
            flat = state[target].data.view(-1) if target in state and state[target].is_contiguous() else None
            # A buffer has no placement: it is taken as it is, or gathered.
            plain = self._conversion.plain_source(target)
            starts = {name: placements[name].start if name in placements else 0 if plain else None for name in names}
            if flat is not None and all(start is not None for start in starts.values()):
                for name, start in starts.items():
                    assert start is not None
                    numel = base.weights.tensors[name].numel
                    self._runs[name] = flat[start : start + numel]
            else:
                self._target_of |= dict.fromkeys(names, target)
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `check_shapes`."""
        check_shapes(self._label, self.shapes, tensors)

    def put(self, tensors: Sequence[PlannedTensor], transform: Transform | None, options: StreamOptions) -> None:
        """Merge these tensors into the model's parameters."""
        stream(tensors, [Output(self, transform)], options=options)
        self.finish()

    def score(self, documents: Sequence[Document]) -> list[float]:
        """The loss of each document."""
        with threads(self._threads):
            return score(self.model, documents, self._device)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put `values`, `[n]`, at the elements `start` to `start + n` of a tensor; from any thread."""
        run = self._runs.get(name)
        if run is not None:
            run[start : start + len(values)].copy_(values)
        elif name in self._target_of:
            parts = self._gathered.setdefault(self._target_of[name], {})
            if name not in parts:
                parts.setdefault(name, torch.empty(self.shapes[name], dtype=values.dtype))
            parts[name].view(-1)[start : start + len(values)].copy_(values)

    def finish(self) -> None:
        """Make the parameters that need a conversion."""
        for target, parts in self._gathered.items():
            for name, made in self._conversion.make(target, parts).items():
                if name in self._state:
                    self._state[name].data.copy_(made)
        self._gathered.clear()


def check_shapes(label: str, shapes: Mapping[str, tuple[int, ...]], tensors: Sequence[PlannedTensor]) -> None:
    """Raise InputError where an output has other tensors or shapes than the base, whose model is run."""
    for tensor in tensors:
        name = tensor.spec.name
        if tensor.spec.shape != shapes.get(name):
            raise InputError(
                f"{name}: expected shape {list(shapes.get(name, ()))} as in {label}, got {list(tensor.spec.shape)}. A search needs outputs "
                "with the base's vocabulary, head and layers: use tokenizer_source: base, and name no slices."
            )
