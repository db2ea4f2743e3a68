"""Make LLVM's language of a trace: a loop that reads, computes and rounds in one pass.

The loop reads stored numbers, in pieces that the nearest caches hold, from the files themselves where it can; numbers that are not
finite, read or made, are only noticed: whoever runs the loop then has the formula's torch version make the block.

No operation is contracted or reordered: each is rounded by itself, as torch rounds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streaming.element_lines import ElementLines
from streaming.llvm import WIDTH, declare, in_order, short, vector_of
from streaming.trace import (
    FINE,
    FLOAT,
    INT,
    NOT_FINITE,
    NOT_READ,
    PIECE_ELEMENTS,
    STORED,
    AddUp,
    Collect,
    Count,
    Node,
    Sink,
    Trace,
)

INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
"""dtype -> the bits of its infinity: what is not finite has no smaller magnitude."""
OVERFLOW = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000, torch.float32: 0x7F800000}
"""dtype -> the bits of the least float32 that it rounds to infinity."""

JOB_HEAD = ("start", "stop", "rows", "columns", "pread", "floats", "integers", "results")
OF_SUMS = ("span", "lanes")
OF_INPUT, OF_CHANNEL = ("descriptor", "offset", "buffer"), ("values", "per_matrix", "per_row")


def write_loop(trace: Trace, sinks: Sequence[Sink]) -> str:
    """A function `i64 loops(ptr jobs, i64 count, i64 bytes)` in LLVM's language, which does jobs of so many bytes each.

    A job is an array of int64: JOB_HEAD, OF_SUMS where something is added up, OF_INPUT for each input, an address for each sink, OF_CHANNEL for each channel.

        start, stop         the elements to work on, as indices of the tensor
        rows, columns       of one of its matrices
        pread               address of the C library's function
        floats, integers    addresses of the trace's numbers: float32, int32
        results             address of an int64 for each sink: counts
        span, lanes         elements of a group, and lanes that they are dealt to (`streaming.sums`)
        descriptor, offset  of the input's file, and where in it the tensor begins; descriptor -1: the numbers are in the buffer
        buffer              of PIECE_ELEMENTS numbers to read into, or all of the region's
        values, ...         address of a channel's float32, and how many apart matrices and rows are
    """
    return _Loop(trace, sinks).write()


class _Loop(ElementLines):
    """The whole function."""

    def write(self) -> str:
        slots = [*JOB_HEAD, *(OF_SUMS if self._adds_up else ())]
        for slot in range(len(self._trace.inputs)):
            slots += [f"{name}{slot}" for name in OF_INPUT]
        slots += [f"out{number}" for number in range(len(self._sinks))]
        for number in range(len(self._trace.channels)):
            slots += [f"{name}{number}" for name in OF_CHANNEL]
        for place, name in enumerate(slots):
            self.put(f"%{name}.at = getelementptr i64, ptr %job, i64 {place}")
            self.put(f"%{name} = load i64, ptr %{name}.at")
        for name in ("pread", "floats", "integers", "results"):
            self.put(f"%{name}.ptr = inttoptr i64 %{name} to ptr")
        self.put("%first = trunc i64 %start to i32")
        for place, node in enumerate(self._trace.nodes):
            if node[0] in ("number", "integer"):
                kind, array = (FLOAT, "floats") if node[0] == "number" else (INT, "integers")
                self.put(f"%p{place}.at = getelementptr {kind}, ptr %{array}.ptr, i64 {node[1]}")
                self.put(f"%p{place} = load {kind}, ptr %p{place}.at")
        for number, sink in enumerate(self._sinks):
            if isinstance(sink, Count | Collect):
                self.allocate(f"%count{number}", "i64")
        for dtype in set(self._trace.inputs):
            for width in (WIDTH, 1):
                self.allocate(f"%in.{short(dtype)}.{width}", vector_of(STORED[dtype], width))
        for dtype in self.rounded():
            for width in (WIDTH, 1):
                self.allocate(f"%out.{short(dtype)}.{width}", vector_of("i32", width))
        self.put("br label %pieces")
        self._write_pieces()
        self._write_end()
        body = "\n".join(f"  {line}" if not line.endswith(":") else line for line in self.lines)
        head = "\n".join(f"  {line}" for line in self.allocations)
        return f"{declare()}\ndefine i64 @loop(ptr %job) {{\nentry:\n{head}\n{body}\n}}\n{_MANY}"

    def _write_pieces(self) -> None:
        """Piece by piece: read, then segment by segment."""
        self.put("pieces:")
        self.put("%p = phi i64 [%start, %entry], [%e, %piece.end]")
        self.put("%p.more = icmp slt i64 %p, %stop")
        self.put("br i1 %p.more, label %piece, label %end")
        self.put("piece:")
        self.put(f"%p.far = add i64 %p, {PIECE_ELEMENTS}")
        self.put("%e.less = icmp slt i64 %p.far, %stop")
        self.put("%e = select i1 %e.less, i64 %p.far, i64 %stop")
        self.put("%piece.count = sub i64 %e, %p")
        for slot, dtype in enumerate(self._trace.inputs):
            self._write_reading(slot, dtype.itemsize)
        self.put("br label %segments")
        # Segments of one row each, where a channel has numbers of its own; of one turn of the lanes, where something is added up.
        self.put("segments:")
        self.put(f"%q = phi i64 [%p, %read{len(self._trace.inputs) - 1}.done], [%q.end, %segment.end]")
        self.put("%q.more = icmp slt i64 %q, %e")
        self.put("br i1 %q.more, label %segment, label %piece.end")
        self.put("segment:")
        if self._trace.channels:
            self.put("%column = urem i64 %q, %columns")
            self.put("%row.all = udiv i64 %q, %columns")
            self.put("%row = urem i64 %row.all, %rows")
            self.put("%matrix = udiv i64 %row.all, %rows")
            self.put("%row.left = sub i64 %columns, %column")
            self.put("%row.end = add i64 %q, %row.left")
            self.put("%row.less = icmp slt i64 %row.end, %e")
            self.put("%q.all = select i1 %row.less, i64 %row.end, i64 %e")
            for place, node in enumerate(self._trace.nodes):
                if node[0] in ("row", "column"):
                    self._write_channel(place, node)
        else:
            self.put("%q.all = add i64 %e, 0")
        if self._adds_up:
            self._write_turn()
        else:
            self.put("%q.end = add i64 %q.all, 0")
        self.put("%q.count = sub i64 %q.end, %q")
        self.put(f"%q.rest = and i64 %q.count, {WIDTH - 1}")
        self.put("%q.whole = sub i64 %q.end, %q.rest")
        self._write_run("vector", "segment", "%q", "%q.whole", WIDTH, "single")
        self._write_run("single", "vector", "%q.whole", "%q.end", 1, "segment.end")
        self.put("segment.end:")
        self.put("br label %segments")
        self.put("piece.end:")
        self.put("br label %pieces")

    def _write_reading(self, slot: int, itemsize: int) -> None:
        """Fill the buffer of one input, or point into it."""
        before = "piece" if slot == 0 else f"read{slot - 1}.done"
        name = f"read{slot}"
        self.put(f"%{name}.fd = trunc i64 %descriptor{slot} to i32")
        self.put(f"%{name}.direct = icmp sge i64 %descriptor{slot}, 0")
        self.put(f"%{name}.origin = select i1 %{name}.direct, i64 %p, i64 %start")
        self.put(f"%{name}.bytes = mul i64 %piece.count, {itemsize}")
        self.put(f"%{name}.skip = mul i64 %p, {itemsize}")
        self.put(f"%{name}.from = add i64 %offset{slot}, %{name}.skip")
        self.put(f"%buffer{slot}.ptr{name} = inttoptr i64 %buffer{slot} to ptr")
        self.put(f"br i1 %{name}.direct, label %{name}.more, label %{name}.done")
        self.put(f"{name}.more:")
        self.put(f"%{name}.got = phi i64 [0, %{before}], [%{name}.next, %{name}.some]")
        self.put(f"%{name}.left = sub i64 %{name}.bytes, %{name}.got")
        self.put(f"%{name}.to = getelementptr i8, ptr %buffer{slot}.ptr{name}, i64 %{name}.got")
        self.put(f"%{name}.at = add i64 %{name}.from, %{name}.got")
        self.put(f"%{name}.n = call i64 %pread.ptr(i32 %{name}.fd, ptr %{name}.to, i64 %{name}.left, i64 %{name}.at)")
        self.put(f"%{name}.bad = icmp sle i64 %{name}.n, 0")
        self.put(f"br i1 %{name}.bad, label %failed, label %{name}.some")
        self.put(f"{name}.some:")
        self.put(f"%{name}.next = add i64 %{name}.got, %{name}.n")
        self.put(f"%{name}.full = icmp sge i64 %{name}.next, %{name}.bytes")
        self.put(f"br i1 %{name}.full, label %{name}.done, label %{name}.more")
        self.put(f"{name}.done:")

    def _write_channel(self, place: int, node: Node) -> None:
        """What a channel has for this segment: a row's number, or where the columns' begin."""
        number = node[1]
        self.put(f"%c{place}.matrix = mul i64 %matrix, %per_matrix{number}")
        self.put(f"%c{place}.row = mul i64 %row, %per_row{number}")
        self.put(f"%c{place}.at = add i64 %c{place}.matrix, %c{place}.row")
        self.put(f"%c{place}.values = inttoptr i64 %values{number} to ptr")
        if node[0] == "row":
            self.put(f"%c{place}.ptr = getelementptr float, ptr %c{place}.values, i64 %c{place}.at")
            self.put(f"%c{place} = load float, ptr %c{place}.ptr")
        else:
            self.put(f"%c{place}.first = sub i64 %c{place}.at, %q")
            self.put(f"%c{place}.second = add i64 %c{place}.first, %column")

    def _write_turn(self) -> None:
        """End a segment where a turn of the lanes does, and say where its lanes are, counted from an element's index."""
        self.put("%turn.since = sub i64 %q, %start")
        self.put("%turn.at = urem i64 %turn.since, %span")
        self.put("%turn.group = udiv i64 %turn.since, %span")
        self.put("%turn.lane = urem i64 %turn.at, %lanes")
        self.put("%turn.left = sub i64 %lanes, %turn.lane")
        self.put("%turn.span.left = sub i64 %span, %turn.at")
        self.put("%turn.less = icmp slt i64 %turn.left, %turn.span.left")
        self.put("%turn.count = select i1 %turn.less, i64 %turn.left, i64 %turn.span.left")
        self.put("%turn.end = add i64 %q, %turn.count")
        self.put("%turn.sooner = icmp slt i64 %turn.end, %q.all")
        self.put("%q.end = select i1 %turn.sooner, i64 %turn.end, i64 %q.all")
        self.put("%lane.group = mul i64 %turn.group, %lanes")
        self.put("%lane.here = add i64 %lane.group, %turn.lane")
        self.put("%lane.first = sub i64 %lane.here, %turn.since")

    @property
    def _adds_up(self) -> bool:
        return any(isinstance(sink, AddUp) for sink in self._sinks)

    def _write_run(self, name: str, before: str, begin: str, end: str, width: int, after: str) -> None:
        """A loop over elements, `width` at a time."""
        self.put(f"br label %{name}" if name == "vector" else "")
        self.put(f"{name}:")
        self.put(f"%{name}.i = phi i64 [{begin}, %{before}], [%{name}.next, %{name}.last]")
        self.put(f"%{name}.more = icmp slt i64 %{name}.i, {end}")
        self.put(f"br i1 %{name}.more, label %{name}.body, label %{after}")
        self.put(f"{name}.body:")
        self.put(f"%{name}.since = sub i64 %{name}.i, %start")
        self.write_elements(width, name)
        self.put(f"br label %{name}.last")
        self.put(f"{name}.last:")
        self.put(f"%{name}.next = add i64 %{name}.i, {width}")
        self.put(f"br label %{name}")

    def _write_end(self) -> None:
        """Hand the counts over, and look whether all was finite."""
        self.put("end:")
        for number, sink in enumerate(self._sinks):
            if isinstance(sink, Count | Collect):
                pointer = self.make(f"getelementptr i64, ptr %results.ptr, i64 {number}")
                self.put(f"store i64 {self.make(f'load i64, ptr %count{number}')}, ptr {pointer}")
        bad = "false"
        limits = [(f"%in.{short(dtype)}", STORED[dtype], INFINITY[dtype]) for dtype in in_order(self._trace.inputs)]
        limits += [(f"%out.{short(dtype)}", INT, OVERFLOW[dtype]) for dtype in self.rounded()]
        for place, kind, limit in limits:
            for width in (WIDTH, 1):
                largest = self.make(f"load {vector_of(kind, width)}, ptr {place}.{width}")
                if width > 1:
                    vector = vector_of(kind, width)
                    largest = self.make(f"call {kind} @llvm.vector.reduce.umax.v{width}{kind}({vector} {largest})")
                over = self.make(f"icmp uge {kind} {largest}, {limit}")
                bad = self.make(f"or i1 {bad}, {over}")
        self.put(f"%result = select i1 {bad}, i64 {NOT_FINITE}, i64 {FINE}")
        self.put("ret i64 %result")
        self.put("failed:")
        self.put(f"ret i64 {NOT_READ}")


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
