"""Run a model that is in memory as a whole, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from forward.loading import is_out_of_memory


class Counts(Protocol):
    """Whoever looks at the inputs, and is told what runs."""

    block: tuple[int, int] | None


def run_batches(
    model: Any,
    tokens: torch.Tensor,
    batches: Iterable[slice | torch.Tensor],
    counts: Counts,
    fails: Callable[[Exception], Exception],
) -> Iterator[torch.Tensor]:
    """Run a model on batches of blocks, and give each batch when it is done.

    Args:
        tokens: `[blocks, tokens]` int64.
        batches: which of them, or other tokens.
        counts: its `block` is set to the shape of what runs.
        fails: makes of what the model's own code raises the error to raise; running out of memory is raised as it is.
    """
    with torch.no_grad():
        for batch in batches:
            inputs = tokens[batch] if isinstance(batch, slice) else batch
            counts.block = (inputs.shape[0], inputs.shape[1])
            try:
                model(input_ids=inputs, use_cache=False)
            except Exception as error:  # a model's own code fails in every way there is
                if isinstance(error, MemoryError) or is_out_of_memory(error):
                    raise
                raise fails(error) from error
            finally:
                counts.block = None
            yield inputs
