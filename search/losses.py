"""The loss of each document under a model in memory: nats per scored token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from search.texts import Document

BATCH_TOKENS = 2048
"""Of a batch, padding included; a longer document is a batch by itself."""


def batches(documents: Sequence[Sized], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of the documents by length, in batches of at most `tokens` with padding."""
    found: list[list[int]] = []
    for index in sorted(range(len(documents)), key=lambda index: len(documents[index])):
        if found and len(documents[index]) * (len(found[-1]) + 1) <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


class Batch:
    """Documents side by side, and which of their tokens are scored. Padding stands at the right, where causal attention never
    looks.

    Attributes:
        ids: `[rows, tokens]` int64.
        asked: `[rows, tokens - 1]` bool: whether the next token is scored.
    """

    def __init__(self, documents: Sequence[Document], device: torch.device):
        length = max(map(len, documents))
        self.ids = torch.zeros(len(documents), length, dtype=torch.long)
        self.asked = torch.zeros(len(documents), length - 1, dtype=torch.bool)
        for row, document in enumerate(documents):
            self.ids[row, : len(document)] = torch.tensor(document.ids)
            self.asked[row, document.begin - 1 : len(document) - 1] = True
        self.ids, self.asked = self.ids.to(device), self.asked.to(device)

    def losses(self, logits: torch.Tensor) -> list[float]:
        """The mean loss of each document; logits: `[scored, vocabulary]`, in the order of `asked`."""
        losses = cross_entropy(logits.float(), self.ids[:, 1:][self.asked], reduction="none").double()
        rows = self.asked.nonzero()[:, 0]
        sums = torch.zeros(len(self.ids), dtype=torch.float64, device=losses.device).index_add_(0, rows, losses)
        return (sums / self.asked.sum(dim=1)).tolist()


class AskedRows:
    """Has the head of a model see only the positions whose next token is scored; a context manager.

    Args:
        model: as transformers loads it.
        coming: the batches in the order in which they reach the head; None where each is said by setting `batch`.
    """

    def __init__(self, model: Any, coming: Iterator[Batch] | None = None):
        self._head, self._coming = model.get_output_embeddings(), coming
        self._handle: Any = None
        self.batch: Batch | None = None
        self.seen = False

    def __enter__(self) -> AskedRows:
        if self._head is not None:
            self._handle = self._head.register_forward_pre_hook(self._pick)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _pick(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._coming is not None:
            self.batch = next(self._coming)
        batch, hidden = self.batch, args[0]
        if batch is None or hidden.shape[:2] != batch.ids.shape:
            return None
        self.seen = True
        return (hidden[:, :-1][batch.asked][None], *args[1:])

    def logits(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The rows that count, `[scored, vocabulary]`, whether or not the head saw these alone."""
        return output[0] if self.seen else output[:, :-1][batch.asked]


@torch.inference_mode()
def score(model: Any, documents: Sequence[Document], device: torch.device) -> list[float]:
    """The loss of each document.

    Args:
        model: in memory, on `device`.
    """
    found: dict[int, float] = {}
    with AskedRows(model) as rows:
        for indices in batches(documents):
            batch = Batch([documents[index] for index in indices], device)
            rows.batch, rows.seen = batch, False
            output = model(input_ids=batch.ids, use_cache=False).logits
            found |= dict(zip(indices, batch.losses(rows.logits(output, batch)), strict=True))
    return [found[index] for index in range(len(documents))]
