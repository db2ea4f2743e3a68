"""Write down what a formula does with one element, and what becomes of its numbers; `streaming.loops` makes a loop of it.

trace = Trace(inputs=(torch.bfloat16, torch.bfloat16), is_delta=True)
merged = formula(trace)                          # a Symbol: the nodes that lead to it are in `trace.nodes`
text = write_loop(trace, [Store(merged, torch.bfloat16)])      # compiled by `streaming.machine_code`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from streaming.elements import MAGNITUDE_BITS, Number, hash_of
from streaming.sums import Channels

PIECE_ELEMENTS = 1 << 15
"""Elements of each input that are read at a time."""
STORED = {torch.bfloat16: "i16", torch.float16: "i16", torch.float32: "i32"}
"""dtype -> what LLVM loads and stores of it."""
FINE, NOT_FINITE, NOT_READ = 0, 1, 2
"""What a loop returns."""

FLOAT, DOUBLE, INT, BOOL = "float", "double", "i32", "i1"

LEAVES = ("input", "number", "integer", "constant", "row", "column", "first", "offset")
"""Operations that work on no other node."""

Node = tuple[Any, ...]
"""An operation, and the nodes and constants that it works on."""


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A number of an element, while a formula is written down: a node of a trace, and its type (FLOAT, DOUBLE, INT or BOOL)."""

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

    def double(self) -> Symbol:
        """A float32 as float64."""
        return self.trace.add("widen", self.node, type_=DOUBLE)

    def float(self) -> Symbol:
        """A float64 rounded to float32."""
        return self.trace.add("narrow", self.node, type_=FLOAT)

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
        constant = int(cast(int, value)) if type_ in (INT, BOOL) else float(cast(Any, value))
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

    def nodes_of(self, sinks: Sequence[Sink]) -> set[int]:
        """The nodes that some sinks depend on."""
        open_ = [sink.symbol.node for sink in sinks]
        open_ += [sink.condition.node for sink in sinks if isinstance(sink, Collect)]
        needed: set[int] = set()
        while open_:
            place = open_.pop()
            if place not in needed:
                needed.add(place)
                op, *args = self.nodes[place]
                open_ += [] if op in LEAVES else args
        return needed

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


@dataclass(frozen=True)
class AddUp:
    """Add a float64 of each element to its lane (`streaming.sums`)."""

    symbol: Symbol
    channels: Channels

    @property
    def key(self) -> Node:
        """What decides the loop of it: not the channels, which jobs speak of."""
        return "add_up", self.symbol.node


Sink = Store | Count | Collect | AddUp
"""What becomes of the numbers."""


def loop_key(trace: Trace, sinks: Sequence[Sink]) -> Node:
    """Equal for traces of which one loop can do the work."""
    return tuple(map(str, trace.inputs)), tuple(trace.nodes), tuple(sink.key for sink in sinks)


def only_needed(trace: Trace, sinks: Sequence[Sink]) -> tuple[Trace, list[Sink], list[int]]:
    """A trace of the nodes that sinks depend on, and of at least one input: what is asked of one model after the other is one loop.

    Returns: the trace, the sinks in it, and the slots that its inputs had.
    """
    kept = sorted(trace.nodes_of(sinks))
    slots = [trace.nodes[place][1] for place in kept if trace.nodes[place][0] == "input"]
    if not slots:
        kept, slots = sorted([0, *kept]), [0]
    numbers = {place: number for number, place in enumerate(kept)}
    less = copy.copy(trace)
    less.inputs = tuple(trace.inputs[slot] for slot in slots)
    less.types = [trace.types[place] for place in kept]
    less.nodes = []
    for op, *args in (trace.nodes[place] for place in kept):
        known = [slots.index(args[0])] if op == "input" else args if op in LEAVES else [numbers[arg] for arg in args]
        less.nodes.append((op, *known))

    def moved(symbol: Symbol) -> Symbol:
        return Symbol(less, numbers[symbol.node], symbol.type)

    found: list[Sink] = [
        Collect(moved(sink.symbol), moved(sink.condition))
        if isinstance(sink, Collect)
        else replace(sink, symbol=moved(sink.symbol))
        for sink in sinks
    ]
    return less, found, slots
