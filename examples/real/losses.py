"""The loss of a model on answers: in batches of documents of about the same length, in nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.real.texts import Encoded
from search.losses import batches

BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Of a batch that is scored, padding included, by the kind of device."""


@dataclass(frozen=True)
class Answers:
    """What a model says of the answer tokens of a batch.

    Attributes:
        losses: `[tokens]`, -log p of each, nats.
        rows: `[tokens]` int64, the document of each.
        right: `[tokens]` bool, whether it is the most likely token at its place.
    """

    losses: Tensor
    rows: Tensor
    right: Tensor


@dataclass(frozen=True)
class Score:
    """Of one document: its mean loss in nats per answer token, and whether greedy decoding gives exactly this answer."""

    loss: float
    exact: bool


def answers(model: Any, documents: Sequence[Encoded]) -> Answers:
    """Run a batch. Padding stands at the right, where causal attention never looks at it."""
    length, device = max(map(len, documents)), model.device
    first = min(len(document.prompt) for document in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    asked = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document.prompt + document.answer)
        asked[row, len(document.prompt) : len(document)] = True
    # Logits of the tokens from `first` on: each is read where the token before it is.
    ids, asked = ids.to(device), asked.to(device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=length - first + 1).logits[:, :-1]
    asked = asked[:, first:]
    chosen, targets = logits[asked].float(), ids[:, first:][asked]
    return Answers(
        cross_entropy(chosen, targets, reduction="none"), asked.nonzero()[:, 0], chosen.detach().argmax(-1) == targets
    )


@torch.no_grad()
def score(model: Any, documents: Sequence[Encoded]) -> list[Score]:
    """The score of each document.

    An answer is exact where each of its tokens is the most likely one after the right tokens before it; that is
    what greedy decoding would have written, with one forward pass instead of one for each token.
    """
    found: dict[int, Score] = {}
    for batch in batches(documents, BATCH_TOKENS[model.device.type]):
        on_device = answers(model, [documents[index] for index in batch])
        result = Answers(on_device.losses.cpu(), on_device.rows.cpu(), on_device.right.cpu())
        for row, index in enumerate(batch):
            mine = result.rows == row
            found[index] = Score(float(result.losses[mine].mean()), bool(result.right[mine].all()))
    return [found[index] for index in range(len(documents))]
