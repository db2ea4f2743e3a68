"""A tensor's merge as compiled loops: from the files' bytes to the output's in one pass, where its method has a formula.

What the loop does not do is left to the torch version: a block with a number that is not finite, an input whose numbers are not
stored as they are merged (but for adapters and other sources, which are read first), dtypes that no loop knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch

from checkpoints.source import TensorRef
from streaming.blocks import Block, Region, TensorSpec
from streaming.elements import Answer, Ask, Change, Formula, Number
from streaming.machine_code import COMPILER, Loop, address_of_pread, has_instructions_for
from streaming.sums import Lanes, fold_regions, lanes_of
from streaming.trace import (
    FINE,
    PIECE_ELEMENTS,
    STORED,
    AddUp,
    Collect,
    Count,
    Sink,
    Store,
    Symbol,
    Trace,
    loop_key,
    only_needed,
)

MAX_ELEMENTS = 1 << 32
"""Of a tensor: beyond, the index of an element has more bits than a loop's random numbers know."""

SPARE_LANES = 40
"""Between the lanes of two sums: without, the same lane of each would be in the way of the other in the nearest cache."""

Lend = Callable[[object, int, torch.dtype], torch.Tensor]
"""Number of one of a thread's buffers, elements and their dtype -> that buffer, `[elements]`."""

PREAD = address_of_pread()


def can_loop(refs: Sequence[TensorRef], dtypes: Sequence[torch.dtype], spec: TensorSpec) -> bool:
    """Whether loops know the stored dtypes of some inputs and of outputs, and a tensor's size."""
    used = {*(ref.info.dtype for ref in refs), *dtypes}
    return bool(PREAD) and spec.numel <= MAX_ELEMENTS and used <= STORED.keys() and has_instructions_for(used)


class TensorLoop:
    """A loop with all of one tensor that does not change from region to region.

    Args:
        spec: the tensor.
        refs: its inputs, in the order of the trace's.
        trace: what is computed.
        sinks: what becomes of it.
    """

    def __init__(self, spec: TensorSpec, refs: Sequence[TensorRef], trace: Trace, sinks: Sequence[Sink]):
        self._spec, self._refs, self._trace, self._sinks = spec, refs, trace, sinks
        self._key = loop_key(trace, sinks)
        self._floats = np.array(trace.floats or [0.0], dtype=np.float32)
        self._integers = np.array(trace.integers_at(0) or [0], dtype=np.int32)
        self._channels = [values.detach().to("cpu", torch.float32).contiguous() for values in trace.channels]
        self._places = [ref.place_in_file() for ref in refs]

    @cached_property
    def loop(self) -> Loop | None:
        """What is compiled, at once where that is not done; None where it cannot be."""
        return COMPILER.get(self._key, self._write)

    def _write(self) -> str:
        from streaming.loops import write_loop  # only where something is compiled

        return write_loop(self._trace, self._sinks)

    def run(self, regions: Sequence[Region], lend: Lend, outputs: Sequence[torch.Tensor | None]) -> np.ndarray | None:
        """Work on the elements of some regions.

        Args:
            regions: any runs of elements.
            lend: see `Lend`.
            outputs: for each sink where to write, one region after the other: a `Store`'s dtype for each element; int32 for a `Collect`,
                with room for one more than its elements for each region; float64 for each lane of an `AddUp`, zeros before.

        Returns: the counts, `[regions, sinks]`; None where a number read or made is not finite, a file cannot be read, or nothing can
            be compiled.
        """
        loop = self.loop
        if loop is None:
            return None
        results = np.zeros((len(regions), max(len(self._sinks), 1)), dtype=np.int64)
        if self._trace.has_indices:
            integers = np.array([self._trace.integers_at(region.start) for region in regions], dtype=np.int32)
        else:
            integers = self._integers[None]
        # The columns of all jobs, in the order of `streaming.loops.write_loop`.
        columns: list[Any] = [
            [region.start for region in regions], [region.stop for region in regions], max(self._spec.rows, 1), max(self._spec.columns, 1),
            PREAD, self._floats.ctypes.data, _rows_of(integers, len(regions)), _rows_of(results, len(regions)),
        ]  # fmt: skip
        # Where the regions' parts of an output begin.
        begins = {
            room: list(accumulate((region.numel + room for region in regions[:-1]), initial=0)) for room in (0, 1)
        }
        lane_begins: list[int] = []
        if (sums := next((sink for sink in self._sinks if isinstance(sink, AddUp)), None)) is not None:
            lanes = [lanes_of(region, sums.channels) for region in regions]
            columns += [[one.span for one in lanes], [one.total for one in lanes]]
            lane_begins = list(accumulate((one.groups * one.total for one in lanes[:-1]), initial=0))
        held = []
        for slot, (ref, place) in enumerate(zip(self._refs, self._places, strict=True)):
            if place is None:
                raw = [
                    ref.read(
                        region.start, region.stop, lend(("raw", slot, at), region.numel * 8, torch.uint8)
                    ).contiguous()
                    for at, region in enumerate(regions)
                ]
                columns += [-1, 0, [values.data_ptr() for values in raw]]
                held.append(raw)
            else:
                buffer = lend(("piece", slot), PIECE_ELEMENTS, ref.info.dtype)
                columns += [*place, buffer.data_ptr()]
        for sink, output in zip(self._sinks, outputs, strict=True):
            if output is None:
                columns.append(0)
                continue
            address, size = output.data_ptr(), output.element_size()
            places = lane_begins if isinstance(sink, AddUp) else begins[isinstance(sink, Collect)]
            columns.append([address + size * begin for begin in places])
        for values in self._channels:
            matrices, rows, per_row = values.shape
            columns += [values.data_ptr(), rows * per_row if matrices > 1 else 0, 1 if rows > 1 else 0]
        jobs = np.empty((len(regions), len(columns)), dtype=np.int64)
        for at, column in enumerate(columns):
            jobs[:, at] = column
        return results if loop(jobs.ctypes.data, len(regions), jobs.strides[0]) == FINE else None


def _rows_of(array: np.ndarray, count: int) -> list[int]:
    """The addresses of the rows of an array, that of its only one `count` times."""
    stride = array.strides[0] if len(array) > 1 else 0
    return [array.ctypes.data + stride * at for at in range(count)]


@dataclass(frozen=True)
class Seen:
    """The numbers of a region that is looked at, float32.

    Attributes:
        block: base, and task vectors or weights; empty where nobody observes the merge.
        merged: `[region.numel]`.
        counts: for how many elements each of the observer's conditions holds.
        changed: what each change made of it, `[region.numel]`; None for an output without one.
    """

    block: Block
    merged: torch.Tensor
    counts: Sequence[int]
    changed: Sequence[torch.Tensor | None]


class Fusion:
    """The loops of one tensor, one for what is only written, one for regions that somebody looks at.

    Args:
        spec: the tensor.
        base: its base, where the merge needs one or an observer looks at it.
        needs_base: whether the merge does.
        inputs: the models'.
        is_delta: whether models are task vectors.
        dtype: of the outputs.
        formula: how an element is merged.
        changes: for each output what becomes of the merged element; None where it is written as it is.
        conditions: what an observer wants counted of an element's task vectors; None without one, so that base and models are not
            looked at.
    """

    def __init__(
        self,
        spec: TensorSpec,
        base: TensorRef | None,
        inputs: Sequence[TensorRef],
        *,
        needs_base: bool,
        is_delta: bool,
        dtype: torch.dtype,
        formula: Formula,
        changes: Sequence[Change | None],
        conditions: Callable[[Sequence[Number]], Sequence[Number]] | None,
    ):
        self.dtype = dtype
        self.changes, self._is_observed, self._is_delta = changes, conditions is not None, is_delta
        self._count = len(inputs)
        # For what is only written.
        refs = [base, *inputs] if needs_base and base is not None else list(inputs)
        trace, merged, results = _write_down(refs, formula, changes, has_base=needs_base, is_delta=is_delta)
        stores = [Store(result, dtype) for result in results]
        self.plain = TensorLoop(spec, refs, trace, stores)
        # For what is looked at: the same, and the numbers before they are rounded.
        if conditions and not needs_base and base is not None:
            refs = [base, *refs]
            trace, merged, results = _write_down(refs, formula, changes, has_base=True, is_delta=is_delta)
        shown = [cast(Symbol, trace.base), *cast(Sequence[Symbol], trace.models)] if conditions else []
        shown += [merged, *(result for result, change in zip(results, changes, strict=True) if change)]
        counted = conditions(cast(Sequence[Number], trace.vectors)) if conditions else []
        sinks: list[Sink] = [Count(cast(Symbol, condition)) for condition in counted]
        sinks += [Store(result, dtype) for result in results] + [Store(one, torch.float32) for one in shown]
        self._counted, self._shown = len(counted), len(shown)
        self.seen = TensorLoop(spec, refs, trace, sinks)

    @cached_property
    def is_compiled(self) -> bool:
        """Whether the loops are there; has them compiled."""
        loops = [self.plain.loop, *([self.seen.loop] if self._shown > 1 else [])]
        return None not in loops

    def look(self, region: Region, lend: Lend, outputs: Sequence[torch.Tensor]) -> Seen | None:
        """Merge a region into outputs, as `plain.run` does, and give its numbers; None as there."""
        numbers = [lend(("seen", at), region.numel, torch.float32) for at in range(self._shown)]
        counts = self.seen.run([region], lend, [*[None] * self._counted, *outputs, *numbers])
        if counts is None:
            return None
        block = Block(region, None, [], [])
        if self._is_observed:
            block.base, models, numbers = numbers[0], numbers[1 : 1 + self._count], numbers[1 + self._count :]
            block.task_vectors, block.weights = (models, []) if self._is_delta else ([], models)
        merged, *changed = numbers
        left = iter(changed)
        return Seen(
            block,
            merged,
            counts[0, : self._counted].tolist(),
            [next(left) if change else None for change in self.changes],
        )


def _write_down(
    refs: Sequence[TensorRef], formula: Formula, changes: Sequence[Change | None], *, has_base: bool, is_delta: bool
) -> tuple[Trace, Symbol, list[Symbol]]:
    """A trace, the merged number in it, and what is written to each output."""
    trace = Trace([ref.info.dtype for ref in refs], has_base=has_base, is_delta=is_delta)
    merged = formula(trace)
    results = [change(trace, merged) if change else merged for change in changes]
    return trace, cast(Symbol, merged), cast(list[Symbol], results)


class Asking:
    """The loop that asks a tensor's elements something.

    Args:
        spec, base, inputs, is_delta: see `Fusion`; base None where the method has no use for it.
        ask: what is asked.

    Attributes:
        adds_up: whether sums are asked for.
        stores: whether a number of every element is.
    """

    def __init__(
        self, spec: TensorSpec, base: TensorRef | None, inputs: Sequence[TensorRef], ask: Ask, *, is_delta: bool
    ):
        refs = [*([base] if base else []), *inputs]
        trace = Trace([ref.info.dtype for ref in refs], has_base=base is not None, is_delta=is_delta)
        question = ask(trace)
        sinks: list[Sink] = [Count(cast(Symbol, condition)) for condition in question.counts]
        sinks += [Collect(*cast(tuple[Symbol, Symbol], pair)) for pair in question.collected]
        sinks += [Store(cast(Symbol, values), torch.int32) for values in question.stored]
        sinks += [AddUp(cast(Symbol, number), question.channels) for number in question.sums]
        trace, sinks, slots = only_needed(trace, sinks)
        self._counts = len(question.counts)
        self._collected = len(question.collected)
        self._stored = len(question.stored)
        self._added, self._channels, self.adds_up = len(question.sums), question.channels, bool(question.sums)
        self.stores = bool(question.stored)
        self.loop = TensorLoop(spec, [refs[slot] for slot in slots], trace, sinks)

    def answers(self, regions: Sequence[Region], lend: Lend) -> list[Answer] | None:
        """What some regions say; None as in `TensorLoop.run`. Arrays are copies."""
        rooms = [region.numel + 1 for region in regions]
        collected = [lend(("collected", at), sum(rooms), torch.int32) for at in range(self._collected)]
        stored = [lend(("stored", at), sum(rooms) - len(rooms), torch.int32) for at in range(self._stored)]
        lanes = [lanes_of(region, self._channels) for region in regions] if self.adds_up else []
        dealt = self._room(lanes, lend) if self.adds_up else None
        found = self.loop.run(
            regions, lend, [*[None] * self._counts, *collected, *stored, *([] if dealt is None else dealt)]
        )
        if found is None:
            return None
        sums = [np.empty(0)] * len(regions)
        if dealt is not None:
            sums = fold_regions(dealt.numpy(), lanes, regions, self._channels)
        arrays = [values.numpy() for values in collected], [values.numpy() for values in stored]
        answers = []
        begin = 0
        for at, (region, counts) in enumerate(zip(regions, found.tolist(), strict=True)):
            first = begin + at  # each region before has room for one more
            few = [
                values[first : first + count].copy()
                for values, count in zip(arrays[0], counts[self._counts : self._counts + self._collected], strict=True)
            ]
            whole = [values[begin : begin + region.numel].copy() for values in arrays[1]]
            answers.append(Answer(region, counts[: self._counts], few, whole, sums[at]))
            begin += region.numel
        return answers

    def _room(self, lanes: Sequence[Lanes], lend: Lend) -> torch.Tensor:
        """Where lanes add up: `[sums, lanes]` float64, zeros."""
        count = SPARE_LANES + sum(one.groups * one.total for one in lanes)
        return lend("lanes", self._added * count, torch.float64).view(self._added, count).zero_()


class Loading:
    """The loop that makes blocks for functions of torch's: reads, widens, looks for what is not finite and subtracts the base.

    Args: see `Asking`.
        formula: how an element is merged: then a block's one model is the merge.
    """

    def __init__(
        self,
        spec: TensorSpec,
        base: TensorRef | None,
        inputs: Sequence[TensorRef],
        *,
        is_delta: bool,
        formula: Formula | None = None,
    ):
        refs = [*([base] if base else []), *inputs]
        trace = Trace([ref.info.dtype for ref in refs], has_base=base is not None, is_delta=is_delta)
        models = [formula(trace)] if formula else trace.models
        numbers = [*([trace.base] if base else []), *models]
        self._has_base, self._is_delta, self._count = base is not None, is_delta and formula is None, len(numbers)
        self.loop = TensorLoop(spec, refs, trace, [Store(cast(Symbol, one), torch.float32) for one in numbers])

    def block(self, region: Region, lend: Lend) -> Block | None:
        """A block in a thread's buffers; None as in `TensorLoop.run`."""
        numbers = [lend(("loaded", at), region.numel, torch.float32) for at in range(self._count)]
        if self.loop.run([region], lend, numbers) is None:
            return None
        base = numbers.pop(0) if self._has_base else None
        return Block(region, base, numbers, []) if self._is_delta else Block(region, base, [], numbers)
