"""Plain values as JSON and back: all that passes between a program and the test that judges it.

Plain are None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, Fraction and Decimal, nested
in any way. They arrive as exactly these types: of a subclass, or a number of numpy's, only the value is sent. Nothing is
unpickled, imported or looked up by name. Anything else is for the caller's `other` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

REMOTE = "remote"
SMALL = 1 << 63  # JSON's decimal digits are slow for larger integers, and Python limits their number


class BadValue(Exception):
    """What arrived is not an encoded value."""


def pack(value: Any, other: Callable[[Any], Any]) -> Any:
    """A value as JSON has it: a tree of lists, numbers, texts, and {kind: content} for all that JSON does not know.

    Args:
        other: gives the encoding of what is not plain, or raises.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -SMALL < value < SMALL else {"int": hex(value)}
    if kind is list:
        return [pack(item, other) for item in value]
    for base, encode in _ENCODERS.items():
        if isinstance(value, base):
            return encode(value, other)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        plain = value.item()
        if type(plain).__module__ == "builtins":
            return pack(plain, other)
    return other(value)


def unpack(data: Any, remote: Callable[[Any], Any]) -> Any:
    """The value that `pack` encoded.

    Args:
        data: from a JSON text, by whoever wrote it.
        remote: gives what stands for an encoding that `other` made, or raises BadValue.
    Raises: BadValue: nothing that `pack` makes.
    """
    kind = type(data)
    if kind is list:
        return [unpack(item, remote) for item in data]
    if kind is not dict:
        return data
    if len(data) != 1:
        raise BadValue("expected one kind")
    ((name, content),) = data.items()
    if name == REMOTE:
        return remote(content)
    try:
        return _DECODERS[name](content, remote)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise BadValue(f"expected a value, got another {name}") from error


def update(old: Any, new: Any) -> Any:
    """Give lists, dicts and sets the content that they have elsewhere by now, the objects staying the same ones.

    Args:
        old: a value that was sent.
        new: what became of it there.
    Returns: `old` where it could be changed in place, else `new`.
    """
    if type(old) is not type(new):
        return new
    if isinstance(old, list):
        old[:] = [*map(update, old, new), *new[len(old) :]]
    elif isinstance(old, dict):
        merged = {key: update(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, tuple) and len(old) == len(new):
        merged_items = tuple(map(update, old, new))
        return old if all(map(_same, old, merged_items)) else merged_items
    else:
        return new
    return old


def _same(value: Any, other: Any) -> bool:
    return value is other


def _items(name: str, base: Any) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Encode what a container really holds, whatever its subclass says that it does."""
    return lambda value, other: {name: [pack(item, other) for item in base.__iter__(value)]}


# bool and int first: what comes earlier is taken, and bool is an int.
_ENCODERS: dict[Any, Callable[[Any, Callable[[Any], Any]], Any]] = {
    int: lambda value, other: pack(int.__add__(value, 0), other),
    float: lambda value, other: float.__add__(value, 0.0) if value else float.__pos__(value),
    str: lambda value, other: str.__str__(value)[:],
    list: lambda value, other: [pack(item, other) for item in list.__iter__(value)],
    tuple: _items("tuple", tuple),
    dict: lambda value, other: {"dict": [[pack(k, other), pack(v, other)] for k, v in dict.items(value)]},
    set: _items("set", set),
    frozenset: _items("frozenset", frozenset),
    bytes: lambda value, other: {"bytes": bytes.hex(value)},
    bytearray: lambda value, other: {"bytes": bytearray.hex(value)},
    complex: lambda value, other: {"complex": [value.real, value.imag]},
    range: lambda value, other: {"range": [pack(n, other) for n in (value.start, value.stop, value.step)]},
    Fraction: lambda value, other: {"fraction": [pack(n, other) for n in (value.numerator, value.denominator)]},
    Decimal: lambda value, other: {"decimal": Decimal.__str__(value)},
}
_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "int": lambda content, remote: int(content, 16),
    "tuple": lambda content, remote: tuple([unpack(item, remote) for item in content]),
    "dict": lambda content, remote: {unpack(key, remote): unpack(item, remote) for key, item in content},
    "set": lambda content, remote: {unpack(item, remote) for item in content},
    "frozenset": lambda content, remote: frozenset([unpack(item, remote) for item in content]),
    "bytes": lambda content, remote: bytes.fromhex(content),
    "complex": lambda content, remote: complex(*content),
    "range": lambda content, remote: range(*[unpack(item, remote) for item in content]),
    "fraction": lambda content, remote: Fraction(*[unpack(item, remote) for item in content]),
    "decimal": lambda content, remote: Decimal(content),
}
