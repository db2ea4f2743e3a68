"""LLVM's language: lines, names, constants, and what it calls types of one element or of several side by side."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from streaming.trace import BOOL, DOUBLE, FLOAT

WIDTH = 16
"""Elements that are worked on together: a vector of 512 bits, or several of what the processor has."""


class Lines:
    """Lines of a function, and names for what they make."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.allocations: list[str] = []
        self._count = 0

    def put(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)

    def make(self, text: str) -> str:
        """Add a line that makes something; its name."""
        self._count += 1
        name = f"%t{self._count}"
        self.put(f"{name} = {text}")
        return name

    def allocate(self, name: str, kind: str) -> None:
        """Have a variable from the function's beginning on, of zeros."""
        self.allocations += [f"{name} = alloca {kind}", f"store {kind} zeroinitializer, ptr {name}"]

    def splat(self, kind: str, value: str, width: int) -> str:
        """A number side by side with itself."""
        if width == 1:
            return value
        single = self.make(f"insertelement <{width} x {kind}> poison, {kind} {value}, i64 0")
        zeros = f"<{width} x i32> zeroinitializer"
        return self.make(f"shufflevector <{width} x {kind}> {single}, <{width} x {kind}> poison, {zeros}")

    def add_to(self, place: str, more: str) -> None:
        """Add to a variable."""
        known = self.make(f"load i64, ptr {place}")
        self.put(f"store i64 {self.make(f'add i64 {known}, {more}')}, ptr {place}")


def declare() -> str:
    """The intrinsics that a loop may call."""
    lines = [f"declare i{WIDTH} @llvm.ctpop.i{WIDTH}(i{WIDTH})"]
    for width in (WIDTH, 1):
        vector = vector_of(FLOAT, width)
        lines += [f"declare {vector} @llvm.fabs.{suffix_of(width)}({vector})"]
        lines += [f"declare {vector} @llvm.fma.{suffix_of(width)}({vector}, {vector}, {vector})"]
        for kind in ("i16", "i32"):
            vector, name = vector_of(kind, width), kind if width == 1 else f"v{width}{kind}"
            lines += [f"declare {vector} @llvm.umax.{name}({vector}, {vector})"]
    for kind in ("i16", "i32"):
        lines += [f"declare {kind} @llvm.vector.reduce.umax.v{WIDTH}{kind}(<{WIDTH} x {kind}>)"]
    return "\n".join(lines)


def vector_of(kind: str, width: int) -> str:
    """A type, `width` times."""
    return kind if width == 1 else f"<{width} x {kind}>"


def suffix_of(width: int) -> str:
    """How intrinsics of float32 are named."""
    return "f32" if width == 1 else f"v{width}f32"


def short(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def in_order(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    """Each dtype once, in an order that is always the same."""
    return sorted(set(dtypes), key=str)


def constant(kind: str, text: str, width: int) -> str:
    """A number as LLVM spells it: a float32 by the bits of the float64 that it is."""
    if kind == FLOAT:
        (rounded,) = struct.unpack("f", struct.pack("f", float(text)))
        text = f"0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X}"
    elif kind == DOUBLE:
        text = f"0x{struct.unpack('Q', struct.pack('d', float(text)))[0]:016X}"
    elif kind == BOOL:
        text = "true" if int(text) else "false"
    return text if width == 1 else f"splat ({kind} {text})"
