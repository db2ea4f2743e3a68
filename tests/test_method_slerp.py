"""`slerp`: from the base to a model on the arc between them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, check_parity, flipped, merge_models, patch_grid, random_inputs
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference

REFERENCES = {
    "slerp": Reference(more.slerp, slacks.of_sums("slerp", weights_too=True), {"t": 0.3}, {"t": 1.0}, in_weights=True),
}
merge = partial(merge_models, "slerp", block_elements=1)


def test_by_hand():
    # at right angles: sin(60) b + sin(30) x
    base, model = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(merge(model, base=base, t=1 / 3), torch.tensor([2 * math.sqrt(3) / 2, 4 / 2]))
    # 60 degrees apart, half the way: sin(30) / sin(60) of both
    model = torch.tensor([0.5, math.sqrt(3) / 2])
    base = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(merge(model, base=base, t=0.5), torch.tensor([math.sqrt(3) / 2, 0.5]))


def test_nearly_colinear_is_straight():
    base, model = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.03])  # cosine 0.99995
    torch.testing.assert_close(merge(model, base=base, t=0.25), torch.tensor([1.5, 0.0075]))
    torch.testing.assert_close(merge(-model, base=base, t=0.25), torch.tensor([0.0, -0.0075]))


def test_a_vector_of_zeros():
    # its cosine with anything is 0: a right angle
    torch.testing.assert_close(merge(torch.ones(2), base=torch.zeros(2), t=1 / 3), torch.full((2,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_base_and_model(dtype: torch.dtype):
    base, (model, *_) = random_inputs((9, 7), dtype=dtype)
    assert_same_bits(merge(model, base=base, t=0.0).to(dtype), base)
    assert_same_bits(merge(model, base=base, t=1.0).to(dtype), model)
    far = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_same_bits(merge(far, base=base, t=0.0).to(dtype), base)
    assert_same_bits(merge(far, base=base, t=1.0).to(dtype), far)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape, whole=True)
    merged = [check_parity("slerp", base, models[:1], block_elements=n, t=0.3) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


def test_parity_with_the_reference_and_its_teeth(monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, models = random_inputs((97, 61), 1, whole=True)
    for t in (0.2, 0.9, 1.3):
        check_parity("slerp", base, models, block_elements=1000, t=t)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("slerp", base, models, formula=flipped("slerp"))
