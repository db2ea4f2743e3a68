"""`ram` and `ramplus_tl`: the mean over the models that changed an element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, patch_grid, random_inputs
from tests.reference import of_method
from tests.reference.of_method import Reference, by_steps


def ram(base: Tensor, models: list[Tensor], *, epsilon: float = 1e-5, **unused: object) -> Tensor:
    """The mean of the changes larger than epsilon, of the models that have one."""
    return ramplus_tl(base, models, epsilon=epsilon, r=0.0)


def ramplus_tl(
    base: Tensor, models: list[Tensor], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2, **unused: object
) -> Tensor:
    """The same, with what only one model changed times 1 + r * (shared / own changes of the model, 0 to alpha)."""
    epsilon = float(torch.tensor(epsilon, dtype=torch.float32))
    deltas = [(model.float() - base.float()).double() for model in models]
    changed = [delta.abs() > epsilon for delta in deltas]
    number = torch.stack(changed).sum(dim=0)
    total = torch.zeros_like(base, dtype=torch.float64)
    for delta, mine in zip(deltas, changed, strict=True):
        shared, own = int((mine & (number > 1)).sum()), int((mine & (number == 1)).sum())
        factor = 1 + r * min(max(shared / max(own, 1), 0), alpha)
        total += torch.where(mine, delta, 0.0) * torch.where(number == 1, factor, 1.0)
    return base.double() + total / number.clamp(min=1)


# RAM knows no order. RAM+ knows one only by its counts, so that shifting the models changes nothing either.
REFERENCES = {
    "ram": Reference(ram, by_steps(8), {"epsilon": 0.005}, {"epsilon": 0.0}),
    "ramplus_tl": Reference(
        ramplus_tl, by_steps(12, 2.0), {"epsilon": 0.005, "r": 0.5, "alpha": 0.9}, {"epsilon": 0.0}
    ),
}


def test_by_hand():
    # both changed the first element: their mean; the first model alone the third, the second alone the fourth
    models = [torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0, 4.0])]
    base = torch.tensor([10.0, 20.0, 30.0, 40.0])
    for name, expected in (("ram", [2, 0, 2, 4]), ("ramplus_tl", [2, 0, 2.04, 4.08])):
        for block_elements in (1, 3, 4):
            method = make_method(name, 2)
            merged = InMemory(base, [base + model for model in models]).merge(method, block_elements)
            torch.testing.assert_close(merged, base + torch.tensor(expected))


def test_changes_up_to_epsilon_are_none():
    models = [torch.tensor([0.5, 0.25]), torch.tensor([0.75, 0.5])]
    merged = InMemory(torch.zeros(2), models).merge(make_method("ram", 2, epsilon=0.5))
    assert merged.tolist() == [0.75, 0.0]


def test_r_0_is_ram():
    base, models = random_inputs((9, 5))
    plain = InMemory(base, models).merge(make_method("ram", 3))
    assert_same_bits(InMemory(base, models).merge(make_method("ramplus_tl", 3, r=0.0)), plain)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape)
    merged = [check_parity(name, base, models, block_elements=n, epsilon=0.01) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("name", REFERENCES)
def test_parity_has_teeth(name: str):
    base, models = random_inputs((47, 31))
    for formula in (flipped(name), of_method.find({"ram": "ramplus_tl", "ramplus_tl": "ram"}[name]).formula):
        with pytest.raises(AssertionError, match="not the rounded reference"):
            check_parity(name, base, models, formula=formula)
