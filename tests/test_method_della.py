"""`della`, `della_linear`: small changes of a row are dropped more often."""

from __future__ import annotations

import pytest
import torch

from checkpoints.errors import ArgumentError
from merging.methods import della
from merging.methods.della import probabilities, row_ranks
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, patch_grid, random_inputs, shifted
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "della": Reference(
        more.della,
        slacks.of_sums("della"),
        slacks.UNEQUAL | {"epsilon": [0.1, 0.2, 0.05]},
        {"density": 1.0},
        slacks.close_election("della"),
        slacks.rescale_rule("l1"),
        misplaced=shifted_formula(more.della),
    ),
    "della_linear": Reference(
        more.della_linear,
        slacks.of_sums("della_linear"),
        slacks.UNEQUAL | {"epsilon": [0.1, 0.2, 0.05], "rescale": False},
        {"density": 1.0},
        None,
        slacks.rescale_rule("l1"),
        misplaced=shifted_formula(more.della_linear),
    ),
}

UNEQUAL = {"weights": [0.5, 0.3, 0.9], "density": [0.5, 0.3, 0.7], "epsilon": [0.1, 0.2, 0.25]}
NAMES = ["della", "della_linear"]


def test_ranks_and_probabilities_by_hand():
    rows = torch.tensor([[5.0, 1.0, 3.0, 3.0, 0.0]])
    ranks = row_ranks(rows, rows.sort(dim=-1).values)
    assert ranks.tolist() == [[8, 2, 5, 5, 0]]
    torch.testing.assert_close(
        probabilities(ranks.view(-1).double() / 2, 5, 0.5, 0.1), torch.tensor([0.6, 0.45, 0.525, 0.525, 0.4]).double()
    )
    assert probabilities(torch.zeros(3).double(), 1, 0.7, 0.2).tolist() == pytest.approx([0.7] * 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """A grid of 8 elements, so that there are rows longer than a block."""
    patch_grid(monkeypatch, 8)
    base, models = random_inputs(shape)
    merged = [check_parity(name, base, models, block_elements=n, **UNEQUAL) for n in (1, 20, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [50, 500])
def test_parity_with_the_reference(name: str, grid: int, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, grid)
    base, models = random_inputs((57, 61), 3, torch.bfloat16)
    for kind in ({}, {"rescale": False, "lambda_": 0.7}, {"normalize": False}):
        check_parity(name, base, models, block_elements=1000, **UNEQUAL, **kind)


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(wrong):
    base, models = random_inputs((57, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("della_linear", base, models, formula=wrong("della_linear"), **UNEQUAL)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_ranked_once(name: str, monkeypatch: pytest.MonkeyPatch):
    """What is kept is noted where norms are measured; without them nothing is measured. Long rows are ranked each time."""
    base, models = random_inputs((57, 61), 3)
    ranked = []
    plain = della.drop_by_rank_
    monkeypatch.setattr(della, "drop_by_rank_", lambda *given: ranked.append(given[-1]) or plain(*given))
    for rescale in (None, False):
        ranked.clear()
        InMemory(base, models).merge(make_method(name, 3, **UNEQUAL, rescale=rescale), block_elements=1000)
        assert len(ranked) == 3


def test_large_changes_are_kept_more_often_and_the_l1_norm_stays():
    base = torch.zeros(400, 100)
    model = torch.arange(1.0, 101.0).repeat(400, 1)
    merged = InMemory(base, [model]).merge(make_method("della_linear", 1, density=0.5, epsilon=0.4))
    kept = (merged != 0).double().mean(dim=0)
    # columns 0 to 9 are kept with probability 0.1 to 0.17, the last ten with 0.83 to 0.9
    assert kept[:10].mean() == pytest.approx(0.136, abs=0.02)
    assert kept[-10:].mean() == pytest.approx(0.864, abs=0.02)
    assert kept.mean() == pytest.approx(0.5, abs=0.01)
    assert float(merged.abs().sum()) == pytest.approx(float(model.abs().sum()), rel=1e-5)


def test_density_0_and_1():
    base, models = random_inputs((9, 5))
    assert_same_bits(InMemory(base, models).merge(make_method("della", 3, density=0.0)), base)
    alone = InMemory(base, models[:1]).merge(make_method("della", 1, density=1.0))
    torch.testing.assert_close(alone, models[0], rtol=1e-6, atol=0)


def test_another_seed_is_another_draw():
    base, models = random_inputs((30, 20))
    one, other = (InMemory(base, models).merge(make_method("della", 3, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.1), (0.05, 0.06), (0.5, 0.5)])
def test_probabilities_outside_of_0_to_1_are_refused(density: float, epsilon: float):
    with pytest.raises(ArgumentError, match="epsilon: expected density - epsilon above 0"):
        make_method("della", 2, density=[0.5, density], epsilon=[0.1, epsilon])
