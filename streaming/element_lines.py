"""What a loop does with a vector of elements: load and widen, compute each node of a trace, round and write, count, collect."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streaming.elements import MAGNITUDE_BITS
from streaming.llvm import Lines, constant, in_order, short, suffix_of, vector_of
from streaming.trace import BOOL, DOUBLE, FLOAT, INT, STORED, AddUp, Collect, Count, Node, Sink, Store, Trace

COMPARISONS = {"gt": "ogt", "ge": "oge", "lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}


class ElementLines(Lines):
    """The lines of one turn of a loop.

    Args:
        trace: what is computed.
        sinks: what becomes of it.
    """

    def __init__(self, trace: Trace, sinks: Sequence[Sink]):
        super().__init__()
        self._trace = trace
        self._sinks = sinks

    def write_elements(self, width: int, run: str) -> None:
        """Work on `width` elements from the index `%{run}.i` on, which is `%{run}.since` counted from the region's first."""
        values: dict[int, str] = {}
        needed = self._needed()
        for place, node in enumerate(self._trace.nodes):
            if place in needed:
                values[place] = self._write_node(node, place, values, width, run)
        for number, sink in enumerate(self._sinks):
            self._write_sink(number, sink, values, width, run)

    def rounded(self) -> list[torch.dtype]:
        """The dtypes that are rounded to."""
        return in_order([sink.dtype for sink in self._sinks if isinstance(sink, Store) and sink.dtype in STORED])

    def _needed(self) -> set[int]:
        """The nodes that a sink depends on; and all inputs, each of which is looked at."""
        inputs = {place for place, node in enumerate(self._trace.nodes) if node[0] == "input"}
        return inputs | self._trace.nodes_of(self._sinks)

    def _write_node(self, node: Node, place: int, values: dict[int, str], width: int, run: str) -> str:
        op, *args = node
        kind = self._trace.types[place]
        vector = vector_of(kind, width)
        if op == "input":
            return self._write_input(args[0], width, run)
        if op in ("number", "integer"):
            return self.splat(kind, f"%p{place}", width)
        if op == "constant":
            return constant(args[0], args[1], width)
        if op == "row":
            return self.splat(FLOAT, f"%c{place}", width)
        if op == "column":
            at = self.make(f"add i64 %c{place}.second, %{run}.i")
            pointer = self.make(f"getelementptr float, ptr %c{place}.values, i64 {at}")
            return self.make(f"load {vector}, ptr {pointer}, align 4")
        if op == "first":
            return self.splat(INT, "%first", width)
        if op == "offset":
            since = self.splat(INT, self.make(f"trunc i64 %{run}.since to i32"), width)
            lanes = "<" + ", ".join(f"i32 {lane}" for lane in range(width)) + ">"
            return since if width == 1 else self.make(f"add {vector} {since}, {lanes}")
        given = [values[arg] for arg in args]
        of = vector_of(self._trace.types[args[0]], width)
        is_float = self._trace.types[args[0]] in (FLOAT, DOUBLE)
        if op in ("add", "sub", "mul", "div"):
            return self.make(f"{'f' if is_float else ''}{op} {vector} {given[0]}, {given[1]}")
        if op in ("and", "or", "xor", "ashr"):
            return self.make(f"{op} {vector} {given[0]}, {given[1]}")
        if op in COMPARISONS:
            relation = COMPARISONS[op] if is_float else op if op in ("eq", "ne") else f"s{op}"
            return self.make(f"{'fcmp' if is_float else 'icmp'} {relation} {of} {given[0]}, {given[1]}")
        if op == "select":
            condition = vector_of(BOOL, width)
            return self.make(f"select {condition} {given[0]}, {vector} {given[1]}, {vector} {given[2]}")
        if op == "bits":
            return self.make(f"bitcast {of} {given[0]} to {vector}")
        if op in ("widen", "narrow"):
            return self.make(f"{'fpext' if op == 'widen' else 'fptrunc'} {of} {given[0]} to {vector}")
        if op == "abs":
            return self.make(f"call {vector} @llvm.fabs.{suffix_of(width)}({vector} {given[0]})")
        assert op == "lerp", op
        return self._write_lerp(given, width)

    def _write_lerp(self, given: list[str], width: int) -> str:
        start, end, weight = given
        vector, suffix = vector_of(FLOAT, width), suffix_of(width)
        size = self.make(f"call {vector} @llvm.fabs.{suffix}({vector} {weight})")
        near = self.make(f"fcmp olt {vector} {size}, {constant(FLOAT, '0.5', width)}")
        less = self.make(f"fsub {vector} {weight}, {constant(FLOAT, '1.0', width)}")
        bools = vector_of(BOOL, width)
        share = self.make(f"select {bools} {near}, {vector} {weight}, {vector} {less}")
        origin = self.make(f"select {bools} {near}, {vector} {start}, {vector} {end}")
        way = self.make(f"fsub {vector} {end}, {start}")
        return self.make(f"call {vector} @llvm.fma.{suffix}({vector} {share}, {vector} {way}, {vector} {origin})")

    def _write_input(self, slot: int, width: int, run: str) -> str:
        """Load and widen, and note the largest magnitude."""
        dtype = self._trace.inputs[slot]
        kind = STORED[dtype]
        stored, wide = vector_of(kind, width), vector_of(INT, width)
        at = self.make(f"sub i64 %{run}.i, %read{slot}.origin")
        pointer = self.make(f"getelementptr {kind}, ptr %buffer{slot}.ptrread{slot}, i64 {at}")
        raw = self.make(f"load {stored}, ptr {pointer}, align {dtype.itemsize}")
        mask = str(0x7FFF if kind == "i16" else MAGNITUDE_BITS)
        size = self.make(f"and {stored} {raw}, {constant(kind, mask, width)}")
        self._note_largest(f"%in.{short(dtype)}.{width}", size, kind, width)
        if dtype == torch.float16:
            half = self.make(f"bitcast {stored} {raw} to {vector_of('half', width)}")
            return self.make(f"fpext {vector_of('half', width)} {half} to {vector_of(FLOAT, width)}")
        if dtype == torch.bfloat16:
            raw = self.make(f"zext {stored} {raw} to {wide}")
            raw = self.make(f"shl {wide} {raw}, {constant(INT, '16', width)}")
        return self.make(f"bitcast {wide} {raw} to {vector_of(FLOAT, width)}")

    def _note_largest(self, place: str, size: str, kind: str, width: int) -> None:
        vector = vector_of(kind, width)
        known = self.make(f"load {vector}, ptr {place}")
        name = f"v{width}{kind}" if width > 1 else kind
        largest = self.make(f"call {vector} @llvm.umax.{name}({vector} {known}, {vector} {size})")
        self.put(f"store {vector} {largest}, ptr {place}")

    def _write_sink(self, number: int, sink: Sink, values: dict[int, str], width: int, run: str) -> None:
        value = values[sink.symbol.node]
        wide, bools = vector_of(INT, width), vector_of(BOOL, width)
        if isinstance(sink, Store) and sink.symbol.type == INT:
            pointer = self.make(f"inttoptr i64 %out{number} to ptr")
            pointer = self.make(f"getelementptr i32, ptr {pointer}, i64 %{run}.since")
            self.put(f"store {wide} {value}, ptr {pointer}, align 4")
        elif isinstance(sink, Store):
            bits = self.make(f"bitcast {vector_of(FLOAT, width)} {value} to {wide}")
            size = self.make(f"and {wide} {bits}, {constant(INT, str(MAGNITUDE_BITS), width)}")
            self._note_largest(f"%out.{short(sink.dtype)}.{width}", size, INT, width)
            kind = STORED[sink.dtype]
            stored = vector_of(kind, width)
            if sink.dtype == torch.bfloat16:  # to the nearest, ties to even
                odd = self.make(f"lshr {wide} {bits}, {constant(INT, '16', width)}")
                odd = self.make(f"and {wide} {odd}, {constant(INT, '1', width)}")
                near = self.make(f"add {wide} {bits}, {constant(INT, '32767', width)}")
                near = self.make(f"add {wide} {near}, {odd}")
                near = self.make(f"lshr {wide} {near}, {constant(INT, '16', width)}")
                bits = self.make(f"trunc {wide} {near} to {stored}")
            elif sink.dtype == torch.float16:
                half = self.make(f"fptrunc {vector_of(FLOAT, width)} {value} to {vector_of('half', width)}")
                bits = self.make(f"bitcast {vector_of('half', width)} {half} to {stored}")
            pointer = self.make(f"inttoptr i64 %out{number} to ptr")
            pointer = self.make(f"getelementptr {kind}, ptr {pointer}, i64 %{run}.since")
            self.put(f"store {stored} {bits}, ptr {pointer}, align {sink.dtype.itemsize}")
        elif isinstance(sink, Count):
            # A bit for each element, and the number of those that are set.
            bits = value if width == 1 else self.make(f"bitcast {bools} {value} to i{width}")
            if width > 1:
                bits = self.make(f"call i{width} @llvm.ctpop.i{width}(i{width} {bits})")
            self.add_to(f"%count{number}", self.make(f"zext i{width} {bits} to i64"))
        elif isinstance(sink, AddUp):
            doubles = vector_of(DOUBLE, width)
            pointer = self.make(f"inttoptr i64 %out{number} to ptr")
            pointer = self.make(f"getelementptr double, ptr {pointer}, i64 %lane.first")
            pointer = self.make(f"getelementptr double, ptr {pointer}, i64 %{run}.since")
            known = self.make(f"load {doubles}, ptr {pointer}, align 8")
            self.put(f"store {doubles} {self.make(f'fadd {doubles} {known}, {value}')}, ptr {pointer}, align 8")
        else:
            self._write_collecting(number, sink, values, width, run)

    def _write_collecting(self, number: int, sink: Collect, values: dict[int, str], width: int, run: str) -> None:
        """Nothing mostly; where an element is wanted, all of them are written, and those that are not are overwritten."""
        value, wanted = values[sink.symbol.node], values[sink.condition.node]
        name = f"{run}.collect{number}"
        bits = wanted if width == 1 else self.make(f"bitcast {vector_of(BOOL, width)} {wanted} to i{width}")
        some = bits if width == 1 else self.make(f"icmp ne i{width} {bits}, 0")
        self.put(f"br i1 {some}, label %{name}, label %{name}.done")
        self.put(f"{name}:")
        room = self.make(f"inttoptr i64 %out{number} to ptr")
        count = self.make(f"load i64, ptr %count{number}")
        for lane in range(width):
            one, flag = value, wanted
            if width > 1:
                one = self.make(f"extractelement {vector_of(INT, width)} {value}, i64 {lane}")
                flag = self.make(f"extractelement {vector_of(BOOL, width)} {wanted}, i64 {lane}")
            pointer = self.make(f"getelementptr i32, ptr {room}, i64 {count}")
            self.put(f"store i32 {one}, ptr {pointer}")
            count = self.make(f"add i64 {count}, {self.make(f'zext i1 {flag} to i64')}")
        self.put(f"store i64 {count}, ptr %count{number}")
        self.put(f"br label %{name}.done")
        self.put(f"{name}.done:")
