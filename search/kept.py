"""Tensors of a computed source, kept in memory once they were read: a search reads them for every candidate."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch

from checkpoints.model import Model
from checkpoints.reader import Checkpoint
from checkpoints.weights import Weights
from forward.memory import available_bytes

SHARE = 0.4
"""Of the memory that is free, what all of them may take."""


class KeptTensors:
    """The weights of a model (an adapter on its base, say), each tensor computed once; a `Weights`."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._lock = threading.Lock()
        self._kept: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        whole = self._kept.get(name)
        if whole is None:
            numel = self._weights.tensors[name].numel
            with self._lock:
                whole = self._kept.get(name)
                if whole is None:
                    whole = self._weights.read(name, 0, numel, torch.empty(numel * 8, dtype=torch.uint8)).clone()
                    self._kept[name] = whole
        return whole[start:stop]


def keep_computed(opened: list[Model]) -> list[Model]:
    """The models, those whose numbers are computed as they are read with what keeps them, where the memory has room for all."""
    computed = [model for model in opened if not isinstance(model.weights, Checkpoint)]
    needed = sum(info.nbytes for model in computed for info in model.weights.tensors.values())
    if needed > SHARE * available_bytes():
        return opened
    return [
        model if isinstance(model.weights, Checkpoint) else replace(model, weights=KeptTensors(model.weights))
        for model in opened
    ]
