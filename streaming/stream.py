"""The loop: read a block of every input -> task vectors -> method -> transforms -> write, in bounded memory."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from checkpoints.errors import InputError
from checkpoints.pieces import Origin
from checkpoints.settings import setting
from checkpoints.source import TensorRef, dtype_name
from streaming.ahead import read_ahead
from streaming.blocks import BLOCK_ELEMENTS, GRID_ELEMENTS, Block, Partial, Region, Scan, TensorSpec, in_groups, tile
from streaming.elements import Answer, Ask, Change, Formula, Number, Tensors, answer
from streaming.fused import Asking, Fusion, Lend, Loading, Seen, can_loop
from streaming.machine_code import can_compile
from streaming.tally import Tally, sample_of
from streaming.twins import compiling, twin
from streaming.workers import Workers

WORTH_LOOPS = 10**8
"""Bytes of input from which LLVM's loops repay the tenth of a second that each takes to be made."""
WORTH_TWINS = 2 * 10**9
"""Bytes of input from which numba's repay the second that it takes to have them."""
FUSED_ELEMENTS = 8 * GRID_ELEMENTS
"""Elements that a compiled loop works on between two turns of Python's: their output should lie in the caches until it is written."""

_thread = threading.local()


class Merger(Protocol):
    """How the blocks of one tensor become one: a merging method with its parameters (`merging.methods`)."""

    space: ClassVar[Literal["task_vectors", "weights"]]
    """What it wants of the models: fine-tuned minus base, or the weights themselves."""
    reads_base: ClassVar[bool]
    """Whether it wants the base too; whoever wants task vectors does."""
    whole_rows: ClassVar[bool]
    """Whether its blocks must hold whole rows, where a row has at most `GRID_ELEMENTS`."""

    @property
    def measures(self) -> bool:
        """Whether `measure` may read the tensor."""
        ...

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """Statistics of a whole tensor, which `combine` needs; None where it needs none."""
        ...

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """One block of the output, `[block.region.numel]` float32; may overwrite the block, the base excepted."""
        ...

    def formula(self, tensor: TensorSpec, statistics: Any) -> Formula | None:
        """What `combine` makes of one element, to be compiled; None where it takes more than the element's numbers."""
        ...


class Observer(Protocol):
    """Looks at some of the blocks that stream by, before and after they are merged (the merge report)."""

    @property
    def tally(self) -> Tally:
        """What it has seen."""
        ...

    def sampled(self, region: Region) -> Sequence[slice]:
        """The parts of a region that it wants to see."""
        ...

    def conditions(self, vectors: Sequence[Number]) -> Sequence[Number]:
        """What it wants counted of an element, given its task vectors (`streaming.elements`)."""
        ...

    def observe(self, block: Block, sampled: Sequence[slice], counts: Sequence[Sequence[int]] | None = None) -> Any:
        """Look at a block before it is merged; what it returns goes to `record`.

        Args:
            counts: for each part for how many elements each of `conditions` holds; None where nobody has counted.
        """
        ...

    def record(self, block: Block, merged: torch.Tensor, sampled: Sequence[slice], seen: Any) -> None:
        """Look at the merged block, `[region.numel]` float32, and at the base."""
        ...


class Transform(Protocol):
    """A change of the merged block before its one rounding (AIM's relaxation is one)."""

    # A run's transforms are alike but for how far they go: what one of them measures is every one's.

    @property
    def tally(self) -> Tally:
        """How much it has changed."""
        ...

    def applies_to(self, tensor: str) -> bool:
        """Whether it changes the output tensor of this name at all."""
        ...

    def whole_rows(self, tensor: str) -> bool:
        """Whether the blocks of a tensor must hold whole rows; see `Merger.whole_rows`."""
        ...

    def measures(self, tensor: TensorSpec) -> bool:
        """Whether `measure` reads a tensor."""
        ...

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """Statistics of a whole merged tensor, which all transforms of a run share; None where it needs none.

        Args:
            scan: its blocks hold the base, and the merge as their one model's `weights`.
        """
        ...

    def formula(self, tensor: TensorSpec, statistics: Any) -> Change | None:
        """What a call makes of one element, to be compiled; None where it takes more than the element's numbers."""
        ...

    def look(self, region: Region, merged: torch.Tensor, changed: torch.Tensor) -> None:
        """Count what was changed.

        Args:
            region: some elements, whole parts of a sample (`streaming.tally.sample_of`).
            merged, changed: before and after, `[region.numel]` float32.
        """
        ...

    def __call__(self, region: Region, base: torch.Tensor, merged: torch.Tensor, statistics: Any) -> torch.Tensor:
        """The block to be written, `[region.numel]` float32, from the base's and the merged one, neither overwritten.

        Args:
            statistics: what `measure` gave for this tensor.
        """
        ...


class Writer(Protocol):
    """Where an output's numbers go: the files of a checkpoint (`CheckpointWriter`), or a model in memory."""

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put `values`, `[n]` on the CPU in the tensor's dtype, at the elements `start` to `start + n`; from any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Output:
    """One checkpoint to be written from the merge: the writer, and what changes the merge on its way there."""

    writer: Writer
    transform: Transform | None = None


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor and its sources.

    Attributes:
        method: how it is merged; None where it is copied from the base as stored.
        base: None only where the output has no base.
        inputs: the fine-tuned models' tensors, in the recipe's order; shapes equal to the output's.
        dtype: of the output.
        note: why it is copied.
        origins: what it is in the base's files, where that is no tensor of its name: one, or one for each of its experts.
        part: first element, and the one after the last, of what is to be written of it; None for all.
    """

    spec: TensorSpec
    dtype: torch.dtype
    base: TensorRef
    inputs: tuple[TensorRef, ...]
    method: Merger | None
    note: str = ""
    origins: tuple[Origin, ...] = ()
    part: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements to be written."""
        return self.part[1] - self.part[0] if self.part else self.spec.numel

    def needs_base(self, transforms: Sequence[Transform | None]) -> bool:
        """Whether the base is read: not for a method that has no use for it, unless a transform asks for it."""
        return (
            self.method is None
            or self.method.reads_base
            or any(transform and transform.applies_to(self.spec.name) for transform in transforms)
        )

    def sources(self, transforms: Sequence[Transform | None]) -> tuple[TensorRef, ...]:
        """The tensors that are read whole, given what the outputs make of the merge."""
        inputs = self.inputs if self.method else ()
        return (self.base, *inputs) if self.needs_base(transforms) else inputs


def applied_to(name: str, transforms: Sequence[Transform | None]) -> list[Transform]:
    """The transforms that change a tensor."""
    return [each for each in transforms if each and each.applies_to(name)]


def block_elements(elements: int, name: str, methods: Sequence[Merger | None], transforms: Sequence[Transform]) -> int:
    """Elements of a tensor's blocks: as asked for, and more where a block has to hold whole rows."""
    whole_rows = any(method is not None and method.whole_rows for method in methods)
    whole_rows = whole_rows or any(each.whole_rows(name) for each in transforms)
    return max(elements, GRID_ELEMENTS if whole_rows else 1)


def bytes_read(tensors: Sequence[PlannedTensor], transforms: Sequence[Transform | None] = ()) -> int:
    """Bytes of every input tensor that a stream needs, each counted once; of a part its share."""
    return sum(
        ref.info.nbytes * tensor.numel // max(1, tensor.spec.numel)
        for tensor in tensors
        for ref in tensor.sources(transforms)
    )


@dataclass(frozen=True)
class StreamOptions:
    """How to run; nothing here changes a bit of the result.

    Attributes:
        block_elements: elements merged at a time (default: `BLOCK_ELEMENTS` on the CPU, 8 times that on a GPU).
        workers: threads; None for one per core.
        allow_non_finite: let a NaN or an infinity through, from an input or by overflow, and count it.
        compiled: use compiled loops on a CPU (`streaming.fused`, `streaming.twins`); None for where it is worth it.
    """

    device: torch.device = torch.device("cpu")
    workers: int | None = None
    block_elements: int | None = None
    allow_non_finite: bool = False
    compiled: bool | None = None

    @property
    def elements(self) -> int:
        """Elements of a block of `combine`."""
        return self.block_elements or (BLOCK_ELEMENTS if self.device.type == "cpu" else 8 * BLOCK_ELEMENTS)


def stream(
    tensors: Sequence[PlannedTensor],
    outputs: Sequence[Output],
    *,
    options: StreamOptions,
    observer: Observer | None = None,
    progress: Callable[[int], object] = lambda count: None,
    finished: Callable[[PlannedTensor, set[int], float], object] = lambda tensor, changed, seconds: None,
    changed: Iterable[int] = (),
    non_finite: Tally | None = None,
) -> set[int]:
    """Merge every tensor into every output, reading each input once for `combine` (and as often as `measure` asks).

    Args:
        tensors: what to write, and from what.
        outputs: the checkpoints to write; all of them get every tensor.
        options: device, threads, size of a block.
        observer: shown some of the blocks, where given.
        progress: called with the number of bytes read and written, from several threads.
        finished: called with each tensor when all of it is written, `changed` so far, and the seconds it took,
            from several threads.
        changed: positions of models that are known to differ from the base.
        non_finite: gets the numbers of elements that are NaN or infinite in the outputs, where the options let them be.

    Returns: `changed`, and the models of which a method in delta space saw a task vector that is not zero throughout.

    Raises: InputError: a number that is not finite, a file that cannot be read or written.
    """
    uses_loops, uses_twins = (_is_worth(tensors, options, least) for least in (WORTH_LOOPS, WORTH_TWINS))
    with (
        compiling() if uses_twins else nullcontext(),
        closing(Workers(options.workers, compiled=uses_twins)) as workers,
    ):
        counted = non_finite or count_non_finite(len(outputs))
        state = _Stream(workers, outputs, options, observer, progress, counted, uses_loops=uses_loops and can_compile())
        state.changed.update(changed)

        def merge_tensor(tensor: PlannedTensor) -> None:
            started = time.monotonic()
            state.merge_tensor(tensor)
            finished(tensor, set(state.changed), time.monotonic() - started)

        workers.run_tensors(merge_tensor, tensors)
    return state.changed


def _is_worth(tensors: Sequence[PlannedTensor], options: StreamOptions, least: int) -> bool:
    """Whether something compiled is used that takes so many bytes of input to be worth it."""
    if options.device.type != "cpu":
        return False
    return bytes_read(tensors) >= least if options.compiled is None else options.compiled


def count_non_finite(outputs: int = 1) -> Tally:
    """A tally of elements that are NaN or infinite, in so many outputs together."""
    return Tally(1, lambda sums: {"non_finite": int(sums[0])}, places=outputs)


def expect_changes(tensors: Sequence[PlannedTensor]) -> set[int]:
    """Positions of the models whose task vectors a method will see."""
    seen = [tensor for tensor in tensors if tensor.method is not None and tensor.method.space == "task_vectors"]
    return {index for tensor in seen for index in range(len(tensor.inputs))}


class _Stream:
    """What the threads of one run share."""

    def __init__(
        self,
        workers: Workers,
        outputs: Sequence[Output],
        options: StreamOptions,
        observer: Observer | None,
        progress: Callable[[int], object],
        non_finite: Tally,
        *,
        uses_loops: bool,
    ):
        self._workers = workers
        self._outputs = outputs
        self._options = options
        self._observer = observer
        self._progress = progress
        self._non_finite = non_finite
        self._transforms = [output.transform for output in outputs]
        self._local = threading.local()
        self._uses_loops = uses_loops
        self.changed: set[int] = set()
        """Models of which a change has been seen."""

    def merge_tensor(self, tensor: PlannedTensor) -> None:
        """Write one tensor to every output."""
        name, method = tensor.spec.name, tensor.method
        transforms = applied_to(name, self._transforms) if method else []
        elements = block_elements(self._options.elements, name, [method], transforms)
        if method is None:
            work: Callable[[Region], None] = lambda region: self._copy(tensor, region)  # noqa: E731
        else:
            statistics = method.measure(tensor.spec, self._scan_inputs(tensor))
            loading = functools.cache(
                lambda: self._load_merged(tensor, statistics)
            )  # where a transform asks for numbers
            scan = self._scan(tensor, lambda region: self._merged(tensor, region, statistics, loading()))
            measured = transforms[0].measure(tensor.spec, scan) if transforms else None
            fusion = self._fuse(tensor, statistics, measured) if tensor.spec.numel else None
            loop = loading() if transforms and fusion is None and tensor.spec.numel else None
            work = lambda region: self._combine(tensor, statistics, measured, fusion or loop, region)  # noqa: E731
            if fusion and fusion.is_compiled and self._options.block_elements is None:
                elements = FUSED_ELEMENTS
        regions = list(tile(tensor.spec, elements, tensor.part))
        for _ in self._workers.map_ordered(work, read_ahead(tensor.sources(self._transforms), regions)):
            pass

    def _fuse(self, tensor: PlannedTensor, statistics: Any, measured: Any) -> Fusion | None:
        """The tensor's merge as compiled loops; None where torch has to do it."""
        method, name = tensor.method, tensor.spec.name
        assert method is not None
        needs_base = tensor.needs_base(self._transforms)
        base = tensor.base if needs_base or self._observer else None
        refs = [*([base] if base else []), *tensor.inputs]
        if not self._uses_loops or not can_loop(refs, [tensor.dtype], tensor.spec):
            return None
        formula = method.formula(tensor.spec, statistics)
        transforms = [transform if transform and transform.applies_to(name) else None for transform in self._transforms]
        changes = [transform.formula(tensor.spec, measured) if transform else None for transform in transforms]
        if formula is None or any(
            (change is None) != (transform is None) for change, transform in zip(changes, transforms, strict=True)
        ):
            return None
        return Fusion(
            tensor.spec,
            base,
            tensor.inputs,
            needs_base=needs_base,
            is_delta=method.space == "task_vectors",
            dtype=tensor.dtype,
            formula=formula,
            changes=changes,
            conditions=self._observer.conditions if self._observer else None,
        )

    def _scan(self, tensor: PlannedTensor, block_of: Callable[[Region], Block]) -> _Scan:
        return _Scan(tensor, tensor.sources(self._transforms), block_of, self._workers)

    def _scan_inputs(self, tensor: PlannedTensor) -> _Scan:
        """A scan of what a method merges, by loops where there are any."""
        assert tensor.method is not None
        needs_base = tensor.needs_base(self._transforms)
        refs = [*([tensor.base] if needs_base else []), *tensor.inputs]
        if not self._uses_loops or not can_loop(refs, (), tensor.spec):
            return self._scan(tensor, lambda region: self._fetch(tensor, region))
        is_delta = tensor.method.space == "task_vectors"
        base = tensor.base if needs_base else None
        loading = Loading(tensor.spec, base, tensor.inputs, is_delta=is_delta)
        scan = self._scan(tensor, lambda region: loading.block(region, self._lend) or self._fetch(tensor, region))

        scan.asking = functools.partial(Asking, tensor.spec, base, tensor.inputs, is_delta=is_delta)
        scan.lend = self._lend
        return scan

    def _load_merged(self, tensor: PlannedTensor, statistics: Any) -> Loading | None:
        """The loop that makes `_merged`'s blocks; None where torch has to make them."""
        method = tensor.method
        assert method is not None
        refs = [tensor.base, *tensor.inputs]
        if not self._uses_loops or not can_loop(refs, (), tensor.spec):
            return None
        formula = method.formula(tensor.spec, statistics)
        if formula is None:
            return None
        is_delta = method.space == "task_vectors"
        return Loading(tensor.spec, tensor.base, tensor.inputs, is_delta=is_delta, formula=formula)

    def _merged(self, tensor: PlannedTensor, region: Region, statistics: Any, loading: Loading | None) -> Block:
        """The base and the merge of a region, as a block whose one model is the merge."""
        assert tensor.method is not None
        if loading is not None and loading.loop.loop is not None:
            if tensor.method.space == "task_vectors":
                self._look_for_changes(tensor, region)
            by_loop = loading.block(region, self._lend)
            if by_loop is not None:
                return by_loop
        block = self._fetch(tensor, region)
        return Block(region, block.base, [], [tensor.method.combine(block, statistics)])

    def _combine(
        self, tensor: PlannedTensor, statistics: Any, measured: Any, loop: Fusion | Loading | None, region: Region
    ) -> None:
        if isinstance(loop, Loading) and not (self._observer and self._observer.sampled(region)):
            block = self._merged(tensor, region, statistics, loop)
            self._transform(tensor, region, block.base, block.weights[0], measured)
        elif not isinstance(loop, Fusion) or not loop.is_compiled or not self._run_fused(tensor, loop, region):
            self._combine_in_torch(tensor, statistics, measured, region)
        read = tensor.sources(self._transforms)
        itemsizes = sum(ref.info.dtype.itemsize for ref in read) + tensor.dtype.itemsize * len(self._outputs)
        self._progress(region.numel * itemsizes)

    def _run_fused(self, tensor: PlannedTensor, fusion: Fusion, region: Region) -> bool:
        """Merge a region by loops, those parts that somebody looks at by a loop that shows their numbers. False: torch has to do it."""
        assert tensor.method is not None
        if tensor.method.space == "task_vectors":
            self._look_for_changes(tensor, region)
        results = [self._lend(("result", at), region.numel, fusion.dtype) for at in range(len(self._outputs))]
        observed = self._observer.sampled(region) if self._observer else ()
        tallied = sample_of(region) if any(fusion.changes) else []
        position = 0
        for part in sorted({*((one.start, one.stop) for one in (*observed, *tallied)), (region.numel, region.numel)}):
            before = slice(position, part[0])
            if before.start < before.stop:
                outputs = [result[before] for result in results]
                if fusion.plain.run([_within(region, before)], self._lend, outputs) is None:
                    return False
            seen_at = slice(*part)
            if seen_at.start < seen_at.stop:
                seen = fusion.look(_within(region, seen_at), self._lend, [result[seen_at] for result in results])
                if seen is None:
                    return False
                self._show(seen, observes=seen_at in observed, tallies=seen_at in tallied)
            position = part[1]
        for output, result in zip(self._outputs, results, strict=True):
            output.writer.write(tensor.spec.name, region.start, result)
        return True

    def _show(self, seen: Seen, *, observes: bool, tallies: bool) -> None:
        """Have the observer, and the transforms, look at a part of a region that is merged."""
        region = seen.block.region
        if observes and self._observer:
            whole = [slice(0, region.numel)]
            looked = self._observer.observe(seen.block, whole, [seen.counts])
            self._observer.record(seen.block, seen.merged, whole, looked)
        for transform, changed in zip(self._transforms, seen.changed, strict=True):
            if tallies and transform and changed is not None:
                transform.look(region, seen.merged, changed)

    def _look_for_changes(self, tensor: PlannedTensor, region: Region) -> None:
        """Note the models whose numbers in a region are not the base's; of those that are known to differ nothing is read."""
        base: torch.Tensor | None = None
        for model, ref in enumerate(tensor.inputs):
            if model not in self.changed:
                if base is None:
                    base = tensor.base.read(region.start, region.stop, self._buffer(0, region.numel * 8)).float()
                values = ref.read(region.start, region.stop, self._buffer(2, region.numel * 8))
                if not torch.equal(values.float(), base):
                    self.changed.add(model)

    def _combine_in_torch(self, tensor: PlannedTensor, statistics: Any, measured: Any, region: Region) -> None:
        assert tensor.method is not None
        sampled = self._observer.sampled(region) if self._observer else ()
        block = self._fetch(tensor, region, base_for=bool(sampled))
        seen = self._observer.observe(block, sampled) if self._observer and sampled else None
        merged = tensor.method.combine(block, statistics)
        if self._observer and seen is not None:
            self._observer.record(block, merged, sampled, seen)
        self._transform(tensor, region, block.base, merged, measured)

    def _transform(
        self, tensor: PlannedTensor, region: Region, base: torch.Tensor | None, merged: torch.Tensor, measured: Any
    ) -> None:
        """Make of a merged region what each output wants of it, and write that."""
        for output in self._outputs:
            transform = output.transform if output.transform and output.transform.applies_to(tensor.spec.name) else None
            result = merged if transform is None else transform(region, base, merged, measured)  # type: ignore[arg-type]
            self._write(output, tensor, region, result)

    def _write(self, output: Output, tensor: PlannedTensor, region: Region, result: torch.Tensor) -> None:
        """Round once, and write."""
        rounded, is_finite = round_to(result, tensor.dtype)
        if not is_finite:
            if self._options.allow_non_finite:
                self._count(output, tensor, region, rounded)
                output.writer.write(tensor.spec.name, region.start, rounded)
                return
            raise InputError(
                f"{tensor.spec.name}: the merge is not finite in {dtype_name(tensor.dtype)}: a value of {float(result.abs().max()):g} "
                f"exceeds the {torch.finfo(tensor.dtype).max:g} it can hold. Use {setting('out_dtype', 'bfloat16')} or float32, or smaller weights."
            )
        output.writer.write(tensor.spec.name, region.start, rounded)

    def _count(self, output: Output, tensor: PlannedTensor, region: Region, written: torch.Tensor) -> None:
        """Note how many elements of a region of one output are not finite."""
        place = region.start * len(self._outputs) + self._outputs.index(output)
        self._non_finite.add(tensor.spec.name, place, (int((~written.isfinite()).sum()),))

    def _copy(self, tensor: PlannedTensor, region: Region) -> None:
        raw = tensor.base.read(region.start, region.stop, self._buffer(0, region.numel * 8))
        if raw.dtype.is_floating_point and not self._options.allow_non_finite and not all_finite(raw.float()):
            raise not_finite(raw, tensor.base, region)
        for output in self._outputs:
            self._write(output, tensor, region, raw if raw.dtype == tensor.dtype else raw.to(torch.float32))
        self._progress(region.numel * (raw.itemsize + tensor.dtype.itemsize * len(self._outputs)))

    def _fetch(self, tensor: PlannedTensor, region: Region, *, base_for: bool = False) -> Block:
        """Read a region of every input the method and the transforms need, as float32 on the device."""
        assert tensor.method is not None
        needs_base = base_for or tensor.needs_base(self._transforms)
        base = self._read(tensor.base, region, 0) if needs_base else None
        minus = base if tensor.method.space == "task_vectors" else None
        models = [self._read(ref, region, slot, minus) for slot, ref in enumerate(tensor.inputs, 1)]
        if tensor.method.space == "weights":
            return Block(region, base, [], models)
        return Block(region, base, models, [])

    def _read(self, ref: TensorRef, region: Region, slot: int, minus: torch.Tensor | None = None) -> torch.Tensor:
        """One input's region in this thread's buffers of that slot, `minus` another; refused where it holds a NaN or an infinity."""
        raw = ref.read(region.start, region.stop, self._buffer(2 * slot, region.numel * 8, pinned=True))
        values = self._buffer(2 * slot + 1, region.numel * 4, self._options.device).view(torch.float32)
        model = slot - 1
        look = minus is not None and model not in self.changed
        is_finite, is_changed = load(raw, values, minus, look)
        if not is_finite and not self._options.allow_non_finite:
            raise not_finite(raw, ref, region)
        if is_changed:
            self.changed.add(model)
        return values

    def _lend(self, key: object, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of this thread's as numbers: `[count]`. Kept as such: each call into torch is a turn of Python's lock."""
        known: dict[object, tuple[int, torch.dtype, torch.Tensor]] = self._local.__dict__.setdefault("numbers", {})
        last = known.get(key)
        if last is None or last[:2] != (count, dtype):
            last = known[key] = count, dtype, self._buffer(key, count * dtype.itemsize).view(dtype)
        return last[2]

    def _buffer(
        self, key: object, nbytes: int, device: torch.device = torch.device("cpu"), *, pinned: bool = False
    ) -> torch.Tensor:
        """This thread's byte buffer number `key`, made when first asked for, at least `nbytes` long: `[nbytes]` uint8."""
        buffers: dict[object, torch.Tensor] = self._local.__dict__.setdefault("buffers", {})
        if key not in buffers or buffers[key].numel() < nbytes:
            pin = pinned and self._options.device.type == "cuda"
            buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin)
        return buffers[key][:nbytes]


class _Scan:
    """Runs functions over blocks of one tensor (`streaming.blocks.Scan`), and asks its elements by loops (`streaming.elements.ask`).

    Attributes:
        asking: makes the loop of a question; None where there are no loops.
        lend: gives threads their buffers.
    """

    def __init__(
        self, tensor: PlannedTensor, refs: Sequence[TensorRef], block_of: Callable[[Region], Block], workers: Workers
    ):
        self._tensor, self._block_of, self._workers, self._refs = tensor, block_of, workers, refs
        self.asking: Callable[[Ask], Asking] | None = None
        self.lend: Lend | None = None

    def __call__(
        self, measure: Callable[[Block], Partial], regions: Sequence[Region] | None = None
    ) -> Iterator[Partial]:
        """See `streaming.blocks.Scan`."""
        work: Callable[[list[Region]], list[Partial]] = lambda group: [  # noqa: E731
            measure(self._block_of(region)) for region in group
        ]
        return itertools.chain.from_iterable(self._workers.map_ordered(work, self._groups(regions)))

    def ask(self, question: Ask, regions: Sequence[Region] | None = None) -> Iterator[Answer]:
        """See `streaming.elements.ask`."""
        asking = self.asking(question) if self.asking else None

        def work(group: list[Region]) -> list[Answer]:
            answers = asking.answers(group, self.lend) if asking and self.lend else None
            if answers is None:
                blocks = map(self._block_of, group)
                answers = [answer(question(Tensors(block)), block.region) for block in blocks]
            return answers

        # A loop has no block in memory, but for what it stores of every element: more at a time, fewer turns of Python's.
        together = BLOCK_ELEMENTS if asking and not asking.stores else GRID_ELEMENTS
        return itertools.chain.from_iterable(self._workers.map_ordered(work, self._groups(regions, together)))

    def _groups(self, regions: Sequence[Region] | None, elements: int = GRID_ELEMENTS) -> Iterator[list[Region]]:
        chosen = list(tile(self._tensor.spec, GRID_ELEMENTS)) if regions is None else regions
        return in_groups(read_ahead(self._refs, chosen), elements)


def _within(region: Region, part: slice) -> Region:
    """A part of a region, as slices of its elements."""
    return Region(region.tensor, region.start + part.start, region.start + part.stop)


@twin("streaming.kernels")
def load(raw: torch.Tensor, values: torch.Tensor, base: torch.Tensor | None, look: bool) -> tuple[bool, bool]:
    """Make float32 numbers of what is stored.

    Args:
        raw: `[n]` of any floating-point dtype, on the CPU.
        values: `[n]` float32, overwritten with them.
        base: `[n]` float32, which is subtracted.
        look: whether to look for what then differs from 0.

    Returns: whether every number is finite, and whether one was found that differs from 0.
    """
    if values.is_cuda:
        send(raw, values)
    else:
        values.copy_(raw)
    is_finite = all_finite(values)
    if base is not None:
        values.sub_(base)
    return is_finite, look and bool(values.any())


def send(raw: torch.Tensor, values: torch.Tensor) -> None:
    """Copy what is stored, as it is, to a GPU, on a stream of this thread's own, and make float32 of it there.

    While it is on its way, the GPU works on other threads' blocks; from pinned memory the processor does not wait either.
    """
    if not hasattr(_thread, "sending"):
        _thread.sending = torch.cuda.Stream(values.device)
    working = torch.cuda.current_stream(values.device)
    _thread.sending.wait_stream(working)  # which may not be done with what these values were before
    with torch.cuda.stream(_thread.sending):
        values.copy_(raw.to(values.device, non_blocking=True))
    working.wait_stream(_thread.sending)


@twin("streaming.kernels")
def round_to(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """Round float32 numbers `[n]` to a dtype: on the CPU, and whether all are finite there. Copied numbers may have any dtype."""
    rounded = values.to(dtype).cpu()
    return rounded, all_finite(rounded)


def not_finite(raw: torch.Tensor, ref: TensorRef, region: Region) -> InputError:
    """What is said of a region `[region.numel]` that holds a NaN, or an infinity in float32: model, tensor and element."""
    index = int((~raw.float().isfinite()).nonzero()[0])
    return InputError(
        f"{ref.source.label}: {ref.name}: element {region.start + index} is {float(raw[index])}. "
        f"The checkpoint is damaged; use another one, or let it through with {setting('allow_non_finite')}."
    )


def all_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. A sum shows it at a fraction of the cost of looking at each; `[n]` float."""
    return math.isfinite(float(values.sum(dtype=torch.float32))) or bool(values.isfinite().all())
