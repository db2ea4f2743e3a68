"""Keep what the models stand before their next layer with, so that a merge that was cut off runs no layer again."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch

from checkpoints.errors import InputError
from checkpoints.safetensors_format import pack_tensors, unpack_tensors
from checkpoints.staging import Stage
from forward.layerwise import Layerwise
from streaming import commits
from streaming.kept import content_of, keep

KEEP_EVERY = 5
"""In units of the time between commits of tensors."""
KEEP_SHARE = 20
"""Times what keeping took that pass before the next time."""
FILE = re.compile(r"hidden-\d+\.safetensors")
KEY = "before_layer"


class KeptHidden:
    """The hidden states of all models before a layer, in the stage.

    Args:
        stage: of a run whose identity holds the texts and the models.
    """

    def __init__(self, stage: Stage):
        self._stage, self._file = stage, ""
        self._kept, self._wait_s = time.monotonic(), KEEP_EVERY * commits.COMMIT_S

    def keep(self, layer: int, running: Sequence[Layerwise]) -> None:
        """Keep them, now and then. Raises WriteError: the disk is full or fails.

        Args:
            layer: that all models stand before.
            running: the models.
        """
        started = time.monotonic()
        if started - self._kept < self._wait_s or not all(tensor.can_be_kept for tensor in running):
            return
        tensors = {f"{at}.{name}": tensor for at, model in enumerate(running) for name, tensor in model.state().items()}
        earlier, self._file = self._file, f"hidden-{len(self._stage.journal.records)}.safetensors"
        keep(self._stage, self._file, pack_tensors(tensors, {KEY: str(layer)}), {KEY: layer})
        if earlier:
            self._stage.state.remove(earlier)
        self._kept = time.monotonic()
        self._wait_s = max(self._wait_s, KEEP_SHARE * (self._kept - started))  # hidden states can be gigabytes

    def restore(self, running: Sequence[Layerwise], texts: Sequence[Sequence[torch.Tensor]], first: int) -> bool:
        """Have all models stand where an earlier run kept them, if that is no further than the layer `first`, which is wanted.

        Args:
            running: models that have not begun.
            texts: of each, what it is run on.

        Returns: whether that could be done; else none has begun.
        """
        for record in reversed(self._stage.journal.records):
            name, layer = str(record.get("file")), record.get(KEY)
            if type(layer) is not int or layer > first or not FILE.fullmatch(name):
                continue
            content = content_of(self._stage.state, record, name)
            if content is None:
                continue
            try:
                tensors, metadata = unpack_tensors(content, "the unfinished merge")
            except InputError:
                continue
            if metadata.get(KEY) == str(layer) and self._stand(running, texts, tensors):
                self._file = name
                return True
        return False

    @staticmethod
    def _stand(
        running: Sequence[Layerwise], texts: Sequence[Sequence[torch.Tensor]], tensors: dict[str, torch.Tensor]
    ) -> bool:
        for at, (layers, text) in enumerate(zip(running, texts, strict=True)):
            own = {name.removeprefix(f"{at}."): tensor for name, tensor in tensors.items() if name.startswith(f"{at}.")}
            if not layers.restore(text, own):
                return False
        return True
