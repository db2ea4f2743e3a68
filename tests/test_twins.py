"""Compiled loops and the plain ones they stand in for: the same to the bit, and none where they cannot be had."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import threading

import pytest
import torch
from torch import Tensor

from aim import directions, sums
from merging import randomness
from merging.merge_work import merge
from merging.methods import della
from merging.recipe_flags import make_recipe
from streaming import stream
from streaming.twins import TWINS, Twins, compile_all, use_compiled
from tests.pico import make_family

SIZES = (0, 1, 63, 64, 65, 4096, 10_007)
EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1e-39,
    3.4e38,
    -3.4e38,
    65504.0,
    0.5,
    2.0**-126,
    1.0039,
    1.00390625,
    1.0117,
]
ODD = [float("nan"), float("inf"), -float("inf")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_all()


def numbers(size: int, seed: int, *, odd: bool = False) -> Tensor:
    """Random float32 of many magnitudes, with repetitions and edges of the format."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
    pool = torch.tensor(EDGES + (ODD if odd else []))
    special = torch.rand(size, generator=generator) < 0.2
    return torch.where(special, pool[torch.randint(len(pool), (size,), generator=generator)], values)


def spelt(value: object) -> object:
    """Anything that a twin returns or changes, with the bits of tensors in place of their numbers; any NaN is one."""
    if isinstance(value, Tensor):
        whole = value.masked_fill(value.isnan(), torch.nan) if value.is_floating_point() else value
        return str(value.dtype), whole.view(torch.uint8).tolist() if value.numel() else []
    if isinstance(value, list | tuple):
        return [spelt(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def check(function, *arguments, changes=None, **keywords):
    """Run both twins, each on copies of its arguments, and compare what they return, and the argument that they change."""
    copied = functools.partial(
        torch.utils._pytree.tree_map, lambda one: one.clone() if isinstance(one, Tensor) else one
    )
    found = []
    for use in (False, True):
        use_compiled(use)
        try:
            given = copied(arguments)
            result = function(*given, **keywords)
        finally:
            use_compiled(False)
        found.append(spelt([result, [] if changes is None else given[changes]]))
    assert found[0] == found[1]


def test_all_twins_are_compiled_and_tested_here():
    known = TWINS.compiled.keys()
    assert known == {
        *(("streaming.kernels", name) for name in ("load", "round_to")),
        *(("merging.kernels", name) for name in ("drop_by_rank_", "keep_marked_")),
        *(("aim.kernels", name) for name in ("add_rows", "take_rows_back")),
    }  # fmt: skip
    for module, name in known:
        plain = next(getattr(place, name) for place in (stream, della, sums, directions) if hasattr(place, name))
        parameters = [list(inspect.signature(one).parameters.values()) for one in (plain, TWINS.compiled[module, name])]
        assert [one.kind for one in parameters[0]] == [one.kind for one in parameters[1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [False, True])
def test_loading(size, dtype, odd):
    raw, base = numbers(size, 1, odd=odd).to(dtype), numbers(size, 2)
    for minus in (None, base, raw.float()):
        for look in (False, True):
            check(stream.load, raw, torch.full((size,), 7.0), minus, look, changes=1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (1, 4096), (7, 513), (16, 2048), (2, 20_000)])
@pytest.mark.parametrize("kind", ["spread", "odd", "few", "zeros", "normal", "tiny"])
@pytest.mark.parametrize("start", [0, 3 << 20, (1 << 32) - 4096, (5 << 32) + 2048])
def test_dropping_by_rank(rows, columns, kind, start):
    """Of magnitudes that are spread, equal, zero or all in one bucket; at indices of more than 32 bits, and across their boundary."""
    size = rows * columns
    values = numbers(size, 5, odd=kind == "odd")
    if kind == "few":
        values = values.sign() * (1 + torch.arange(size) % 3) * 2.0**-9
    elif kind == "zeros":
        values = torch.where(torch.arange(size) % 3 == 0, values, -0.0)
    elif kind == "normal":
        values = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    elif kind == "tiny":
        values = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-40
    keys_of = functools.partial(randomness.keys, 7, "w", 1)
    for density, epsilon in ((0.5, 0.15), (0.9, 0.05), (0.3, 0.0)):
        limits = della.thresholds(columns, density, epsilon)
        check(della.drop_by_rank_, values, columns, limits, keys_of, start, changes=0)
        dropped, again = values.clone(), values.clone()
        kept = della.drop_by_rank_(dropped, columns, limits, keys_of, start)
        check(della.keep_marked_, values, columns, kept, changes=0)
        della.keep_marked_(again, columns, kept)
        assert spelt(again) == spelt(dropped)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("odd", [False, True])
def test_rounding(size, dtype, odd):
    values = numbers(size, 3, odd=odd)
    values = values if odd or dtype != torch.float16 else values.clamp(-6e4, 6e4)
    check(stream.round_to, values, dtype)
    check(stream.round_to, values.to(dtype), dtype)
    check(stream.round_to, torch.arange(size), torch.int64)


def test_every_bfloat16_and_every_tie_is_rounded_alike():
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper + lower
        values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
        check(stream.round_to, values, torch.bfloat16)
        check(stream.round_to, values[values.isfinite()], torch.bfloat16)
    assert stream.round_to(values[:10], torch.bfloat16)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "first"),
    [((1, 1, 1), 1), ((1, 1, 5), 0), ((3, 33, 65), 1), ((2, 97, 1030), 4), ((1, 64, 24), 64), ((2, 300, 2051), 0)],
)
def test_sums_of_channels(shape, first, dtype):
    """One block after the other, with the largest |x| in several rows at once, and earlier than in what is there."""
    for scale in (1.0, 1e-3):
        x = (numbers(math.prod(shape), 3).clamp(-1e4, 1e4) * scale).view(shape).to(dtype)
        x[..., -1, :] = x[..., 0, :]
        before = torch.rand(sums.KEPT, shape[-1], dtype=torch.float64)
        check(sums.add_rows, x, first, before, torch.empty_like(before).zero_(), changes=3)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    check(sums.add_rows, strided, first, before, torch.zeros_like(before), changes=3)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 3), (3, 4, 127), (2, 4, 128), (1, 3, 129), (2, 7, 576), (1, 2, 4097)]
)
def test_taking_rows_back(shape, odd):
    """Of rows of fewer and more elements than lanes, with one direction for all matrices and one for each."""
    base, merged = numbers(math.prod(shape), 1).view(shape), numbers(math.prod(shape), 2, odd=odd).view(shape)
    for matrices in {1, shape[0]}:
        u = torch.randn(matrices, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for omega in (0.0, 0.3, 1.0):
            check(directions.take_rows_back, base, merged, u, omega)
            check(directions.take_rows_back, merged.sign(), merged, u, omega)


def test_only_threads_that_ask_use_what_is_compiled(monkeypatch):
    used = []
    monkeypatch.setitem(TWINS.compiled, ("streaming.kernels", "round_to"), lambda *arguments: used.append(arguments))
    stream.round_to(torch.ones(3), torch.bfloat16)
    assert not used
    thread = threading.Thread(target=lambda: (use_compiled(True), stream.round_to(torch.ones(3), torch.bfloat16)))
    thread.start()
    thread.join()
    assert len(used) == 1
    stream.round_to(torch.ones(3), torch.bfloat16)
    assert len(used) == 1


BROKEN = """
def first():
    return 2

def second():
    return 2

def fail():
    raise RuntimeError

EXAMPLES = {"first": first, "second": fail}
"""


def test_what_cannot_be_compiled_stays_plain(monkeypatch, tmp_path):
    (tmp_path / "broken_kernels.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    twins = Twins()

    @twins.twin("broken_kernels")
    def first() -> int:
        return 1

    @twins.twin("broken_kernels")
    def second() -> int:
        return 1

    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    twins.compile_all()
    assert not twins.compiled
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    twins.compile_all()
    use_compiled(True)
    try:
        assert (first(), second()) == (2, 1)
    finally:
        use_compiled(False)


def test_what_is_run_is_compiled_beside_it():
    twins = Twins()
    round_to = twins.twin("streaming.kernels")(stream.round_to.__wrapped__)
    use_compiled(True)
    try:
        with twins.compiling():
            for _ in range(2):
                assert round_to(torch.ones(3), torch.bfloat16)[1]
            (compiler,) = (thread for thread in threading.enumerate() if thread.name == "compiler")
        compiler.join()
    finally:
        use_compiled(False)
    assert list(twins.compiled) == [("streaming.kernels", "round_to")]


def test_without_numba(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    twins = Twins()
    twins.twin("streaming.kernels")(stream.round_to.__wrapped__)
    twins.compile_all()
    with twins.compiling():
        assert not [thread for thread in threading.enumerate() if thread.name == "compiler"]
    assert not twins.compiled


@pytest.mark.parametrize(("worth", "expected"), [(1, True), (10**9, False)])
def test_large_merges_are_compiled(tmp_path, monkeypatch, worth, expected):
    started = []
    monkeypatch.setattr(stream, "WORTH_TWINS", worth)
    monkeypatch.setattr(stream, "compiling", lambda: started.append(True) or contextlib.nullcontext())
    family = make_family(tmp_path, "llama")
    merge(make_recipe("linear", str(family.base), str(family.models[0])), tmp_path / "out")
    assert bool(started) == expected
