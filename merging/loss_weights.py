"""Weights of models by how well each does on a few examples of one task: LM-Cocktail (arXiv:2311.13534)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from checkpoints.errors import InputError
from checkpoints.location import ModelName
from checkpoints.model import close_all, open_model
from checkpoints.settings import setting
from merging.model_texts import read_examples

TEMPERATURE = 5.0
"""T of the softmax, as published."""
TOKENS = 4000
"""Of the examples that are read: rows in order, until there are so many."""


def weights_by_loss(
    names: Sequence[ModelName], source: str, device: torch.device, *, trust_remote_code: bool = False
) -> list[tuple[float, float]]:
    """Run every model on the examples, one model at a time, in float32.

    Args:
        names: of the models.
        source: a file of examples of the task that the merge is for, see `read_model_text`.
        device: where they run.

    Returns: of each model its weight, softmax(-loss / 5), and its loss: the mean over examples of nats per answer token.

    Raises: InputError: the file cannot be read; a model cannot be loaded; its loss is not finite.
    """
    losses = [_loss(name, source, device, trust_remote_code) for name in names]
    return list(zip(softmax_of_losses(losses), losses, strict=True))


def softmax_of_losses(losses: Sequence[float]) -> list[float]:
    """w = softmax(-L / T)."""
    powers = [math.exp((min(losses) - loss) / TEMPERATURE) for loss in losses]
    return [power / sum(powers) for power in powers]


def _loss(name: ModelName, source: str, device: torch.device, trust_remote_code: bool) -> float:
    """A model's loss on the examples."""
    from forward.loading import load, quiet_transformers

    model = open_model(name, quiet=True, trust_remote_code=trust_remote_code)
    try:
        examples = read_examples(model, source, TOKENS)
        with quiet_transformers(), torch.no_grad():
            loaded = load(model, dtype="float32", device=device)
            total = 0.0
            for tokens, begin in examples:
                ids = tokens.to(loaded.device)
                logits = loaded(input_ids=ids, use_cache=False).logits[0, begin - 1 : -1].float()
                total += float(torch.nn.functional.cross_entropy(logits, ids[0, begin:]))
        loss = total / len(examples)
    finally:
        close_all([model])
    if not math.isfinite(loss):
        raise InputError(
            f"{model.label}: expected a finite loss on {setting('model_data', source)}, got {loss}. Check the model."
        )
    return loss
