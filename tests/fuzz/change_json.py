"""Changes to JSON: to the tree, and to the text."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

Tree = Any
"""What json.loads gives."""

LONG_NUMBER = 10**5000
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 18, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5, 1e308,
    float("inf"), float("nan"), "", " ", "x", ".", "..", "../base/config.json", "/dev/zero", "a\0b", "\x1b[31mred", "a\nb",
    "\ud800", "²", "٣", "9" * 5000, "x" * 5000, "%s{}", "__metadata__", "<s>", "é", "\u202e", "auto", "float16",
    [], {}, [[]], [None], [0], [-1, 5], {"": {}}, [1, "x", {}],
]  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"1.0", b"\\ud800", b"\\u0000",
    b"\xff", b"\xc3", b"\0", b"//x\n", b"'", b"9" * 5000, b"[" * 3000, b"\xef\xbb\xbf", b"null", b"\n" * 50, b"true",
]  # fmt: skip


class Unfit(ValueError):
    """A change finds nothing that it could change."""


def parse(content: bytes) -> Tree:
    """The tree of a file that may have been changed before. Raises Unfit where it is no JSON any more."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Unfit from None


def places(tree: Tree) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in a tree, which may hold itself: each container once."""
    found: list[tuple[Any, Any]] = []
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        pairs = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        found += [(node, key) for key, _ in pairs]
        waiting += [value for _, value in pairs]
    return found


def spoil(rng: random.Random, tree: Tree) -> None:
    """Change one thing in a tree, at random. Raises Unfit where the tree is empty."""
    everything = places(tree)
    if not everything:
        raise Unfit
    node, key = rng.choice(everything)
    other, place = rng.choice(everything)
    what = rng.randrange(9)
    if what <= 2:
        node[key] = rng.choice(ODD)
    elif what == 3:
        del node[key]
    elif what == 4:
        node[key], other[place] = other[place], node[key]
    elif what == 5 and isinstance(node, dict):
        node[str(rng.choice(ODD))[:200]] = node.pop(key)
    elif what == 6:
        node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
    elif what == 7 and isinstance(node, dict):
        node[str(rng.choice(ODD))[:200]] = rng.choice([node[key], rng.choice(ODD)])
    elif isinstance(node[key], int):
        node[key] += rng.choice([-2, -1, 1, 2, 10, 1000, 2**32, 2**63])
    else:
        node[key] = rng.choice(ODD)


def dump(tree: Tree) -> bytes:
    """As text; numbers of any length, and no promise that it is JSON."""
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or a tree that holds itself
        raise Unfit from None


def edit(rng: random.Random, content: bytes) -> bytes:
    """JSON with one or two things in its tree changed. Raises Unfit where there is none."""
    tree = parse(content)
    for _ in range(rng.choice([1, 1, 2])):
        spoil(rng, tree)
    return dump(tree)


def set_entries(rng: random.Random, tree: dict[str, Any], options: Mapping[str, Sequence[Any]]) -> bytes:
    """A JSON object with one or two entries set to what they may be."""
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(options))
        tree[key] = rng.choice(options[key])
    return dump(tree)


def spoil_text(rng: random.Random, content: bytes) -> bytes:
    """Text with other bytes, or in another encoding."""
    return rng.choice([scratch, reencode])(rng, content)


def dress(rng: random.Random, tree: Tree) -> bytes:
    """As JSON that means the same: other spaces, other order, other escapes."""
    if isinstance(tree, dict) and rng.random() < 0.5:
        tree = dict(rng.sample(list(tree.items()), len(tree)))
    text = json.dumps(
        tree,
        indent=rng.choice([None, None, 0, 1, "\t"]),
        separators=rng.choice([None, (",", ":"), (" ,  ", "  : ")]),
        ensure_ascii=rng.random() < 0.5,
        sort_keys=rng.random() < 0.3,
    )
    return text.encode() + b" " * rng.randrange(20)


def scratch(rng: random.Random, content: bytes) -> bytes:
    """Change bytes, at random."""
    at = rng.randrange(len(content) + 1)
    to = min(len(content), at + rng.choice([1, 1, 2, 5, 20, 200]))
    what = rng.randrange(9)
    if what == 0:
        return content[:at]
    if what == 1:
        return content[:at] + content[to:]
    if what == 2:
        return content[:at] + bytes(rng.randrange(256) for _ in range(to - at)) + content[to:]
    if what == 3:
        return content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:to]) + content[to:]
    if what == 4:
        return content[:to] + content[at:]
    if what == 5:
        return content + content[at:to]
    if what == 6:
        return b"".join(rng.choice([b"", b"\0", content[at:to]]) for _ in range(rng.randrange(3)))
    return content[:at] + rng.choice(TOKENS) + content[rng.choice([at, to]) :]


def reencode(rng: random.Random, content: bytes) -> bytes:
    """As other text: another encoding, a byte order mark, a key twice, a nesting without end."""
    text = content.decode("utf-8", errors="replace")
    what = rng.randrange(5)
    if what == 0:
        return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"]))
    if what == 1:
        return content.replace(b"{", b"{" + rng.choice([b'"a": 1, ', b'"": {}, "": {}, ', b'"__proto__": [], ']), 1)
    if what == 2:
        depth = rng.choice([50, 900, 5000])
        return content.rstrip()[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + content.rstrip()[-1:]
    if what == 3:
        lines = content.split(b", ") if b", " in content else content.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        joint = b", " if b", " in content else b""
        return joint.join([*lines[: at + 1], *lines[at:]])
    return content.replace(b":", rng.choice([b"=", b"::", b": -", b":\n\n", b": 1"]), rng.randrange(1, 4))
