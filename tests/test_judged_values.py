"""What passes between a program and the test that judges it: plain values, unharmed and of exact types, and nothing else."""

from __future__ import annotations

import collections
import enum
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.jail.judge import names_in
from evaluation.jail.values import BadValue, pack, unpack, update

HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**40).map(lambda number: -(number**150))  # more digits than Python shows
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())  # lone surrogates too
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=8,
)
PLAIN = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4),
    max_leaves=12,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["int", "tuple", "dict", "set", "frozenset", "bytes", "complex", "range", "fraction", "decimal"]
            )
            | st.sampled_from(["remote", "object", ""]),
            inner,
            max_size=2,
        )
    ),
    max_leaves=12,
)
EXACT = {type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, Fraction, Decimal}


def refuse(value):
    raise BadValue("not plain")


def through(value):
    return unpack(json.loads(json.dumps(pack(value, refuse))), refuse)


def parts(value):
    """A value, and all that it holds."""
    yield value
    if isinstance(value, dict):
        for pair in value.items():
            yield from parts(pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from parts(item)


def same(one, other) -> bool:
    """Equal, and of the same types all through; with the sign of zero and the order of a dict."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return type(other) is dict and same(list(one.items()), list(other.items()))
    if isinstance(one, (set, frozenset)):
        return type(one) is type(other) and one == other
    return type(one) is type(other) and repr(one) == repr(other) if isinstance(one, float) else one == other


@given(PLAIN)
def test_plain_values_arrive_as_they_are(value):
    assert same(value, through(value))


@pytest.mark.parametrize(
    "value", [math.nan, -0.0, math.inf, complex(math.nan, -0.0), Decimal("NaN"), 10**5000, "\ud800\0"], ids=type
)
def test_numbers_and_texts_that_are_easily_lost(value):
    arrived = through([value])[0]
    assert type(arrived) is type(value)
    assert hex(arrived) == hex(value) if isinstance(value, int) else repr(arrived) == repr(value)


@given(JSON)
def test_whatever_arrives_is_plain_or_refused(data):
    try:
        value = unpack(json.loads(json.dumps(data)), refuse)
    except BadValue:
        return
    assert {type(part) for part in parts(value)} <= EXACT


class Equal(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


class Lying(list):
    def __iter__(self):
        return iter([42])


class Named(enum.IntEnum):
    ONE = 1


POINT = collections.namedtuple("POINT", "x y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Equal(7), 7),
        (Lying([1]), [1]),
        (Named.ONE, 1),
        (POINT(1, 2), (1, 2)),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (bytearray(b"x"), b"x"),
        (numpy.float64(0.5), 0.5),
        (numpy.int64(3), 3),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), True),
        (numpy.str_("x"), "x"),
    ],
)
def test_of_a_subclass_the_value_arrives(value, expected):
    assert same(through(value), expected)


@pytest.mark.parametrize("value", [object(), object, len, iter([]), numpy.arange(2), ..., NotImplemented, math])
def test_what_is_not_plain_is_not_sent(value):
    with pytest.raises(BadValue):
        through([value])


def test_changes_reach_the_same_objects():
    inner, outer = [1], {"a": [2], "b": 3}
    sent = ([inner, outer, {4}, (inner,)],)
    update(sent, ([[1, 5], {"a": [], "c": 6}, {7}, ([1, 5],), 8],))
    assert sent == ([[1, 5], {"a": [], "c": 6}, {7}, ([1, 5],), 8],)
    assert sent[0][0] is inner
    assert sent[0][1] is outer
    assert sent[0][3][0] is inner
    assert update([1], (1,)) == (1,)
    assert update(1, 2) == 2


def test_names_that_a_test_takes():
    test = "import math\nx = solve(1)\nassert abs(x - other.y) < math.pi and all(z for z in x)"
    assert names_in(test) == ["math", "other", "solve", "x", "z"]
