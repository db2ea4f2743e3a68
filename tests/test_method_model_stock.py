"""`model_stock`: towards the mean of the models, as far as the angle between them says."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from checkpoints.errors import InputError
from merging import make_recipe
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, check_parity, flipped, merge_vectors, patch_grid, random_inputs
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference

REFERENCES = {
    "model_stock": Reference(more.model_stock, slacks.of_sums("model_stock"), {"filter_wise": True}, None),
}

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
merge = partial(merge_vectors, "model_stock", base=BASE, change=True, block_elements=1)


def test_by_hand():
    # 60 degrees apart: c = 1/2, t = 2 * 0.5 / 1.5 = 2/3 of the mean
    d1, d2 = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, math.sqrt(3)], [0.0, 0.0]])
    torch.testing.assert_close(merge(d1, d2), (d1 + d2) / 3)
    # equal: all the way; at right angles: none of it
    torch.testing.assert_close(merge(d1, d1), d1)
    assert torch.equal(merge(d1, d1.flip(1)), torch.zeros(2, 2))


def test_rows_by_hand():
    d1, d2 = torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(merge(d1, d2, filter_wise=True), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_task_vectors_that_cancel_leave_the_base():
    d = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert torch.equal(merge(d, -d), torch.zeros(2, 2))
    assert torch.equal(merge(torch.zeros(2, 2), torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(filter_wise: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape)
    merged = [
        check_parity("model_stock", base, models, block_elements=n, filter_wise=filter_wise) for n in (1, 7, 1 << 17)
    ]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_parity_with_the_reference_and_its_teeth(filter_wise: bool, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, (model, *others) = random_inputs((47, 31), 3)
    models = [model, *((model + other) / 2 for other in others)]
    check_parity("model_stock", base, models, block_elements=1000, filter_wise=filter_wise)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("model_stock", base, models, formula=flipped("model_stock"), filter_wise=filter_wise)


def test_one_model_is_too_few():
    with pytest.raises(InputError, match="model_stock merges at least 2 models besides the base, got 1"):
        make_recipe("model_stock", "base", "one")
