"""What a job would take if several processes shared it: bytes, memory and time of each, for whoever asks a scheduler for machines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from streaming.blocks import TensorSpec
from streaming.shares import cost_of, is_measured, share_out
from streaming.stream import WORTH_LOOPS, Output, PlannedTensor, StreamOptions, Transform, bytes_read, stream
from streaming.work import Variant, Work, bytes_written
from streaming.workers import available_cores

PROCESS_BYTES = 300_000_000
"""Resident memory of a process with its libraries before it has a block."""
BUFFER_BYTES = 12
"""Of a thread for each element of a block and each input: as stored, and as float32."""
SAMPLE_ELEMENTS = 1 << 24
"""Merged to know how long it takes."""


@dataclass(frozen=True)
class Rate:
    """How fast this machine merges.

    Attributes:
        seconds_per_byte: of one thread, for each byte read and written (twice where it is measured first), nothing written.
        sample_bytes: that were merged to know it.
    """

    seconds_per_byte: float
    sample_bytes: int


class Nowhere:
    """A writer of nothing; a `streaming.stream.Writer`."""

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write nothing."""


class Relaxed:
    """Stands for a step's transform before it is known: it reads the base of every tensor."""

    def applies_to(self, tensor: str) -> bool:
        """Yes."""
        return True

    def whole_rows(self, tensor: str) -> bool:
        """No."""
        return False

    def measures(self, tensor: TensorSpec) -> bool:
        """No."""
        return False


def shares_as_json(
    work: Work, count: int, options: StreamOptions, folders: int, rate: Rate | None, *, relaxes: bool = False
) -> dict[str, Any]:
    """The shares of so many processes, for programs.

    Args:
        folders: checkpoints that are written.
        rate: of this machine; None where it is not known, and so no time.
        relaxes: whether a step reads the base beside it.
    """
    merges = work.merges()
    transform = cast(Transform, Relaxed()) if relaxes else None
    variants = [replace(merge, transform=transform) for merge in merges for _ in range(folders // len(merges))]
    threads = options.workers or available_cores()
    inputs = max((1 + len(tensor.inputs) for tensor in work.tensors), default=1)
    memory = PROCESS_BYTES + threads * inputs * BUFFER_BYTES * options.elements
    shares = share_out(work.tensors, variants, count, options.elements)
    costs = [sum(cost_of(tensor, variants) for tensor in share) for share in shares]
    listed = [
        {
            "process": rank,
            "tensors": len(share),
            "parts": sum(tensor.part is not None for tensor in share),
            "bytes_to_read": bytes_read(share, [transform]),
            "bytes_to_write": len(variants) * bytes_written(share),
            "memory_bytes": memory + max((_held(tensor, variants) for tensor in share), default=0),
            "expected_seconds": None if rate is None else round(cost * rate.seconds_per_byte / threads, 3),
        }
        for rank, (share, cost) in enumerate(zip(shares, costs, strict=True))
    ]
    longest = None if rate is None else round(max(costs) * rate.seconds_per_byte / threads, 3)
    return {
        "count": count,
        "threads": threads,
        "expected_seconds": longest,
        "time_is_of": None
        if rate is None
        else f"merging {rate.sample_bytes:,} bytes of it here; without writing, starting and calibrating",
        "shares": listed,
    }


def _held(tensor: PlannedTensor, variants: Sequence[Variant]) -> int:
    """Bytes that a tensor which is measured may have in memory as a whole: its merge in float32."""
    return 4 * tensor.numel if is_measured(tensor, variants) and not tensor.spec.is_vector else 0


def measure_rate(work: Work, options: StreamOptions) -> Rate | None:
    """Merge a sample of a work into nothing, and time it; None where there is nothing to merge. Raises InputError as `stream`."""
    merged = [tensor for tensor in work.tensors if tensor.method is not None and tensor.numel]
    if not merged:
        return None
    variants = [Variant()]
    largest = max(merged, key=lambda tensor: (tensor.numel <= SAMPLE_ELEMENTS, min(tensor.numel, SAMPLE_ELEMENTS)))
    parts = share_out([largest], variants, max(1, largest.numel // SAMPLE_ELEMENTS), options.elements)
    sample = next(share for share in parts if share)
    compiled = True if bytes_read(work.tensors) >= WORTH_LOOPS else options.compiled
    seconds = 0.0
    for _ in range(2):  # the first time loads and compiles
        started = time.monotonic()
        stream(sample, [Output(Nowhere())], options=replace(options, workers=1, compiled=compiled))
        seconds = time.monotonic() - started
    size = sum(cost_of(tensor, variants) for tensor in sample)
    return Rate(seconds / max(1, size), size)
