"""Write down what a formula does with one element, and make LLVM's language of it: a loop that reads, computes and rounds in one pass.

    trace = Trace(inputs=(torch.bfloat16, torch.bfloat16), is_delta=True)
    merged = formula(trace)                          # a Symbol: the nodes that lead to it are in `trace.nodes`
    text = write_loop(trace, [Store(merged, torch.bfloat16)])      # compiled by `streaming.machine_code`

The loop reads stored numbers, in pieces that the nearest caches hold, from the files themselves where it can; numbers that are not
finite, read or made, are only noticed: whoever runs the loop then has the formula's torch version make the block.

No operation is contracted or reordered: each is rounded by itself, as torch rounds it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from streaming.elements import MAGNITUDE_BITS, Number, hash_of

WIDTH = 16
"""Elements that are worked on together: a vector of 512 bits, or several of what the processor has."""
PIECE_ELEMENTS = 1 << 15
"""Elements of each input that are read at a time."""

STORED = {torch.bfloat16: "i16", torch.float16: "i16", torch.float32: "i32"}
"""dtype -> what LLVM loads and stores of it."""
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
"""dtype -> the bits of its infinity: what is not finite has no smaller magnitude."""
OVERFLOW = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000, torch.float32: 0x7F800000}
"""dtype -> the bits of the least float32 that it rounds to infinity."""

FLOAT, INT, BOOL = "float", "i32", "i1"
COMPARISONS = {"gt": "ogt", "ge": "oge", "lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}

Node = tuple[Any, ...]
"""An operation, and the nodes and constants that it works on."""


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A number of an element, while a formula is written down: a node of a trace, and its type (FLOAT, INT or BOOL)."""

    trace: Trace
    node: int
    type: str

    def _with(self, op: str, other: object, type_: str = "", *, swap: bool = False) -> Symbol:
        right = self.trace.symbol(other, self.type)
        pair = (right, self) if swap else (self, right)
        return self.trace.add(op, *(one.node for one in pair), type_=type_ or self.type)

    def __add__(self, other: object) -> Symbol:
        return self._with("add", other)

    def __radd__(self, other: object) -> Symbol:
        return self._with("add", other, swap=True)

    def __sub__(self, other: object) -> Symbol:
        return self._with("sub", other)

    def __rsub__(self, other: object) -> Symbol:
        return self._with("sub", other, swap=True)

    def __mul__(self, other: object) -> Symbol:
        return self._with("mul", other)

    def __rmul__(self, other: object) -> Symbol:
        return self._with("mul", other, swap=True)

    def __truediv__(self, other: object) -> Symbol:
        return self._with("div", other)

    def __and__(self, other: object) -> Symbol:
        return self._with("and", other)

    def __or__(self, other: object) -> Symbol:
        return self._with("or", other)

    def __xor__(self, other: object) -> Symbol:
        return self._with("xor", other)

    def __rshift__(self, other: object) -> Symbol:
        return self._with("ashr", other)

    def __invert__(self) -> Symbol:
        return self._with("xor", True)

    def __abs__(self) -> Symbol:
        return self.trace.add("abs", self.node, type_=FLOAT)

    def __gt__(self, other: object) -> Symbol:
        return self._with("gt", other, BOOL)

    def __ge__(self, other: object) -> Symbol:
        return self._with("ge", other, BOOL)

    def __lt__(self, other: object) -> Symbol:
        return self._with("lt", other, BOOL)

    def __le__(self, other: object) -> Symbol:
        return self._with("le", other, BOOL)

    def __eq__(self, other: object) -> Symbol:  # type: ignore[override]
        return self._with("eq", other, BOOL)

    def __ne__(self, other: object) -> Symbol:  # type: ignore[override]
        return self._with("ne", other, BOOL)

    def select(self, yes: object, no: object) -> Symbol:
        """See `streaming.elements.where`."""
        typed = next((one.type for one in (yes, no) if isinstance(one, Symbol)), FLOAT)
        pair = [self.trace.symbol(one, typed).node for one in (yes, no)]
        return self.trace.add("select", self.node, *pair, type_=typed)

    def view(self, dtype: torch.dtype) -> Symbol:
        """The bits of a float32 as an int32."""
        return self.trace.add("bits", self.node, type_=INT)

    def lerp(self, end: object, weight: object) -> Symbol:
        """See `streaming.elements.lerp`."""
        pair = [self.trace.symbol(one, FLOAT).node for one in (end, weight)]
        return self.trace.add("lerp", self.node, *pair, type_=FLOAT)


class Trace:
    """Writes a formula down, as its `Element`.

    What differs between tensors (numbers, channels, thresholds) is no part of the nodes: tensors that are merged in one way share a loop.

    Args:
        inputs: stored dtypes, the base's first where `has_base`.
        has_base: whether there is one.
        is_delta: whether models are task vectors.
        start: index of the first element of the tensor's region that the numbers are of; see `integers_at`.

    Attributes:
        nodes: the operations, each once, after those that it works on.
        floats: what `number` was given.
        channels: what `channel` was given.
    """

    def __init__(self, inputs: Sequence[torch.dtype], *, has_base: bool, is_delta: bool):
        self.inputs = tuple(inputs)
        self.nodes: list[Node] = []
        self.types: list[str] = []
        self._places: dict[Node, int] = {}
        self.floats: list[float] = []
        self.channels: list[torch.Tensor] = []
        self._integers: list[tuple[int, bool]] = []
        read = [self.add("input", slot, type_=FLOAT) for slot in range(len(inputs))]
        self._base = read[0] if has_base else None
        weights = read[has_base:]
        self.vectors = [one - self._base for one in weights] if has_base else weights
        self.models = cast(Sequence[Number], self.vectors if is_delta else weights)

    @property
    def base(self) -> Number:
        """See `streaming.elements.Element`."""
        assert self._base is not None
        return cast(Number, self._base)

    def add(self, op: str, *args: Any, type_: str) -> Symbol:
        """A node, the one that is there where it is known."""
        node = (op, *args)
        if node not in self._places:
            self._places[node] = len(self.nodes)
            self.nodes.append(node)
            self.types.append(type_)
        return Symbol(self, self._places[node], type_)

    def symbol(self, value: object, type_: str) -> Symbol:
        """A symbol as it is, a Python number as a constant of a type."""
        if isinstance(value, Symbol):
            return value
        constant = float(cast(float, value)) if type_ == FLOAT else int(cast(int, value))
        return self.add("constant", type_, repr(constant), type_=type_)

    def number(self, value: float) -> Number:
        """See `streaming.elements.Element`."""
        self.floats.append(value)
        return cast(Number, self.add("number", len(self.floats) - 1, type_=FLOAT))

    def integer(self, value: int) -> Number:
        """See `streaming.elements.Element`."""
        return cast(Number, self._integer(value, is_index=False))

    def channel(self, values: torch.Tensor) -> Number:
        """See `streaming.elements.Element`."""
        if values.numel() == 1:
            return self.number(float(values))
        assert values.shape[1] == 1 or values.shape[2] == 1, "expected numbers of matrices, rows or columns"
        self.channels.append(values)
        kind = "column" if values.shape[2] > 1 else "row"
        return cast(Number, self.add(kind, len(self.channels) - 1, type_=FLOAT))

    def offset(self) -> Number:
        """See `streaming.elements.Element`."""
        return cast(Number, self._offset())

    def is_up_to(self, index: int) -> Number:
        """See `streaming.elements.Element`."""
        last = self._integer(index, is_index=True)
        return cast(Number, (self._offset() <= last).select(self.symbol(1, INT), self.symbol(0, INT)))

    def draw(self, keys: Callable[[int], tuple[int, int]]) -> Number:
        """See `streaming.elements.Element`; of a tensor whose indices have 32 bits."""
        pair = [self._integer(key, is_index=False) for key in keys(0)]
        index = self._offset() + self.add("first", type_=INT)
        return hash_of(cast(Number, index), cast(tuple[int, int], tuple(pair)))

    def _offset(self) -> Symbol:
        """The element's index, counted from the region's first."""
        return self.add("offset", type_=INT)

    def _integer(self, value: int, *, is_index: bool) -> Symbol:
        self._integers.append((value, is_index))
        return self.add("integer", len(self._integers) - 1, type_=INT)

    @property
    def has_indices(self) -> bool:
        """Whether some integers are indices, which `integers_at` counts from a region's first element."""
        return any(is_index for _, is_index in self._integers)

    def integers_at(self, start: int) -> list[int]:
        """What `integer` was given, and the indices of `is_up_to`, counted from `start`: int32 each."""
        most = MAGNITUDE_BITS
        return [max(-1, min(value - start, most)) if is_index else value for value, is_index in self._integers]


@dataclass(frozen=True)
class Store:
    """Write a number of each element, rounded to a dtype; the loop notices what is then not finite. Of int32 as it is."""

    symbol: Symbol
    dtype: torch.dtype

    @property
    def key(self) -> Node:
        """What decides the loop of it."""
        return "store", self.symbol.node, str(self.dtype)


@dataclass(frozen=True)
class Count:
    """Count the elements for which a condition holds."""

    symbol: Symbol

    @property
    def key(self) -> Node:
        """What decides the loop of it."""
        return "count", self.symbol.node


@dataclass(frozen=True)
class Collect:
    """Write an int32 of each element for which a condition holds, one after the other, and count them. Needs room for one more."""

    symbol: Symbol
    condition: Symbol

    @property
    def key(self) -> Node:
        """What decides the loop of it."""
        return "collect", self.symbol.node, self.condition.node


Sink = Store | Count | Collect
"""What becomes of the numbers."""

JOB_HEAD = ("start", "stop", "rows", "columns", "pread", "floats", "integers", "results")
OF_INPUT, OF_CHANNEL = ("descriptor", "offset", "buffer"), ("values", "per_matrix", "per_row")
FINE, NOT_FINITE, NOT_READ = 0, 1, 2
"""What a loop returns."""


def loop_key(trace: Trace, sinks: Sequence[Sink]) -> Node:
    """Equal for traces of which one loop can do the work."""
    return tuple(map(str, trace.inputs)), tuple(trace.nodes), tuple(sink.key for sink in sinks)


def write_loop(trace: Trace, sinks: Sequence[Sink]) -> str:
    """A function `i64 loops(ptr jobs, i64 count, i64 bytes)` in LLVM's language, which does jobs of so many bytes each.

    A job is an array of int64: JOB_HEAD, OF_INPUT for each input, an address for each sink, OF_CHANNEL for each channel.

        start, stop         the elements to work on, as indices of the tensor
        rows, columns       of one of its matrices
        pread               address of the C library's function
        floats, integers    addresses of the trace's numbers: float32, int32
        results             address of an int64 for each sink: counts
        descriptor, offset  of the input's file, and where in it the tensor begins; descriptor -1: the numbers are in the buffer
        buffer              of PIECE_ELEMENTS numbers to read into, or all of the region's
        values, ...         address of a channel's float32, and how many apart matrices and rows are
    """
    return _Writer(trace, sinks).write()


class _Writer:
    """Lines of LLVM's language, and names for what they make."""

    def __init__(self, trace: Trace, sinks: Sequence[Sink]):
        self._trace = trace
        self._sinks = sinks
        self._lines: list[str] = []
        self._allocations: list[str] = []
        self._count = 0
        self._has_channels = bool(trace.channels)

    def write(self) -> str:
        slots = [*JOB_HEAD]
        for slot in range(len(self._trace.inputs)):
            slots += [f"{name}{slot}" for name in OF_INPUT]
        slots += [f"out{number}" for number in range(len(self._sinks))]
        for number in range(len(self._trace.channels)):
            slots += [f"{name}{number}" for name in OF_CHANNEL]
        for place, name in enumerate(slots):
            self._put(f"%{name}.at = getelementptr i64, ptr %job, i64 {place}")
            self._put(f"%{name} = load i64, ptr %{name}.at")
        for name in ("pread", "floats", "integers", "results"):
            self._put(f"%{name}.ptr = inttoptr i64 %{name} to ptr")
        self._put("%first = trunc i64 %start to i32")
        for place, node in enumerate(self._trace.nodes):
            if node[0] in ("number", "integer"):
                kind, array = (FLOAT, "floats") if node[0] == "number" else (INT, "integers")
                self._put(f"%p{place}.at = getelementptr {kind}, ptr %{array}.ptr, i64 {node[1]}")
                self._put(f"%p{place} = load {kind}, ptr %p{place}.at")
        for number, sink in enumerate(self._sinks):
            if not isinstance(sink, Store):
                self._allocate(f"%count{number}", "i64")
        for dtype in set(self._trace.inputs):
            for width in (WIDTH, 1):
                self._allocate(f"%in.{_short(dtype)}.{width}", _vector(STORED[dtype], width))
        for dtype in self._rounded():
            for width in (WIDTH, 1):
                self._allocate(f"%out.{_short(dtype)}.{width}", _vector("i32", width))
        self._put("br label %pieces")
        self._write_pieces()
        self._write_end()
        body = "\n".join(f"  {line}" if not line.endswith(":") else line for line in self._lines)
        head = "\n".join(f"  {line}" for line in self._allocations)
        return f"{_declare()}\ndefine i64 @loop(ptr %job) {{\nentry:\n{head}\n{body}\n}}\n{_MANY}"

    def _rounded(self) -> list[torch.dtype]:
        """The dtypes that are rounded to."""
        return _sorted([sink.dtype for sink in self._sinks if isinstance(sink, Store) and sink.dtype in STORED])

    def _put(self, line: str) -> None:
        self._lines.append(line)

    def _make(self, text: str) -> str:
        self._count += 1
        name = f"%t{self._count}"
        self._put(f"{name} = {text}")
        return name

    def _allocate(self, name: str, kind: str) -> None:
        self._allocations += [f"{name} = alloca {kind}", f"store {kind} zeroinitializer, ptr {name}"]

    def _write_pieces(self) -> None:
        """Piece by piece: read, then segment by segment."""
        self._put("pieces:")
        self._put("%p = phi i64 [%start, %entry], [%e, %piece.end]")
        self._put("%p.more = icmp slt i64 %p, %stop")
        self._put("br i1 %p.more, label %piece, label %end")
        self._put("piece:")
        self._put(f"%p.far = add i64 %p, {PIECE_ELEMENTS}")
        self._put("%e.less = icmp slt i64 %p.far, %stop")
        self._put("%e = select i1 %e.less, i64 %p.far, i64 %stop")
        self._put("%piece.count = sub i64 %e, %p")
        for slot, dtype in enumerate(self._trace.inputs):
            self._write_reading(slot, dtype.itemsize)
        self._put("br label %segments")
        # Segments of one row each, where a channel has numbers of its own.
        self._put("segments:")
        self._put(f"%q = phi i64 [%p, %read{len(self._trace.inputs) - 1}.done], [%q.end, %segment.end]")
        self._put("%q.more = icmp slt i64 %q, %e")
        self._put("br i1 %q.more, label %segment, label %piece.end")
        self._put("segment:")
        if self._has_channels:
            self._put("%column = urem i64 %q, %columns")
            self._put("%row.all = udiv i64 %q, %columns")
            self._put("%row = urem i64 %row.all, %rows")
            self._put("%matrix = udiv i64 %row.all, %rows")
            self._put("%row.left = sub i64 %columns, %column")
            self._put("%row.end = add i64 %q, %row.left")
            self._put("%row.less = icmp slt i64 %row.end, %e")
            self._put("%q.end = select i1 %row.less, i64 %row.end, i64 %e")
            for place, node in enumerate(self._trace.nodes):
                if node[0] in ("row", "column"):
                    self._write_channel(place, node)
        else:
            self._put("%q.end = add i64 %e, 0")
        self._put("%q.count = sub i64 %q.end, %q")
        self._put(f"%q.rest = and i64 %q.count, {WIDTH - 1}")
        self._put("%q.whole = sub i64 %q.end, %q.rest")
        self._write_run("vector", "segment", "%q", "%q.whole", WIDTH, "single")
        self._write_run("single", "vector", "%q.whole", "%q.end", 1, "segment.end")
        self._put("segment.end:")
        self._put("br label %segments")
        self._put("piece.end:")
        self._put("br label %pieces")

    def _write_reading(self, slot: int, itemsize: int) -> None:
        """Fill the buffer of one input, or point into it."""
        before = "piece" if slot == 0 else f"read{slot - 1}.done"
        name = f"read{slot}"
        self._put(f"%{name}.fd = trunc i64 %descriptor{slot} to i32")
        self._put(f"%{name}.direct = icmp sge i64 %descriptor{slot}, 0")
        self._put(f"%{name}.origin = select i1 %{name}.direct, i64 %p, i64 %start")
        self._put(f"%{name}.bytes = mul i64 %piece.count, {itemsize}")
        self._put(f"%{name}.skip = mul i64 %p, {itemsize}")
        self._put(f"%{name}.from = add i64 %offset{slot}, %{name}.skip")
        self._put(f"%buffer{slot}.ptr{name} = inttoptr i64 %buffer{slot} to ptr")
        self._put(f"br i1 %{name}.direct, label %{name}.more, label %{name}.done")
        self._put(f"{name}.more:")
        self._put(f"%{name}.got = phi i64 [0, %{before}], [%{name}.next, %{name}.some]")
        self._put(f"%{name}.left = sub i64 %{name}.bytes, %{name}.got")
        self._put(f"%{name}.to = getelementptr i8, ptr %buffer{slot}.ptr{name}, i64 %{name}.got")
        self._put(f"%{name}.at = add i64 %{name}.from, %{name}.got")
        self._put(f"%{name}.n = call i64 %pread.ptr(i32 %{name}.fd, ptr %{name}.to, i64 %{name}.left, i64 %{name}.at)")
        self._put(f"%{name}.bad = icmp sle i64 %{name}.n, 0")
        self._put(f"br i1 %{name}.bad, label %failed, label %{name}.some")
        self._put(f"{name}.some:")
        self._put(f"%{name}.next = add i64 %{name}.got, %{name}.n")
        self._put(f"%{name}.full = icmp sge i64 %{name}.next, %{name}.bytes")
        self._put(f"br i1 %{name}.full, label %{name}.done, label %{name}.more")
        self._put(f"{name}.done:")

    def _write_channel(self, place: int, node: Node) -> None:
        """What a channel has for this segment: a row's number, or where the columns' begin."""
        number = node[1]
        self._put(f"%c{place}.matrix = mul i64 %matrix, %per_matrix{number}")
        self._put(f"%c{place}.row = mul i64 %row, %per_row{number}")
        self._put(f"%c{place}.at = add i64 %c{place}.matrix, %c{place}.row")
        self._put(f"%c{place}.values = inttoptr i64 %values{number} to ptr")
        if node[0] == "row":
            self._put(f"%c{place}.ptr = getelementptr float, ptr %c{place}.values, i64 %c{place}.at")
            self._put(f"%c{place} = load float, ptr %c{place}.ptr")
        else:
            self._put(f"%c{place}.first = sub i64 %c{place}.at, %q")
            self._put(f"%c{place}.second = add i64 %c{place}.first, %column")

    def _write_run(self, name: str, before: str, begin: str, end: str, width: int, after: str) -> None:
        """A loop over elements, `width` at a time."""
        self._put(f"br label %{name}" if name == "vector" else "")
        self._put(f"{name}:")
        self._put(f"%{name}.i = phi i64 [{begin}, %{before}], [%{name}.next, %{name}.last]")
        self._put(f"%{name}.more = icmp slt i64 %{name}.i, {end}")
        self._put(f"br i1 %{name}.more, label %{name}.body, label %{after}")
        self._put(f"{name}.body:")
        self._put(f"%{name}.since = sub i64 %{name}.i, %start")
        values: dict[int, str] = {}
        needed = self._needed()
        for place, node in enumerate(self._trace.nodes):
            if place in needed:
                values[place] = self._write_node(node, place, values, width, name)
        for number, sink in enumerate(self._sinks):
            self._write_sink(number, sink, values, width, name)
        self._put(f"br label %{name}.last")
        self._put(f"{name}.last:")
        self._put(f"%{name}.next = add i64 %{name}.i, {width}")
        self._put(f"br label %{name}")

    def _needed(self) -> set[int]:
        """The nodes that a sink depends on; and all inputs, each of which is looked at."""
        open_ = [sink.symbol.node for sink in self._sinks]
        open_ += [sink.condition.node for sink in self._sinks if isinstance(sink, Collect)]
        needed = {place for place, node in enumerate(self._trace.nodes) if node[0] == "input"}
        while open_:
            place = open_.pop()
            if place not in needed:
                needed.add(place)
                op, *args = self._trace.nodes[place]
                open_ += [] if op in _LEAVES else args
        return needed

    def _splat(self, kind: str, value: str, width: int) -> str:
        if width == 1:
            return value
        single = self._make(f"insertelement <{width} x {kind}> poison, {kind} {value}, i64 0")
        zeros = f"<{width} x i32> zeroinitializer"
        return self._make(f"shufflevector <{width} x {kind}> {single}, <{width} x {kind}> poison, {zeros}")

    def _write_node(self, node: Node, place: int, values: dict[int, str], width: int, run: str) -> str:
        op, *args = node
        kind = self._trace.types[place]
        vector = _vector(kind, width)
        if op == "input":
            return self._write_input(args[0], width, run)
        if op in ("number", "integer"):
            return self._splat(kind, f"%p{place}", width)
        if op == "constant":
            return _constant(args[0], args[1], width)
        if op == "row":
            return self._splat(FLOAT, f"%c{place}", width)
        if op == "column":
            at = self._make(f"add i64 %c{place}.second, %{run}.i")
            pointer = self._make(f"getelementptr float, ptr %c{place}.values, i64 {at}")
            return self._make(f"load {vector}, ptr {pointer}, align 4")
        if op == "first":
            return self._splat(INT, "%first", width)
        if op == "offset":
            since = self._splat(INT, self._make(f"trunc i64 %{run}.since to i32"), width)
            lanes = "<" + ", ".join(f"i32 {lane}" for lane in range(width)) + ">"
            return since if width == 1 else self._make(f"add {vector} {since}, {lanes}")
        given = [values[arg] for arg in args]
        of = _vector(self._trace.types[args[0]], width)
        is_float = self._trace.types[args[0]] == FLOAT
        if op in ("add", "sub", "mul", "div"):
            return self._make(f"{'f' if is_float else ''}{op} {vector} {given[0]}, {given[1]}")
        if op in ("and", "or", "xor", "ashr"):
            return self._make(f"{op} {vector} {given[0]}, {given[1]}")
        if op in COMPARISONS:
            relation = COMPARISONS[op] if is_float else op if op in ("eq", "ne") else f"s{op}"
            return self._make(f"{'fcmp' if is_float else 'icmp'} {relation} {of} {given[0]}, {given[1]}")
        if op == "select":
            condition = _vector(BOOL, width)
            return self._make(f"select {condition} {given[0]}, {vector} {given[1]}, {vector} {given[2]}")
        if op == "bits":
            return self._make(f"bitcast {of} {given[0]} to {vector}")
        if op == "abs":
            return self._make(f"call {vector} @llvm.fabs.{_suffix(width)}({vector} {given[0]})")
        assert op == "lerp", op
        return self._write_lerp(given, width)

    def _write_lerp(self, given: list[str], width: int) -> str:
        start, end, weight = given
        vector, suffix = _vector(FLOAT, width), _suffix(width)
        size = self._make(f"call {vector} @llvm.fabs.{suffix}({vector} {weight})")
        near = self._make(f"fcmp olt {vector} {size}, {_constant(FLOAT, '0.5', width)}")
        less = self._make(f"fsub {vector} {weight}, {_constant(FLOAT, '1.0', width)}")
        bools = _vector(BOOL, width)
        share = self._make(f"select {bools} {near}, {vector} {weight}, {vector} {less}")
        origin = self._make(f"select {bools} {near}, {vector} {start}, {vector} {end}")
        way = self._make(f"fsub {vector} {end}, {start}")
        return self._make(f"call {vector} @llvm.fma.{suffix}({vector} {share}, {vector} {way}, {vector} {origin})")

    def _write_input(self, slot: int, width: int, run: str) -> str:
        """Load and widen, and note the largest magnitude."""
        dtype = self._trace.inputs[slot]
        kind = STORED[dtype]
        stored, wide = _vector(kind, width), _vector(INT, width)
        at = self._make(f"sub i64 %{run}.i, %read{slot}.origin")
        pointer = self._make(f"getelementptr {kind}, ptr %buffer{slot}.ptrread{slot}, i64 {at}")
        raw = self._make(f"load {stored}, ptr {pointer}, align {dtype.itemsize}")
        mask = str(0x7FFF if kind == "i16" else MAGNITUDE_BITS)
        size = self._make(f"and {stored} {raw}, {_constant(kind, mask, width)}")
        self._note_largest(f"%in.{_short(dtype)}.{width}", size, kind, width)
        if dtype == torch.float16:
            half = self._make(f"bitcast {stored} {raw} to {_vector('half', width)}")
            return self._make(f"fpext {_vector('half', width)} {half} to {_vector(FLOAT, width)}")
        if dtype == torch.bfloat16:
            raw = self._make(f"zext {stored} {raw} to {wide}")
            raw = self._make(f"shl {wide} {raw}, {_constant(INT, '16', width)}")
        return self._make(f"bitcast {wide} {raw} to {_vector(FLOAT, width)}")

    def _note_largest(self, place: str, size: str, kind: str, width: int) -> None:
        vector = _vector(kind, width)
        known = self._make(f"load {vector}, ptr {place}")
        name = f"v{width}{kind}" if width > 1 else kind
        largest = self._make(f"call {vector} @llvm.umax.{name}({vector} {known}, {vector} {size})")
        self._put(f"store {vector} {largest}, ptr {place}")

    def _write_sink(self, number: int, sink: Sink, values: dict[int, str], width: int, run: str) -> None:
        value = values[sink.symbol.node]
        wide, bools = _vector(INT, width), _vector(BOOL, width)
        if isinstance(sink, Store) and sink.symbol.type == INT:
            pointer = self._make(f"inttoptr i64 %out{number} to ptr")
            pointer = self._make(f"getelementptr i32, ptr {pointer}, i64 %{run}.since")
            self._put(f"store {wide} {value}, ptr {pointer}, align 4")
        elif isinstance(sink, Store):
            bits = self._make(f"bitcast {_vector(FLOAT, width)} {value} to {wide}")
            size = self._make(f"and {wide} {bits}, {_constant(INT, str(MAGNITUDE_BITS), width)}")
            self._note_largest(f"%out.{_short(sink.dtype)}.{width}", size, INT, width)
            kind = STORED[sink.dtype]
            stored = _vector(kind, width)
            if sink.dtype == torch.bfloat16:  # to the nearest, ties to even
                odd = self._make(f"lshr {wide} {bits}, {_constant(INT, '16', width)}")
                odd = self._make(f"and {wide} {odd}, {_constant(INT, '1', width)}")
                near = self._make(f"add {wide} {bits}, {_constant(INT, '32767', width)}")
                near = self._make(f"add {wide} {near}, {odd}")
                near = self._make(f"lshr {wide} {near}, {_constant(INT, '16', width)}")
                bits = self._make(f"trunc {wide} {near} to {stored}")
            elif sink.dtype == torch.float16:
                half = self._make(f"fptrunc {_vector(FLOAT, width)} {value} to {_vector('half', width)}")
                bits = self._make(f"bitcast {_vector('half', width)} {half} to {stored}")
            pointer = self._make(f"inttoptr i64 %out{number} to ptr")
            pointer = self._make(f"getelementptr {kind}, ptr {pointer}, i64 %{run}.since")
            self._put(f"store {stored} {bits}, ptr {pointer}, align {sink.dtype.itemsize}")
        elif isinstance(sink, Count):
            # A bit for each element, and the number of those that are set.
            bits = value if width == 1 else self._make(f"bitcast {bools} {value} to i{width}")
            if width > 1:
                bits = self._make(f"call i{width} @llvm.ctpop.i{width}(i{width} {bits})")
            self._add_to(f"%count{number}", self._make(f"zext i{width} {bits} to i64"))
        else:
            self._write_collecting(number, sink, values, width, run)

    def _add_to(self, place: str, more: str) -> None:
        known = self._make(f"load i64, ptr {place}")
        self._put(f"store i64 {self._make(f'add i64 {known}, {more}')}, ptr {place}")

    def _write_collecting(self, number: int, sink: Collect, values: dict[int, str], width: int, run: str) -> None:
        """Nothing mostly; where an element is wanted, all of them are written, and those that are not are overwritten."""
        value, wanted = values[sink.symbol.node], values[sink.condition.node]
        name = f"{run}.collect{number}"
        bits = wanted if width == 1 else self._make(f"bitcast {_vector(BOOL, width)} {wanted} to i{width}")
        some = bits if width == 1 else self._make(f"icmp ne i{width} {bits}, 0")
        self._put(f"br i1 {some}, label %{name}, label %{name}.done")
        self._put(f"{name}:")
        room = self._make(f"inttoptr i64 %out{number} to ptr")
        count = self._make(f"load i64, ptr %count{number}")
        for lane in range(width):
            one, flag = value, wanted
            if width > 1:
                one = self._make(f"extractelement {_vector(INT, width)} {value}, i64 {lane}")
                flag = self._make(f"extractelement {_vector(BOOL, width)} {wanted}, i64 {lane}")
            pointer = self._make(f"getelementptr i32, ptr {room}, i64 {count}")
            self._put(f"store i32 {one}, ptr {pointer}")
            count = self._make(f"add i64 {count}, {self._make(f'zext i1 {flag} to i64')}")
        self._put(f"store i64 {count}, ptr %count{number}")
        self._put(f"br label %{name}.done")
        self._put(f"{name}.done:")

    def _write_end(self) -> None:
        """Hand the counts over, and look whether all was finite."""
        self._put("end:")
        for number, sink in enumerate(self._sinks):
            if not isinstance(sink, Store):
                pointer = self._make(f"getelementptr i64, ptr %results.ptr, i64 {number}")
                self._put(f"store i64 {self._make(f'load i64, ptr %count{number}')}, ptr {pointer}")
        bad = "false"
        limits = [(f"%in.{_short(dtype)}", STORED[dtype], INFINITY[dtype]) for dtype in _sorted(self._trace.inputs)]
        limits += [(f"%out.{_short(dtype)}", INT, OVERFLOW[dtype]) for dtype in self._rounded()]
        for place, kind, limit in limits:
            for width in (WIDTH, 1):
                largest = self._make(f"load {_vector(kind, width)}, ptr {place}.{width}")
                if width > 1:
                    vector = _vector(kind, width)
                    largest = self._make(f"call {kind} @llvm.vector.reduce.umax.v{width}{kind}({vector} {largest})")
                over = self._make(f"icmp uge {kind} {largest}, {limit}")
                bad = self._make(f"or i1 {bad}, {over}")
        self._put(f"%result = select i1 {bad}, i64 {NOT_FINITE}, i64 {FINE}")
        self._put("ret i64 %result")
        self._put("failed:")
        self._put(f"ret i64 {NOT_READ}")


_LEAVES = ("input", "number", "integer", "constant", "row", "column", "first", "offset")


_MANY = f"""
define i64 @loops(ptr %jobs, i64 %count, i64 %bytes) {{
entry:
  br label %next
next:
  %i = phi i64 [0, %entry], [%i.next, %fine]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %one, label %end
one:
  %skip = mul i64 %i, %bytes
  %job = getelementptr i8, ptr %jobs, i64 %skip
  %result = call i64 @loop(ptr %job)
  %is.fine = icmp eq i64 %result, {FINE}
  br i1 %is.fine, label %fine, label %failed
fine:
  %i.next = add i64 %i, 1
  br label %next
failed:
  ret i64 %result
end:
  ret i64 {FINE}
}}
"""


def _declare() -> str:
    """The intrinsics that a loop may call."""
    lines = [f"declare i{WIDTH} @llvm.ctpop.i{WIDTH}(i{WIDTH})"]
    for width in (WIDTH, 1):
        vector = _vector(FLOAT, width)
        lines += [f"declare {vector} @llvm.fabs.{_suffix(width)}({vector})"]
        lines += [f"declare {vector} @llvm.fma.{_suffix(width)}({vector}, {vector}, {vector})"]
        for kind in ("i16", "i32"):
            vector, name = _vector(kind, width), kind if width == 1 else f"v{width}{kind}"
            lines += [f"declare {vector} @llvm.umax.{name}({vector}, {vector})"]
    for kind in ("i16", "i32"):
        lines += [f"declare {kind} @llvm.vector.reduce.umax.v{WIDTH}{kind}(<{WIDTH} x {kind}>)"]
    return "\n".join(lines)


def _vector(kind: str, width: int) -> str:
    return kind if width == 1 else f"<{width} x {kind}>"


def _suffix(width: int) -> str:
    return "f32" if width == 1 else f"v{width}f32"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sorted(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    return sorted(set(dtypes), key=str)


def _constant(kind: str, text: str, width: int) -> str:
    """A number as LLVM spells it: a float32 by the bits of the float64 that it is."""
    if kind == FLOAT:
        (rounded,) = struct.unpack("f", struct.pack("f", float(text)))
        text = f"0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X}"
    elif kind == BOOL:
        text = "true" if int(text) else "false"
    return text if width == 1 else f"splat ({kind} {text})"
