"""Compute a formula of tensors that are in memory, by a compiled loop where there is one: what a method does after a step of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from streaming.blocks import Block
from streaming.elements import Formula, Tensors
from streaming.machine_code import COMPILER, address_of_pread, can_compile, has_instructions_for
from streaming.trace import FINE, Store, Symbol, Trace, loop_key
from streaming.twins import uses_compiled

PREAD = address_of_pread()


class BufferLoop:
    """A formula whose models are tensors in memory, with the same bits by torch and by a loop.

    Args:
        formula: of numbers alone, without channels, indices or random numbers.
        count: of models.
    """

    def __init__(self, formula: Formula, count: int):
        self._formula = formula
        self._trace = Trace([torch.float32] * (count + 1), has_base=True, is_delta=False)
        self._sinks = [Store(cast(Symbol, formula(self._trace)), torch.float32)]
        self._key = loop_key(self._trace, self._sinks)
        self._floats = np.array(self._trace.floats or [0.0], dtype=np.float32)
        self._can_loop = can_compile() and bool(PREAD) and has_instructions_for({torch.float32})

    def __call__(self, block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """What a block's base and these vectors make: `[n]` float32, as they are."""
        made = self._by_loop(block.base, vectors) if self._can_loop and uses_compiled() else None
        if made is None:
            made = self._formula(Tensors(Block(block.region, block.base, list(vectors), [])))
        return made

    def _by_loop(self, base: torch.Tensor | None, vectors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """None where nothing can be compiled, or a number is not finite."""
        loop = COMPILER.get(self._key, self._write)
        if loop is None or base is None:
            return None
        inputs = [one.contiguous() for one in (base, *vectors)]
        made = torch.empty_like(inputs[0])
        integers, results = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
        head = [0, made.numel(), 1, max(made.numel(), 1), PREAD, self._floats.ctypes.data]
        head += [integers.ctypes.data, results.ctypes.data]
        places = [number for one in inputs for number in (-1, 0, one.data_ptr())]
        job = np.array([*head, *places, made.data_ptr()], dtype=np.int64)
        return made if loop(job.ctypes.data, 1, job.nbytes) == FINE else None

    def _write(self) -> str:
        from streaming.loops import write_loop  # only where something is compiled

        return write_loop(self._trace, self._sinks)
