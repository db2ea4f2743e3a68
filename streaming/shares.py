"""Share the tensors of a work out among processes, by bytes, down to blocks of rows of one tensor."""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Collection, Sequence
from dataclasses import replace

from checkpoints.staging import Stage
from checkpoints.writer import CheckpointWriter, Shard
from streaming.blocks import tile
from streaming.processes import Processes
from streaming.stream import PlannedTensor, Transform, applied_to, block_elements, bytes_read
from streaming.tally import Tally
from streaming.work import Spans, Variant, bytes_written, gaps


def share_out(
    tensors: Sequence[PlannedTensor], variants: Sequence[Variant], count: int, elements: int
) -> list[list[PlannedTensor]]:
    """Tensors, or parts of them, for each of `count` processes: consecutive ones, in the order given, of as many bytes as they can.

    A tensor that is measured before it is merged stays whole, as every part of it would need all of it; others are cut where a
    block begins, so that the blocks are those of one process.

    Args:
        variants: what is written of them.
        elements: of a block.
    """
    costs = [cost_of(tensor, variants) for tensor in tensors]
    bounds = [sum(costs) * number / count for number in range(1, count)]
    shares: list[list[PlannedTensor]] = [[] for _ in range(count)]
    begin = 0.0
    for tensor, cost in zip(tensors, costs, strict=True):
        inside = [(bound - begin) / cost for bound in bounds if begin < bound < begin + cost]
        first = bisect(bounds, begin)
        if not inside or is_measured(tensor, variants):
            shares[bisect(bounds, begin + cost / 2)].append(tensor)
        else:
            for number, part in enumerate(_cut(tensor, inside, _block_of(tensor, variants, elements))):
                if part is not None:
                    shares[first + number].append(part)
        begin += cost
    return shares


def cost_of(tensor: PlannedTensor, variants: Sequence[Variant]) -> int:
    """Bytes that are read, twice where the tensor is measured, and written."""
    times = 2 if is_measured(tensor, variants) else 1
    return times * bytes_read([tensor], _transforms(variants)) + len(variants) * bytes_written([tensor])


def is_measured(tensor: PlannedTensor, variants: Sequence[Variant]) -> bool:
    """Whether a method or a transform looks at all of a tensor before it is merged."""
    methods = {id(one.methods): one.methods[tensor.spec.name] if one.methods else tensor.method for one in variants}
    if any(method is not None and method.measures for method in methods.values()):
        return True
    return tensor.method is not None and any(
        each.measures(tensor.spec) for each in applied_to(tensor.spec.name, _transforms(variants))
    )


def _transforms(variants: Sequence[Variant]) -> list[Transform | None]:
    return [variant.transform for variant in variants]


def _block_of(tensor: PlannedTensor, variants: Sequence[Variant], elements: int) -> int:
    """Elements of a block, for whatever is made of the tensor."""
    name = tensor.spec.name
    methods = [tensor.method, *(one.methods[name] for one in variants if one.methods)]
    return block_elements(elements, name, methods, applied_to(name, _transforms(variants)))


def _cut(tensor: PlannedTensor, at: Sequence[float], elements: int) -> list[PlannedTensor | None]:
    """A tensor cut near these shares of its elements, at the nearest beginning of a block; None for a part without elements."""
    begin, end = tensor.part or (0, tensor.spec.numel)
    starts = [region.start for region in tile(tensor.spec, elements, (begin, end))] + [end]
    cuts = [min(starts, key=lambda start: abs(start - begin - share * (end - begin))) for share in at]
    edges = [begin, *cuts, end]
    return [
        None if first == last else tensor if (first, last) == (begin, end) else replace(tensor, part=(first, last))
        for first, last in itertools.pairwise(edges)
    ]


def share_of(
    processes: Processes,
    tensors: Sequence[PlannedTensor],
    shards: Sequence[Shard],
    variants: Sequence[Variant],
    elements: int,
) -> list[PlannedTensor]:
    """What a process streams of some tensors: a share, which lies together in the files. `elements`: of a block."""
    place = {name: (number, offset) for number, shard in enumerate(shards) for name, offset in shard.offsets.items()}
    ordered = sorted(tensors, key=lambda tensor: (*place[tensor.spec.name], tensor.part or (0, 0)))
    return share_out(ordered, variants, processes.size, elements)[processes.rank]


def take_over(
    stage: Stage,
    tensors: Sequence[PlannedTensor],
    known: tuple[Collection[str], Spans],
    mine: Sequence[tuple[str, tuple[int, int] | None]],
    writers: Sequence[CheckpointWriter],
    tallies: Sequence[Tally],
) -> frozenset[int]:
    """Put together what all processes, and earlier runs, have written: the bytes in the writers, the sums in the tallies.

    Args:
        tensors: all of the work.
        known: what an earlier run had finished, which the writers know: whole tensors, and parts of others.
        mine: what this process has written since: tensors, and which part of them where it is not all.

    Returns: positions of models that differ from the base.
    """
    done, (usable, spans) = stage.gather(), known
    own = {*usable, *(name for name, part in mine if part is None)}
    parts: dict[str, list[tuple[int, int]]] = {name: list(there) for name, there in spans.items()}
    for name, part in mine:
        if part is not None:
            parts.setdefault(name, []).append(part)
    whole: list[str] = []
    missing: dict[str, list[tuple[int, int]]] = {}
    for name, numel in ((tensor.spec.name, tensor.spec.numel) for tensor in tensors if tensor.spec.name not in own):
        if name in done.tensors:
            whole.append(name)
            for tally, numbers in zip(tallies, done.tensors[name], strict=True):
                tally.restore(name, numbers)
            continue
        noted = done.parts.get(name, ())
        if gaps(numel, [(part.start, part.stop) for part in noted]):
            raise RuntimeError(f"{name}: a process says that it is done, and has not written all of its share")
        missing[name] = gaps(numel, sorted(parts.get(name, ())))
        for written in noted:
            for tally, rows in zip(tallies, written.notes, strict=True):
                tally.put(name, rows)
        for tally in tallies:
            tally.close(name)
    for number, writer in enumerate(writers):
        writer.adopt(frozenset(whole), missing, done.chunks[number] if number < len(done.chunks) else {})
    return done.changed
