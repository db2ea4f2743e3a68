"""When the text is enough: s of the first half of it and of the second are as good as the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from aim.watcher import Watcher
from checkpoints.tensor_names import kind_of
from forward.parts import Use

FIRST_CHECK = 2048
"""Tokens after which is first looked; and again each time that they have doubled."""
HALF = "half."


def first_check(block_size: int) -> int:
    """Blocks after which is first looked, an even number."""
    return 2 * max(1, -(-FIRST_CHECK // (2 * block_size)))


class Enough:
    """Looks at a watcher's sums after 2,048 tokens, 4,096 and so on: whether both halves say the same.

    Of every kind of layer the mean over channels of |s(first half) - s(second half)| has to be below the tolerance. An expert
    that saw tokens in one half only has s = 0 in the other.

    Args:
        watcher: of the pass.
        tolerance: 0 never has enough.
        block_size: tokens of a block.
        blocks: how many there are.

    Attributes:
        checks: numbers of blocks after which is looked.
        difference: the largest of any kind, when last looked; None before.
    """

    def __init__(self, watcher: Watcher, tolerance: float, block_size: int, blocks: int):
        self._watcher = watcher
        self._tolerance = tolerance
        self._blocks = blocks
        first = first_check(block_size)
        self.checks = [first]
        while 2 * self.checks[-1] <= blocks:
            self.checks.append(2 * self.checks[-1])
        self._stops = [first // 2, *self.checks] if tolerance else []
        self._half: dict[Use, torch.Tensor] = {}
        self.difference: float | None = None
        self.kind = ""

    def batches(self, begin: int, size: int) -> Iterator[slice]:
        """Which blocks to run, from `begin` on, so that a batch ends wherever is looked."""
        while begin < self._blocks:
            stop = min([begin + size, self._blocks, *(at for at in self._stops if at > begin)])
            yield slice(begin, stop)
            begin = stop

    def passes(self, begin: int) -> Iterator[tuple[int, int]]:
        """The same for passes that take all text up to where is looked next: first and last block of each."""
        for batch in self.batches(begin, self._blocks):
            yield batch.start, batch.stop

    def at(self, blocks: int) -> bool:
        """Look, if it is time to, after so many blocks. Returns: whether they are enough."""
        if blocks not in self._stops:
            return False
        now = self._watcher.totals()
        enough = False
        if blocks in self.checks:
            self.difference, self.kind = self._compare(now)
            enough = self.difference < self._tolerance
        self._half = now
        return enough

    def _compare(self, now: Mapping[Use, torch.Tensor]) -> tuple[float, str]:
        """The largest mean difference of a kind of layer, and which kind."""
        differences: dict[str, list[torch.Tensor]] = {}
        for use, total in now.items():
            before = self._half.get(use, torch.zeros_like(total))
            differences.setdefault(kind_of(use.parameter), []).append((_s(before) - _s(total - before)).abs())
        return max(((float(torch.cat(ones).mean()), kind) for kind, ones in differences.items()), default=(0.0, ""))

    def as_json(self) -> dict[str, Any]:
        """The tolerance, and what was found, to 4 digits."""
        difference = None if self.difference is None else float(f"{self.difference:.4g}")
        return {"tolerance": self._tolerance, "difference": difference}

    def sums(self) -> dict[str, torch.Tensor]:
        """The watcher's sums and those of the first half, under names that `restore` knows."""
        half = {f"{HALF}{json.dumps(use.as_json())}": total for use, total in self._half.items()}
        return self._watcher.sums() | half

    @staticmethod
    def check_sums(tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError where this is not what `sums` gave, but another version or somebody else wrote it."""
        Watcher.check_sums({name: tensor for name, tensor in tensors.items() if not name.startswith(HALF)})
        for name, tensor in tensors.items():
            if name.startswith(HALF):
                Use.of_json(json.loads(name.removeprefix(HALF)))
                if tensor.ndim != 1:
                    raise ValueError(f"{name}: no sums of an input")

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what another's `sums` gave."""
        self._watcher.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(HALF)})
        for name, tensor in tensors.items():
            if name.startswith(HALF):
                self._half[Use.of_json(json.loads(name.removeprefix(HALF)))] = tensor


def _s(total: torch.Tensor) -> torch.Tensor:
    """s of sums of |x|, `[in]` float64: 0 where there was nothing."""
    largest = total.amax()
    return total / largest if bool(largest > 0) else torch.zeros_like(total)
