"""The random masks: bit for bit those of tests/reference/random_mask.py, in any pieces, and random enough."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.randomness import drop, keys
from streaming import elements
from streaming.blocks import Block, Region, TensorSpec
from streaming.elements import Tensors, hash_range
from tests.reference import random_mask

NAME = "model.layers.0.mlp.down_proj.weight"
CPU = torch.device("cpu")
STARTS = [
    0, 1, 77, (1 << 16) - 1, (1 << 17) + 3, (1 << 31) - 1000, (1 << 31) - 999, (1 << 31) - 1, 1 << 31, (1 << 31) + 1,
    3 << 30, (1 << 32) - 1000, (1 << 32) - 999, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 32) + (1 << 31) - 500,
    (2 << 32) - 5, 5 << 32, (1 << 40) - 123,
]  # fmt: skip
DENSITIES = [0.0, 2.0**-33, 2.0**-32, 1e-3, 0.3, 0.5, 0.999, 1 - 2.0**-32, 1 - 2.0**-34, 1.0]


def drawn(start: int, count: int, density: float, seed: int = 0, tensor: str = NAME, model: int = 0) -> torch.Tensor:
    """The mask that `drop` applies to the elements from `start` on: bool, True where one is kept."""
    values = dropped(torch.ones(count), density, start, seed, tensor, model)
    assert ((values == 0) | (values == 1)).all()
    return values.bool()


def dropped(
    values: torch.Tensor, density: float, start: int = 0, seed: int = 0, tensor: str = NAME, model: int = 0
) -> torch.Tensor:
    """`drop` of the elements from `start` on of a tensor that is large enough."""
    region = Region(TensorSpec(tensor, (1 << 42,)), start, start + len(values))
    return drop(Tensors(Block(region, None, [values], [])), values, density, seed=seed, tensor=tensor, model=model)


@pytest.mark.parametrize("start", STARTS)
def test_masks_are_the_references_bit_for_bit(start: int):
    """Around where an int32 turns negative, and where the index needs more than 32 bits."""
    for density in DENSITIES:
        expected = random_mask.keep_mask(3, NAME, 2, (1000,), density, start)
        assert torch.equal(drawn(start, 1000, density, 3, NAME, 2), expected), density


@pytest.mark.parametrize("start", STARTS)
def test_hashes_are_the_references_bit_for_bit(start: int):
    """All 32 bits of them, less 2^31."""
    count = min(1000, (1 << 32) - start % (1 << 32))
    key = keys(5, "ä\n", 1, start >> 32)
    assert [word % (1 << 32) for word in key] == list(random_mask.keys(5, "ä\n", 1, start >> 32))
    hashed = hash_range(start, start + count, lambda high: key, CPU)
    assert hashed.dtype == torch.int32
    expected = random_mask.random_words(5, "ä\n", 1, count, start).astype("int64") - (1 << 31)
    assert hashed.tolist() == expected.tolist()


@settings(max_examples=100)
@given(
    start=st.one_of(st.integers(0, 1 << 41), st.sampled_from(STARTS)),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    density=st.one_of(st.floats(0, 1), st.sampled_from(DENSITIES)),
    seed=st.integers(-(1 << 70), 1 << 70),
    tensor=st.text(max_size=8),
    model=st.integers(0, 20),
)
def test_masks_do_not_depend_on_how_a_tensor_is_cut(start, cuts, density, seed, tensor, model):
    expected = random_mask.keep_mask(seed, tensor, model, (300,), density, start)
    edges = sorted({0, 300, *cuts})
    pieces = [drawn(start + a, b - a, density, seed, tensor, model) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("density", [*DENSITIES[1:-1], 1 / 3, 0.7])
def test_the_threshold_is_exact_to_the_last_of_32_bits(density: float, monkeypatch: pytest.MonkeyPatch):
    """No mask of a tensor that fits into memory shows it: hashes right at the threshold, in place of drawn ones."""
    threshold = round(density * (1 << 32))
    words = [word for word in (0, threshold - 1, threshold, threshold + 1, (1 << 32) - 1) if 0 <= word < 1 << 32]
    hashed = torch.tensor([word - (1 << 31) for word in words], dtype=torch.int32)
    monkeypatch.setattr(elements, "hash_range", lambda *arguments: hashed)
    assert drawn(0, len(words), density).tolist() == [word < threshold for word in words]


def test_what_is_kept_keeps_its_bits():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = drawn(0, 1000, 0.5)
    assert torch.equal(dropped(values, 0.5), torch.where(kept, values, 0.0))


def test_ends():
    assert drawn(0, 100_000, 1.0).all()
    assert not drawn(0, 100_000, 0.0).any()
    assert dropped(torch.ones(0), 0.5).shape == (0,)


@pytest.mark.parametrize("start", [0, (1 << 31) - 500_000, (1 << 32) - 500_000])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_the_kept_share_is_the_density(start: int, density: float):
    n = 1_000_000
    assert abs(int(drawn(start, n, density).sum()) - n * density) < 5 * math.sqrt(n * density * (1 - density))


def test_models_tensors_seeds_and_upper_halves_of_the_index_are_independent():
    n, density = 200_000, 0.3
    others = [{"model": 1}, {"model": 2}, {"tensor": NAME[:-1]}, {"seed": 1}, {"seed": -1}, {"seed": 1 << 32}]
    masks = [drawn(0, n, density), drawn(1 << 32, n, density), *(drawn(0, n, density, **other) for other in others)]
    centred = torch.stack([mask.double() - density for mask in masks]) / math.sqrt(density * (1 - density))
    correlations = (centred @ centred.T / math.sqrt(n)).fill_diagonal_(0)
    assert correlations.abs().max() < 5, "in standard deviations"
    # and of one mask with itself, some elements further on
    for lag in (1, 2, 3, 64, 4096, 5120, 14336):
        assert abs(float(centred[0, :-lag] @ centred[0, lag:])) / math.sqrt(n) < 5, lag


def test_a_higher_density_keeps_what_a_lower_one_keeps():
    nested = [drawn(0, 10_000, density) for density in (0.1, 0.4, 0.8)]
    assert (nested[1] | ~nested[0]).all()
    assert (nested[2] | ~nested[1]).all()


def test_no_global_generator_is_used():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = drawn(0, 1000, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(drawn(0, 1000, 0.5), one)


def test_the_comparison_sees_one_changed_constant(monkeypatch: pytest.MonkeyPatch):
    for name in ("SPREAD", "FIRST", "SECOND"):
        with monkeypatch.context() as patch:
            patch.setattr(random_mask, name, getattr(random_mask, name) ^ 4)
            with pytest.raises(AssertionError):
                test_masks_are_the_references_bit_for_bit(0)
