"""The loss of a model on answers: in batches of documents of about the same length, in nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.real.texts import Encoded
from search.losses import batches

BATCH_TOKENS = {"cpu": 768, "cuda": 8192}
"""Of a batch that is scored, padding included, by the kind of device. Small ones hold little padding, which a CPU would have to compute."""


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
    """Run a batch. Padding stands at the right, where causal attention never looks at it.

    What all prompts begin with (the chat template's system message, say) runs once, and its keys and values serve all documents.
    """
    length, device = max(map(len, documents)), model.device
    first = min(len(document.prompt) for document in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    asked = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document.prompt + document.answer)
        asked[row, len(document.prompt) : len(document)] = True
    ids, asked = ids.to(device), asked.to(device)
    shared, past = _run_once(model, ids, min(first - 1, _shared([one.prompt for one in documents])))
    # Logits of the tokens from `first` on: each is read where the token before it is.
    output = model(ids[:, shared:], past_key_values=past, use_cache=past is not None, logits_to_keep=length - first + 1)
    asked = asked[:, first:]
    chosen, targets = output.logits[:, :-1][asked].float(), ids[:, first:][asked]
    return Answers(
        cross_entropy(chosen, targets, reduction="none"), asked.nonzero()[:, 0], chosen.detach().argmax(-1) == targets
    )


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    columns = zip(*prompts, strict=False)  # as long as the shortest
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _run_once(model: Any, ids: Tensor, shared: int) -> tuple[int, Any]:
    """Run the first `shared` tokens, which are the same in all rows.

    Returns: how many ran, and their keys and values for every row; 0 and None where there is nothing to gain, which
        includes training, or the model keeps its past in another way.
    """
    from transformers import DynamicCache

    if shared < 1 or len(ids) < 2 or torch.is_grad_enabled():
        return 0, None
    past = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
    if type(past) is not DynamicCache:
        return 0, None
    past.batch_repeat_interleave(len(ids))
    return shared, past


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
