"""`karcher`: the mean on the sphere, from scalar products alone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from merging.methods.karcher import karcher_factors
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, check_parity, flipped, merge_models, patch_grid, random_inputs
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference

REFERENCES = {
    "karcher": Reference(more.karcher, slacks.of_sums("karcher", weights_too=True), {"max_iter": 7}, in_weights=True),
}
merge = partial(merge_models, "karcher", block_elements=1)


def test_by_hand():
    # two directions at right angles: the mean is at 45 degrees; lengths 3 and 5, 4 on average
    half = 4 * math.sqrt(0.5)
    torch.testing.assert_close(merge(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])), torch.full((2,), half))
    # on a circle angles have a mean: 0, 0 and 90 degrees give 30, where the mean of the vectors is at 26.6
    merged = merge(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(merged, torch.tensor([math.sqrt(3) / 2, 0.5]), rtol=0, atol=1e-6)
    start = merge(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), max_iter=0)
    torch.testing.assert_close(start, torch.tensor([2.0, 1.0]) / math.sqrt(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_model_is_itself_and_so_are_copies(dtype: torch.dtype):
    model = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (1, 2, 3):
        torch.testing.assert_close(merge(*[model] * count), model.float(), rtol=1e-6, atol=0)


def test_zeros_have_no_direction_and_count_in_the_length():
    model = torch.tensor([0.0, 6.0])
    torch.testing.assert_close(merge(model, torch.zeros(2), torch.zeros(2)), torch.tensor([0.0, 2.0]))
    assert torch.equal(merge(torch.zeros(2), torch.zeros(2)), torch.zeros(2))


def test_opposite_models_do_not_pull():
    model = torch.tensor([0.0, 6.0])
    torch.testing.assert_close(merge(model, -model), model)


def test_factors_follow_the_order_of_the_models():
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = [2, 0, 3, 1]
    factors = karcher_factors(x @ x.T, 10, 1e-5)
    torch.testing.assert_close(karcher_factors(x[order] @ x[order].T, 10, 1e-5), factors[order])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape)
    merged = [check_parity("karcher", base, models, block_elements=n) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


def test_parity_with_the_reference_and_its_teeth(monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, models = random_inputs((47, 31), 4, whole=True)
    for kind in ({}, {"max_iter": 1}, {"tol": 1e-2}):
        check_parity("karcher", base, models, block_elements=1000, **kind)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("karcher", base, models, formula=flipped("karcher"))
