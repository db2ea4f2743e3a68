"""`ties`: trim, elect signs, average what agrees; and the trimming itself, exact however it is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import ArgumentError
from merging.methods import trim
from merging.methods.trim import KEEP_ALL, KEEP_NONE, measure_trims
from streaming.blocks import BLOCK_ELEMENTS, Block, tile
from streaming.elements import Tensors
from tests.golden_files import assert_same_bits
from tests.in_memory import (
    SHAPES,
    InMemory,
    check_parity,
    flipped,
    make_method,
    merge_vectors,
    patch_grid,
    random_inputs,
    shifted,
)
from tests.reference import merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "ties": Reference(
        reference.ties,
        slacks.of_steps,
        slacks.UNEQUAL,
        {"density": 1.0},
        reference.election_is_close,
        slacks.rescale_rule(),
        misplaced=shifted_formula(reference.ties),
    ),
}

NAME = "ties"
BASE = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
D1 = torch.tensor([[4.0, -2.0, 1.0], [-6.0, 3.0, -1.0]])
D2 = torch.tensor([[-4.0, -5.0, 2.0], [3.0, 1.0, 2.0]])
merge = partial(merge_vectors, NAME, base=BASE)


def test_by_hand():
    # density 0.5 keeps 3 of 6, of d_1 the 6, 4 and 3: [[4, 0, 0], [-6, 3, 0]]
    #                        of d_2 the 5, 4 and 3: [[-4, -5, 0], [3, 0, 0]]
    # sums [[0, -5, 0], [-3, 3, 0]]; signs + - + - + +, the first because a sum of 0 counts as +
    # (0, 0) only d_1 is +: 4;  (0, 1) only d_2: -5;  (1, 0) only d_1 is -: -6;  (1, 1) only d_1: 3
    assert merge(D1, D2, density=0.5).tolist() == [[14.0, 15.0, 30.0], [34.0, 53.0, 60.0]]
    # weights 2 and 1 leave the signs alone but for (0, 0), where 8 - 4 is + too. A mean of one is that one: the same.
    assert merge(D1, D2, density=0.5, weights=[2, 1]).tolist() == [[14.0, 15.0, 30.0], [34.0, 53.0, 60.0]]
    # the sum instead: 2 * 4, -5, 2 * -6, 2 * 3;  and half of that
    assert merge(D1, D2, density=0.5, weights=[2, 1], normalize=False).tolist() == [
        [18.0, 15.0, 30.0],
        [28.0, 56.0, 60.0],
    ]
    assert merge(D1, D2, density=0.5, weights=[2, 1], normalize=False, lambda_=0.5).tolist() == [
        [14.0, 17.5, 30.0],
        [34.0, 53.0, 60.0],
    ]


def test_by_hand_where_models_agree():
    # nothing trimmed: sums [[0, -7, 3], [-3, 4, 1]], signs + - + - + +
    # d_1: 4;  both: -7 / 2;  both: 3 / 2;  d_1: -6;  both: 4 / 2;  d_2: 2
    assert merge(D1, D2, density=1).tolist() == [[14.0, 16.5, 31.5], [34.0, 52.0, 62.0]]
    # weights 1 and 3: sums [[-8, -17, 7], [3, 6, 5]], signs - - + + + +
    # d_2: -12 / 3;  both: -17 / 4;  both: 7 / 4;  d_2: 9 / 3;  both: 6 / 4;  d_2: 6 / 3
    assert merge(D1, D2, density=1, weights=[1, 3]).tolist() == [[6.0, 15.75, 31.75], [43.0, 51.5, 62.0]]


def test_by_hand_with_a_negative_weight():
    # D_2 = -d_2 = [[4, 5, -2], [-3, -1, -2]]; sums [[8, 3, -1], [-9, 2, -3]]: + + - - + -
    # both, over 1 - 1, which counts as 1: 8;  D_2: 5 / -1;  D_2: -2 / -1;  both: -9;  D_1: 3 / 1;  both: -3
    assert merge(D1, D2, density=1, weights=[1, -1]).tolist() == [[18.0, 15.0, 32.0], [31.0, 53.0, 57.0]]


def test_equal_magnitudes_lose_from_the_end():
    ones = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 2.0]])
    # int(0.5 * 6) = 3: the 2 and the first two of the five ones
    for block_elements in (1, 3, 6):
        assert merge(ones, density=0.5, block_elements=block_elements).tolist() == [
            [11.0, 19.0, 30.0],
            [40.0, 50.0, 62.0],
        ]


def test_densities_are_the_models_own():
    # d_1 whole, of d_2 int(0.2 * 6) = 1 element, the -5: sums [[4, -7, 1], [-6, 3, -1]]; the mean at (0, 1) is -7 / 2
    assert merge(D1, D2, density=[1, 0.2]).tolist() == [[14.0, 16.5, 31.0], [34.0, 53.0, 59.0]]
    # of d_2 nothing: a trimmed element does not count in the divisor
    assert merge(D1, D2, density=[1, 0]).tolist() == (BASE + D1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lambda_zero_and_density_zero_are_the_base(dtype: torch.dtype):
    base, models = random_inputs((40, 50), dtype=dtype)
    for arguments in ({"lambda_": 0.0, "density": 0.3}, {"density": 0.0}, {"density": 1 / 2001}):
        method = make_method(NAME, 3, weights=[0.3, -2, 1], **arguments)
        assert_same_bits(InMemory(base, models).merge(method, 70).to(dtype), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_whole_model_is_itself_whatever_its_weight(dtype: torch.dtype):
    base, (model,) = random_inputs((400, 50), 1, dtype)
    lost = model.float().abs() < 2**-15 * base.float().abs()
    for weight in (1.0, 0.25, -2.0):
        merged = InMemory(base, [model]).merge(make_method(NAME, 1, density=1.0, weights=[weight]), 70)
        assert_same_bits(merged.to(dtype), model, allow=lost)
    # copies of one model agree everywhere, and their mean is that model
    merged = InMemory(base, [model] * 2).merge(make_method(NAME, 2, density=1.0), 70)
    assert_same_bits(merged.to(dtype), model, allow=lost)


def test_a_weight_of_zero_leaves_a_model_out():
    base, models = random_inputs((31, 17))
    without = InMemory(base, models[::2]).merge(make_method(NAME, 2, weights=[0.6, 0.7]))
    assert_same_bits(InMemory(base, models).merge(make_method(NAME, 3, weights=[0.6, 0.0, 0.7])), without)


def test_order_of_models_changes_only_rounding():
    base, models = random_inputs((64, 33))
    weights, density = [0.2, 0.7, 1.3], [0.4, 0.6, 0.8]
    one = InMemory(base, models).merge(make_method(NAME, 3, weights=weights, density=density))
    reverse = make_method(NAME, 3, weights=weights[::-1], density=density[::-1])
    other = InMemory(base, models[::-1]).merge(reverse)
    close = reference.election_is_close(base, models, weights=weights, density=density)
    assert close.sum() <= 1
    torch.testing.assert_close(one[~close], other[~close], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 0.99, 1.0])
def test_boundaries(shape: tuple[int, ...], density: float):
    base, models = random_inputs(shape)
    arguments = {"weights": [0.3, 0.5, 0.9], "density": density}
    merged = [check_parity(NAME, base, models, block_elements=n, **arguments) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weights": [0.5, 0.3, 0.2], "density": [0.2, 0.5, 0.9], "lambda_": 1.5},
        {"weights": [1.0, -0.4, 0.7], "density": 0.4},
        {"weights": [0.5, 0.3, 0.2], "density": 0.7, "normalize": False, "lambda_": 0.6},
        {"weights": [0.5, 0.3, 0.2], "density": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(arguments: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)  # 12 blocks to be measured
    poor_sample(monkeypatch, sampled=64)
    base, models = random_inputs((97, 61), 3, dtype)
    check_parity(NAME, base, models, block_elements=1000, **arguments)


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(wrong):
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(NAME, base, models, weights=[0.5, 0.3, 0.2], density=0.5, formula=wrong(NAME))


def test_parity_sees_a_flipped_election_and_another_trim(monkeypatch: pytest.MonkeyPatch):
    base, models = random_inputs((97, 61))
    right_sign, right_trim = reference.elect_sign, reference.trim_mask
    wrong = {
        "elect_sign": lambda weighted: -right_sign(weighted),
        "trim_mask": lambda d, density: right_trim(d, density + 1 / d.numel()),
    }
    for function, broken in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(reference, function, broken)
            with pytest.raises(AssertionError, match="not the rounded reference"):
                check_parity(NAME, base, models)


def test_a_density_outside_its_range_is_refused():
    for density in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"density: expected a number in \[0, 1\]"):
            make_method(NAME, 2, density=[0.5, density])


# ------------------------------------------------------------------------------------------------------- trimming


def check_trim(vectors: Sequence[torch.Tensor], densities: Sequence[float], cut: int) -> InMemory:
    """Trim as the engine does, applied in pieces of `cut` elements: what a stable sort keeps. Returns what was read."""
    memory = InMemory(torch.zeros_like(vectors[0]), vectors)
    trims = measure_trims(memory.tensor, memory.scan, densities)
    assert len(trims) == len(vectors)
    for d, density, one in zip(vectors, densities, trims, strict=True):
        got = d.flatten().clone()
        for region in tile(memory.tensor, cut):
            values = got[region.start : region.stop]
            values.mul_(one.keeps(Tensors(Block(region, None, [values], [])), values))
        expected = torch.where(reference.trim_mask(d, density), d, 0.0).flatten()
        wrong = int((got != expected).sum())
        assert wrong == 0, f"density {density}: {wrong} of {d.numel()} elements are kept or dropped wrongly"
    for regions in memory.scans:
        assert all(region.numel <= trim.GRID_ELEMENTS for region in regions)
    return memory


def poor_sample(monkeypatch: pytest.MonkeyPatch, sampled: int, sigmas: float = 6.0) -> None:
    """Let the first guess at a threshold rest on less, where it rests on a sample: the result is exact anyway."""
    monkeypatch.setattr(trim, "PIECE_ELEMENTS", sampled)
    monkeypatch.setattr(trim, "MIN_PIECES", 2)
    monkeypatch.setattr(trim, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(trim, "SIGMAS", sigmas)


def full_readings(memory: InMemory) -> int:
    """How often the tensor was read from end to end."""
    return sum(sum(region.numel for region in regions) == memory.tensor.numel for regions in memory.scans)


KINDS = ("normal", "coarse", "all zero", "all equal", "mostly zero", "quiet first rows", "loud first rows", "sorted")


def make_vector(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """A task vector; `coarse` has few magnitudes, as differences of bf16 weights do; `sorted` grows towards the end."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(shape, generator=generator)
    flat = d.view(-1)
    if kind == "coarse":
        d = (d * 2).round() / 4
    elif kind == "all zero":
        d = torch.zeros(shape)
    elif kind == "all equal":
        d = d.sign() * 0.375
    elif kind == "mostly zero":
        d[torch.rand(shape, generator=generator) < 0.8] = 0
    elif kind in ("quiet first rows", "loud first rows"):
        flat[: len(flat) // 3] *= 1e-3 if kind.startswith("quiet") else 1e3
    elif kind == "sorted":
        d = flat.abs().sort().values.view(shape)
    return d


@settings(max_examples=200)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 400)),
        st.tuples(st.integers(1, 20), st.integers(1, 40)),
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12)),
    ),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    densities=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=3, max_size=3),
    grid=st.integers(1, 120),
    sampled=st.integers(1, 40),
    sigmas=st.sampled_from([0.0, 0.5, 6.0]),
    cut=st.integers(1, 500),
    seed=st.integers(0, 1 << 30),
)
def test_trim_is_exact_however_it_is_streamed(shape, kinds, densities, grid, sampled, sigmas, cut, seed):
    """Many small blocks, poor samples, ties everywhere: always the int(density n) largest, of equal ones the first."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_grid(monkeypatch, grid)
        poor_sample(monkeypatch, sampled, sigmas)
        vectors = [make_vector(shape, kind, seed + position) for position, kind in enumerate(kinds)]
        check_trim(vectors, densities[: len(vectors)], cut)


@pytest.mark.parametrize("kind", KINDS)
def test_trim_of_several_blocks(kind: str):
    """The constants as they are: three blocks and a bit, every density at once."""
    densities = [0.0, 1e-7, 1e-3, 0.1, 0.5, 0.9, 0.9999, 1.0]
    d = make_vector((99, 4096), kind, 0)
    check_trim([d] * len(densities), densities, 4096 * 10)


@pytest.mark.parametrize("shape", [(3 * BLOCK_ELEMENTS + 5,), (1, 2 * BLOCK_ELEMENTS + 77), (3, 60, 1000), (300, 1001)])
def test_trim_of_several_blocks_of_any_shape(shape: tuple[int, ...]):
    check_trim([make_vector(shape, "coarse", 1), make_vector(shape, "normal", 2)], [0.2, 0.6], 12345)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("loudness", [1e-3, 1e3])
def test_trim_is_exact_where_a_sample_misleads(density: float, loudness: float):
    """Rows that are quiet, or loud: the first of each block, all later ones of each block, the first third."""
    noise = torch.randn(96, 4096, generator=torch.Generator().manual_seed(0))
    for rows in (slice(0, None, 32), slice(1, None, 2), slice(0, 32), slice(95, 96)):
        d = noise.clone()
        d[rows] *= loudness
        assert full_readings(check_trim([d], [density], BLOCK_ELEMENTS)) <= 2
        check_trim([(d * 4).round() / 4], [density], BLOCK_ELEMENTS)


def test_the_comparison_sees_another_choice_among_equals(monkeypatch: pytest.MonkeyPatch):
    d, right = make_vector((300,), "all equal", 0), reference.trim_mask
    check_trim([d], [0.5], 70)
    monkeypatch.setattr(reference, "trim_mask", lambda d, density: right(d.flip(0), density).flip(0))
    with pytest.raises(AssertionError, match="300 of 300 elements are kept or dropped wrongly"):
        check_trim([d], [0.5], 70)


def test_trim_reads_nothing_where_nothing_is_to_be_found():
    memory = InMemory(torch.zeros(3, 4), [torch.ones(3, 4)] * 3)
    assert measure_trims(memory.tensor, memory.scan, [0.0, 1.0, 0.05]) == (KEEP_NONE, KEEP_ALL, KEEP_NONE)
    assert memory.scans == []


def test_trim_sees_the_smallest_and_the_largest_numbers():
    tiny, huge = 2.0**-149, 3.4e38
    d = torch.tensor([tiny, -huge, 0.0, -2 * tiny, huge, -0.0, 1.0, -tiny])
    for density in (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8):
        check_trim([d], [density], 3)
