"""`breadcrumbs`, `breadcrumbs_ties`: the middle of each task vector; and the l1 rule of `rescale`, which all sparse methods share."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, check_parity, flipped, merge_vectors, patch_grid, random_inputs, shifted
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "breadcrumbs": Reference(
        more.breadcrumbs,
        slacks.of_sums("breadcrumbs"),
        slacks.UNEQUAL | {"gamma": [0.1, 0.05, 0.2], "normalize": True},
        {"density": 1.0},
        None,
        slacks.rescale_rule(),
        misplaced=shifted_formula(more.breadcrumbs),
    ),
    "breadcrumbs_ties": Reference(
        more.breadcrumbs_ties,
        slacks.of_sums("breadcrumbs_ties"),
        slacks.UNEQUAL | {"gamma": [0.1, 0.05, 0.2], "rescale": True},
        {"density": 1.0},
        slacks.close_election("breadcrumbs_ties"),
        slacks.rescale_rule(),
        misplaced=shifted_formula(more.breadcrumbs_ties),
    ),
}

BASE = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])
D1 = torch.tensor([[8.0, -7.0, 6.0, -5.0], [4.0, -3.0, 2.0, -1.0]])
D2 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
UNEQUAL = {"weights": [0.5, 0.3, 0.9], "density": [0.5, 0.3, 0.7], "gamma": [0.1, 0.25, 0.4]}
merge = partial(merge_vectors, base=BASE, change=True, block_elements=3)


def test_by_hand():
    # n = 8: int(0.5 * 8) = 4 are kept after the int(0.25 * 8) = 2 largest, of d_1 the 6, 5, 4 and 3
    assert merge("breadcrumbs", D1, density=0.5, gamma=0.25).tolist() == [[0, 0, 6, -5], [4, -3, 0, 0]]
    # of d_2 the 6, 5, 4 and 3; weights 2 and 1, half of the sum
    both = merge("breadcrumbs", D1, D2, density=0.5, gamma=0.25, weights=[2, 1], lambda_=0.5).tolist()
    assert both == [[0, 0, (12 + 3) / 2, (-10 + 4) / 2], [(8 + 5) / 2, (-6 + 6) / 2, 0, 0]]
    # signs + + + - + +, where -6 + 6 is 0 and counts as +: -5 against 4 elects -, -3 against 6 elects +
    elected = merge("breadcrumbs_ties", D1, D2, density=0.5, gamma=0.25).tolist()
    assert elected == [[0, 0, 9, -5], [9, 6, 0, 0]]
    assert merge("breadcrumbs_ties", D1, D2, density=0.5, gamma=0.25, normalize=True).tolist() == [
        [0, 0, 4.5, -5],
        [4.5, 6, 0, 0],
    ]


def test_the_top_is_cut_only_as_far_as_density_allows():
    # int(0.75 * 8) = 6 kept, so of the 4 that gamma asks for only 2 go
    assert merge("breadcrumbs", D1, density=0.75, gamma=0.5).tolist() == [[0, 0, 6, -5], [4, -3, 2, -1]]


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_nothing_at_the_top_is_no_reason_to_lose_everything(gamma: float):
    # int(0.1 * 8) = 0: where mergekit drops the whole task vector
    assert merge("breadcrumbs", D1, density=0.5, gamma=gamma).tolist() == [[8, -7, 6, -5], [0, 0, 0, 0]]


def test_density_1_keeps_everything():
    assert merge("breadcrumbs", D1, density=1.0, gamma=0.5).tolist() == D1.tolist()
    assert merge("breadcrumbs", D1, density=0.0, gamma=0.5).tolist() == torch.zeros(2, 4).tolist()


def test_of_equal_magnitudes_the_lower_index_is_the_larger():
    ones = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
    assert merge("breadcrumbs", ones, density=0.25, gamma=0.25).tolist() == [[0, 0, 1, -1], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescale_restores_the_l1_norm(name: str):
    # |d_1| sums to 36; ties keeps 8 + 7 + 6 + 5 = 26 of it, breadcrumbs 6 + 5 + 4 + 3 = 18
    gamma = {} if name == "ties" else {"gamma": 0.25}
    plain = merge(name, D1, density=0.5, **gamma)
    rescaled = merge(name, D1, density=0.5, rescale=True, **gamma)
    torch.testing.assert_close(rescaled, plain * 36 / (26 if name == "ties" else 18))
    assert merge(name, D1, density=0.5, rescale=False, **gamma).tolist() == plain.tolist()
    assert merge(name, D1, density=1.0, rescale=True, **gamma).tolist() == D1.tolist()


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(name: str, shape: tuple[int, ...]):
    base, models = random_inputs(shape)
    merged = [check_parity(name, base, models, block_elements=n, **UNEQUAL) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, models = random_inputs((97, 61), 3, dtype)
    check_parity(name, base, models, block_elements=1000, **UNEQUAL)
    check_parity(name, base, models, block_elements=1000, **UNEQUAL, rescale=True, normalize=True, lambda_=0.6)


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(wrong):
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("breadcrumbs", base, models, formula=wrong("breadcrumbs"), **UNEQUAL)
