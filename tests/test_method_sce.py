"""`sce`: select by variance, weigh by size, erase what disagrees."""

from __future__ import annotations

from functools import partial

import pytest
import torch

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
)
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference

REFERENCES = {
    "sce": Reference(more.sce, slacks.of_sums("sce"), {"select_topk": 0.6}, unclear=slacks.close_election("sce")),
}

BASE = torch.tensor([10.0, 20.0, 30.0, 40.0])
D1 = torch.tensor([2.0, -1.0, 1.0, 0.0])
D2 = torch.tensor([2.0, 3.0, -3.0, 0.0])
merge = partial(merge_vectors, "sce", base=BASE, change=True, block_elements=3)


def test_by_hand():
    # mean squares 6/4 and 22/4: weights 6/28 and 22/28; sums 4, 2, -2, 0: signs + + - +
    # both: 2;  d_2 alone: 3;  d_2 alone: -3;  none: 0
    torch.testing.assert_close(merge(D1, D2), torch.tensor([2.0, 3.0, -3.0, 0.0]))
    # a third model agrees at the second: w = 6, 22, 4 over 32, sums 6, 4, -2: (22 * 3 + 4 * 2) / 26
    d3 = torch.tensor([0.0, 2.0, 0.0, 0.0])
    torch.testing.assert_close(merge(D1, D2, d3), torch.tensor([2.0, 74 / 26, -3.0, 0.0]))


def test_selection_by_hand():
    # variances 0, 4, 4, 0: of the two that are not 0, half is one, the one with the lower index
    torch.testing.assert_close(merge(D1, D2, select_topk=0.5), torch.tensor([0.0, 3.0, 0.0, 0.0]))
    assert torch.equal(merge(D1, D2, select_topk=0.4), torch.zeros(4))


def test_small_changes_weigh_alike():
    # mean squares add up to less than 1e-6: weights 1/2 each, (1 + 3) / 2 instead of (1 + 27) / 10
    base = torch.zeros(4)
    models = [torch.full((4,), 1e-4), torch.full((4,), 3e-4)]
    merged = InMemory(base, models).merge(make_method("sce", 2))
    torch.testing.assert_close(merged, torch.full((4,), 2e-4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("select_topk", [0.0, 0.4, 1.0])
def test_boundaries(shape: tuple[int, ...], select_topk: float):
    base, models = random_inputs(shape)
    merged = [check_parity("sce", base, models, block_elements=n, select_topk=select_topk) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, models = random_inputs((97, 61), 3, dtype)
    for select_topk in (0.1, 0.7, 1.0):
        check_parity("sce", base, models, block_elements=1000, select_topk=select_topk)


def test_parity_sees_a_wrong_formula():
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("sce", base, models, formula=flipped("sce"))
