"""Formulas compiled to loops and their torch versions: the same to the bit, whatever is merged, looked at, relaxed and rounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aim.relaxation import ChannelFactors, Relaxation
from checkpoints.source import TensorInfo, TensorRef
from merging.merge_work import merge
from merging.methods.sparse import summing
from merging.methods.trim import Trim
from merging.randomness import drop
from merging.recipe_flags import make_recipe
from streaming import fused
from streaming.blocks import GRID_ELEMENTS, Block, Region, TensorSpec, tile
from streaming.elements import Element, Formula, Number, Question, Tensors, answer, lerp, magnitude_bits, where
from streaming.fused import Asking, TensorLoop
from streaming.loops import write_loop
from streaming.machine_code import Compiler, can_compile
from streaming.output import RunOptions
from streaming.stream import StreamOptions
from streaming.trace import Collect, Count, Store, Trace
from streaming.twins import use_compiled
from tests.in_memory import make_method
from tests.pico import make_family
from tests.test_twins import numbers

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1,), (15,), (16,), (17,), (40_003,), (3, 5), (33, 1), (2, 7, 19), (5, 9001)]

pytestmark = [pytest.mark.command, pytest.mark.skipif(not can_compile(), reason="no LLVM")]  # merges with every method


class InMemory:
    """Tensors as a source, which loops read first and not from files."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.label = "memory"
        self.tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._stored = tensors

    def read(self, name: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        return self._stored[name].flatten()[start:stop]


def lend(key: object, count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype)


def inputs(shape: Sequence[int], dtype: torch.dtype, count: int = 4, *, odd: bool = False) -> list[Tensor]:
    """Stored tensors, of magnitudes that float16 holds."""
    size = int(np.prod(shape))
    stored = []
    for seed in range(count):
        values = numbers(size, seed, odd=odd)
        stored.append((values.clamp(-3e3, 3e3) if not odd else values).to(dtype).view(shape))
    return stored


def run(
    formula: Formula, stored: Sequence[Tensor], start: int, stop: int, out: torch.dtype = torch.float32, name: str = "w"
) -> tuple[Tensor | None, Tensor]:
    """What a loop makes of a region of a base and task vectors, None where it does not; and what torch does."""
    spec = TensorSpec(name, tuple(stored[0].shape))
    region = Region(spec, start, stop)
    source = InMemory({str(number): one for number, one in enumerate(stored)})
    refs = [TensorRef(source, str(number)) for number in range(len(stored))]
    trace = Trace([one.dtype for one in stored], has_base=True, is_delta=True)
    loop = TensorLoop(spec, refs, trace, [Store(formula(trace), out)])  # type: ignore[arg-type]
    written = torch.empty(region.numel, dtype=out)
    done = loop.run([region], lend, [written])
    flat = [one.flatten().float() for one in stored]
    whole = Block(Region(spec, 0, len(flat[0])), flat[0], [one - flat[0] for one in flat[1:]], [])
    return None if done is None else written, formula(Tensors(whole))[start:stop].to(out)


def regions(size: int) -> list[tuple[int, int]]:
    return [(0, size), *([(size // 3, size - 1)] if size > 6 else [])]


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.itemsize])


def formulas(shape: Sequence[int]) -> dict[str, Formula]:
    """Every operation, and channels of every kind that the shape has."""
    spec = TensorSpec("w", tuple(shape))
    matrices, rows, columns = spec.matrices, spec.rows, spec.columns
    generator = torch.Generator().manual_seed(7)

    def channel(x: Element, *size: int) -> Number:
        return x.channel(torch.rand(size, generator=generator.manual_seed(7)))

    trim = Trim(int(magnitude_bits(torch.tensor([0.1]))), spec.numel // 2)

    def arithmetic(x: Element) -> Number:
        first, second, third = x.models
        return (1.5 - first * x.number(0.3)) / (abs(second) + 0.25) + x.base * (third - 2.0)

    def conditions(x: Element) -> Number:
        first, second, third = x.models
        middle = ((first > second) & ~(second >= third)) | (first == 0.0)
        return where(middle, where(third < 0.0, -1.0, third), where((second <= 0.5) | (first != third), first, 0.0))

    def ends(x: Element) -> Number:
        return lerp(x.base, x.models[0], where(x.models[1] > 0.0, x.number(0.3), x.number(0.9)))

    def trimmed(x: Element) -> Number:
        return where(trim.keeps(x, x.models[0]), x.models[0], 0.0)

    def drawn(x: Element) -> Number:
        return drop(x, x.models[0], 0.4, seed=3, tensor="w", model=1) + drop(
            x, x.base, 0.9, seed=4, tensor="w", model=0
        )

    sizes = [(1, 1, columns), (1, rows, 1), (matrices, 1, columns), (matrices, rows, 1), (matrices, 1, 1)]
    channels = {f"channels {size}": lambda x, size=size: x.models[0] * channel(x, *size) for size in sizes}
    return {
        "arithmetic": arithmetic, "conditions": conditions, "lerp": ends, "trimmed": trimmed, "drawn": drawn, **channels,
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_has_torchs_bits(shape, dtype):
    stored = inputs(shape, dtype)
    for name, formula in formulas(shape).items():
        for start, stop in regions(stored[0].numel()):
            loop, torch_version = run(formula, stored, start, stop)
            finite = torch_version.isfinite().all()
            assert (loop is not None) == finite, name
            if loop is not None:
                assert torch.equal(bits(loop), bits(torch_version)), (name, start)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding(dtype, out):
    """Of numbers of all sizes, ties among them; where one is not finite afterwards, no loop writes it."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        whole = upper + lower
        values = torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32).view(torch.float32)
        kept = values[values.to(dtype).isfinite() & values.to(out).isfinite() & values.to(dtype).to(out).isfinite()]
        loop, expected = run(lambda x: x.base, [kept.to(dtype)] * 2, 0, len(kept), out)
        assert loop is not None
        assert torch.equal(bits(loop), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 15, 16, 99])
def test_what_is_not_finite_is_left_to_torch(dtype, place):
    for odd in (torch.nan, torch.inf, -torch.inf):
        for model in range(2):
            stored = [torch.ones(100, dtype=dtype) for _ in range(2)]
            stored[model][place] = odd
            assert run(lambda x: x.base + x.models[0], stored, 0, 100)[0] is None
            assert run(lambda x: x.base + x.models[0], stored, place + 1, 100)[0] is not None or place == 99
    stored = [torch.ones(100, dtype=dtype) for _ in range(2)]
    large = run(lambda x: x.base * x.number(1e38) * x.number(10.0), stored, 0, 100, torch.bfloat16)
    assert large[0] is None
    edge = torch.full((20,), 65519.996)
    assert run(lambda x: x.base, [edge, edge], 0, 20, torch.float16)[0] is not None
    edge[place % 20] = 65520.0
    assert run(lambda x: x.base, [edge, edge], 0, 20, torch.float16)[0] is None


@pytest.mark.parametrize("models", [1, 2, 7])
def test_counting_and_collecting(models):
    stored = inputs((10_003,), torch.bfloat16, 1 + models)
    source = InMemory({str(number): one for number, one in enumerate(stored)})
    refs = [TensorRef(source, str(number)) for number in range(len(stored))]
    trace = Trace([torch.bfloat16] * len(stored), has_base=True, is_delta=True)
    last = trace.models[-1]
    size = magnitude_bits(last)
    wanted = size > trace.integer(1 << 29)
    spec = TensorSpec("w", (10_003,))
    loop = TensorLoop(spec, refs, trace, [Count(last > 0.0), Collect(size, wanted)])  # type: ignore[arg-type]
    room = torch.empty(10_004, dtype=torch.int32)
    for start, stop in ((0, 10_003), (5, 9_000)):
        found = loop.run([Region(spec, start, stop)], lend, [None, room])
        assert found is not None
        expected = (stored[-1].float() - stored[0].float())[start:stop]
        magnitudes = magnitude_bits(expected)
        assert found[0, 0] == int((expected > 0).sum())
        assert torch.equal(room[: found[0, 1]], magnitudes[magnitudes > 1 << 29])


SUMMED = [*SHAPES, (1030, 4), (70, 3, 3), (2, 40, 130), (3, 9001), (200_001,), (2, 90_001), (150, 1024)]


@pytest.mark.parametrize("shape", SUMMED)
@pytest.mark.parametrize("channels", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums(shape, channels, dtype):
    """Of regions of every kind, several at a time; against exact sums too."""
    stored = inputs(shape, dtype)
    source = InMemory({str(number): one for number, one in enumerate(stored)})
    base, *models = [TensorRef(source, str(number)) for number in range(len(stored))]
    spec = TensorSpec("w", tuple(shape))

    def question(x: Element) -> Question:
        sizes = [one.double() for one in x.models]
        mean = (sizes[0] + sizes[1] + sizes[2]) / 3.0
        return Question(
            [x.base > 0.0], sums=[sizes[0] * sizes[1], mean.float().double(), -1.0 * x.base.double()], channels=channels
        )

    asking = Asking(spec, base, models, question, is_delta=True)
    flat = [one.flatten().float() for one in stored]
    for most in (GRID_ELEMENTS, 1001):
        cut = list(tile(spec, most))[:300]
        found = asking.answers(cut, lend)
        assert found is not None
        for region, by_loop in zip(cut, found, strict=True):
            first, *others = [one[region.start : region.stop] for one in flat]
            block = Block(region, first, [one - first for one in others], [])
            asked = question(Tensors(block))
            by_torch = answer(asked, region)
            assert (by_loop.counts, by_loop.region) == (by_torch.counts, region)
            assert by_loop.sums.tobytes() == by_torch.sums.tobytes()
            exact = torch.stack([one.view(region.shape) for one in asked.sums])
            dims = {"tensor": (1, 2, 3), "rows": (3,), "columns": (2,)}[channels]
            expected, sizes = exact.sum(dims, keepdim=True), exact.abs().sum(dims, keepdim=True)
            assert by_loop.sums.shape == expected.shape
            assert bool(((torch.from_numpy(by_loop.sums) - expected).abs() <= sizes * 1e-13).all())


def test_what_is_asked_of_one_model_is_one_loop_that_reads_no_other():
    stored = inputs((3, 1001), torch.bfloat16)
    source = InMemory({str(number): one for number, one in enumerate(stored)})
    base, *models = [TensorRef(source, str(number)) for number in range(len(stored))]
    region = Region(TensorSpec("w", (3, 1001)), 7, 2_000)
    read: list[str] = []
    right = InMemory.read
    source.read = lambda name, *where: read.append(name) or right(source, name, *where)  # type: ignore[method-assign]
    keys = set()
    for model in range(3):

        def question(x: Element, model: int = model) -> Question:
            vector = x.models[model]
            return Question([vector > x.number(0.5)], [(x.offset(), vector > 0.0)])

        asking = Asking(region.tensor, base, models, question, is_delta=True)
        keys.add(asking.loop._key)
        read.clear()
        (found,) = asking.answers([region], lend) or []
        assert read == ["0", str(model + 1)]
        first, vector = (stored[at].flatten().float()[7:2_000] for at in (0, model + 1))
        expected = answer(question(Tensors(Block(region, first, [vector - first] * 3, []))), region)
        assert found.counts == expected.counts
        assert np.array_equal(found.collected[0], expected.collected[0])
    assert len(keys) == 1


METHODS = [
    ("linear", {}, 3), ("linear", {"normalize": False}, 3), ("task_arithmetic", {"lambda": 0.7, "normalize": True}, 3),
    ("ties", {"density": 0.3}, 3), ("ties", {"density": 0.3, "rescale": True, "normalize": False}, 3),
    ("dare_linear", {"density": 0.4}, 3), ("dare_ties", {"density": 0.6}, 3), ("dare_ties", {"density": 0.6, "rescale": True}, 2),
    ("widen", {}, 3), ("della", {"density": 0.5}, 3), ("breadcrumbs", {"density": 0.5}, 3), ("breadcrumbs_ties", {"density": 0.5}, 2),
    ("karcher", {}, 3), ("model_stock", {}, 3), ("model_stock", {"filter_wise": True}, 3), ("multislerp", {}, 3), ("ram", {}, 3),
    ("ramplus_tl", {}, 3), ("sce", {}, 3), ("sce", {"select_topk": 0.3}, 3), ("nuslerp", {}, 2),
    ("nuslerp", {"nuslerp_flatten": False}, 2), ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    ("slerp", {"t": 0.3}, 1), ("nearswap", {"t": 0.001}, 1), ("arcee_fusion", {}, 1), ("passthrough", {"scale": 0.5}, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {dtype: make_family(tmp_path_factory.mktemp(str(dtype)), "llama", dtype=dtype) for dtype in DTYPES}


@pytest.mark.command
@pytest.mark.parametrize(("method", "parameters", "models"), METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_merges(tmp_path, monkeypatch, families, method, parameters, models, dtype):
    """With blocks whose edges are anywhere; the report, too."""
    looped: list[bool] = []
    right = TensorLoop.run
    monkeypatch.setattr(
        TensorLoop, "run", lambda *arguments: looped.append((found := right(*arguments)) is not None) or found
    )
    family = families[dtype]
    written = []
    for use in (False, True):
        given = ",".join(map(str, family.models[:models]))
        recipe = make_recipe(method, str(family.base), given, parameters=parameters)
        options = RunOptions(stream=StreamOptions(compiled=use, block_elements=1001, workers=2))
        out = tmp_path / f"out{use}"
        merge(recipe, out, options)
        report = json.loads((out / "merge_recipe.json").read_text())["report"]
        written.append(((out / "model.safetensors").read_bytes(), report))
        assert use or not looped
    assert written[0] == written[1]
    assert looped
    assert all(looped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "input_dim"), [((70, 33), 1), ((70, 33), 0), ((3, 20, 17), 2), ((50,), 0)])
def test_relaxing(dtype, shape, input_dim):
    s = torch.rand((shape[0], shape[input_dim]) if len(shape) == 3 else (shape[input_dim],))
    s.view(-1)[:2] = torch.tensor([0.0, 1.0])
    relaxation = Relaxation({"w": ChannelFactors(s, input_dim)}, torch.device("cpu"))
    stored = inputs(shape, dtype, 2)
    change = relaxation.formula(TensorSpec("w", shape), None)
    assert change is not None

    def formula(x: Element) -> Number:
        return change(x, x.models[0] + x.base)

    for start, stop in regions(stored[0].numel()):
        loop, expected = run(formula, stored, start, stop)
        assert loop is not None
        assert torch.equal(bits(loop), bits(expected))
    region = Region(TensorSpec("w", shape), 0, stored[0].numel())
    base, merged = (one.float().flatten() for one in stored)
    loop, _ = run(lambda x: change(x, x.models[0] - 0.0), [base.view(shape), (base + merged).view(shape)], 0, len(base))
    delta = (base + merged) - base
    assert loop is not None
    assert torch.equal(bits(loop), bits(relaxation(region, base, delta)))


def test_loops_read_from_files_and_from_other_sources_alike(tmp_path: Path, monkeypatch):
    family = make_family(tmp_path, "llama")
    written = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(TensorRef, "place_in_file", lambda self: None)
        recipe = make_recipe("ties", str(family.base), ",".join(map(str, family.models)))
        merge(recipe, tmp_path / f"out{direct}", RunOptions(stream=StreamOptions(compiled=True)))
        written.append((tmp_path / f"out{direct}" / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_file_that_ends_early_is_left_to_whoever_can_say_so(tmp_path: Path):
    spec = TensorSpec("w", (100,))
    path = tmp_path / "short"
    path.write_bytes(bytes(150))
    source = InMemory({"w": torch.ones(100).bfloat16()})
    with path.open("rb") as file:
        source.place_in_file = lambda name: (file.fileno(), 0)  # type: ignore[attr-defined]
        trace = Trace([torch.bfloat16], has_base=False, is_delta=False)
        loop = TensorLoop(spec, [TensorRef(source, "w")], trace, [Store(trace.models[0], torch.bfloat16)])  # type: ignore[arg-type]
        out = torch.empty(100, dtype=torch.bfloat16)
        assert loop.run([Region(spec, 0, 75)], lend, [out[:75]]) is not None
        assert loop.run([Region(spec, 0, 100)], lend, [out]) is None


def test_one_loop_serves_tensors_that_differ_in_numbers():
    keys = set()
    for weight, threshold in ((0.5, 100), (0.7, 200)):
        trace = Trace([torch.bfloat16] * 2, has_base=True, is_delta=True)
        kept = Trim(threshold, 5).keeps(trace, trace.models[0])
        merged = where(kept, trace.models[0], 0.0) * trace.number(weight)
        keys.add(fused.loop_key(trace, [Store(merged, torch.bfloat16)]))  # type: ignore[arg-type]
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("odd", [False, True])
def test_thinned_task_vectors_are_summed_by_a_loop(name: str, normalize: bool, odd: bool):
    """Of tensors in memory, as torch sums them; what is not finite is left to torch."""
    method = make_method(name, 3, weights=[0.5, -0.3, 0.9], density=0.5, lambda_=0.7, normalize=normalize)
    base, *vectors = inputs((4_003,), torch.float32, odd=odd)
    loop = summing(method, (1.5, 1.0, 0.25), 3)  # type: ignore[arg-type]
    block = Block(Region(TensorSpec("w", (4_003,)), 0, 4_003), base, [], [])
    made = []
    for use in (False, True):
        use_compiled(use)
        try:
            made.append(loop(block, vectors))
        finally:
            use_compiled(False)
    whole = [one.masked_fill(one.isnan(), torch.nan) for one in made]
    assert torch.equal(bits(whole[0]), bits(whole[1]))
    assert bool(made[0].isfinite().all()) != odd


def test_without_llvm_torch_does_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    family = make_family(tmp_path, "llama")
    monkeypatch.setattr(TensorLoop, "run", lambda *arguments: pytest.fail("a loop ran"))
    recipe = make_recipe("linear", str(family.base), str(family.models[0]))
    merge(recipe, tmp_path / "out", RunOptions(stream=StreamOptions(compiled=True)))


def test_what_is_wanted_is_compiled_once_and_what_cannot_be_never_is():
    compiler = Compiler()
    assert compiler.get("broken", lambda: "this is not LLVM's language") is None
    trace = Trace([torch.float32], has_base=False, is_delta=False)
    text = write_loop(trace, [Store(trace.models[0], torch.float32)])  # type: ignore[arg-type]
    written: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        loops = list(pool.map(lambda _: compiler.get("right", lambda: written.append(text) or text), range(4)))
    assert len(written) == 1
    assert loops[0] is not None
    assert all(loop is loops[0] for loop in loops)
    assert compiler.get("broken", lambda: text) is None
