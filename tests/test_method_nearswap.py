"""`nearswap`: the model's weights where they are near to the base's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, random_inputs
from tests.reference.of_method import Reference, by_steps


def nearswap(base: Tensor, models: list[Tensor], *, t: float, **unused: object) -> Tensor:
    """w x + (1 - w) a, where w = t / max(|a - x|, 1e-6), cut to [0, 1]."""
    a, x = base.float().double(), models[0].float().double()
    w = (t / (a - x).abs().clamp(min=1e-6)).clamp(0, 1)
    return w * x + (1 - w) * a


REFERENCES = {"nearswap": Reference(nearswap, by_steps(8), arguments={"t": 0.01}, single={"t": 1e9})}


def test_by_hand():
    # distances 0.5, 0.001 and 0: a step of 0.01 towards the model, the model, both
    base, model = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 1.001, 2.0])
    for block_elements in (1, 2, 3):
        merged = InMemory(base, [model]).merge(make_method("nearswap", 1, t=0.01), block_elements)
        torch.testing.assert_close(merged, torch.tensor([0.01, 1.001, 2.0]))


def test_t_0_is_the_base():
    base, models = random_inputs((9, 5), 1)
    assert_same_bits(InMemory(base, models).merge(make_method("nearswap", 1, t=0.0)), base)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...]):
    base, models = random_inputs(shape, 1)
    merged = [check_parity("nearswap", base, models, block_elements=n, t=0.01) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


def test_parity_has_teeth():
    base, models = random_inputs((47, 31), 1)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("nearswap", base, models, t=0.01, formula=flipped("nearswap"))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("nearswap", base, models, t=0.01, formula=lambda *a, t, **more: nearswap(*a, t=2 * t))
