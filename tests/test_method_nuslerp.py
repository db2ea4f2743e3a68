"""`nuslerp`: between two task vectors, or two models, on the arc; whole, by row or by column."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from merging.methods import get_method
from merging.methods.nuslerp import NuSlerpOfWeights
from tests.golden_files import assert_same_bits
from tests.in_memory import (
    SHAPES,
    InMemory,
    assert_rounds_to,
    check_parity,
    flipped,
    make_method,
    patch_grid,
    random_inputs,
    shifted,
)
from tests.reference import more_merging as more
from tests.reference import more_merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "nuslerp": Reference(
        more.nuslerp,
        slacks.of_sums("nuslerp"),
        {"weights": [0.7, 0.4], "flatten": False},
        None,
        misplaced=shifted_formula(more.nuslerp),
    ),
}

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
KINDS = [{}, {"flatten": False}, {"flatten": False, "row_wise": True}]


def of_weights(**arguments: object) -> NuSlerpOfWeights:
    """The method of a recipe without a base."""
    method = make_method("nuslerp", 2, **arguments)
    return NuSlerpOfWeights(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


def test_by_hand():
    d1, d2 = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    # at right angles, t = 1 / (2 + 1): sin(60) d_1 + sin(30) d_2
    merged = InMemory(BASE, [BASE + d1, BASE + d2]).merge(make_method("nuslerp", 2, weights=[2, 1]), 1)
    torch.testing.assert_close(merged - BASE, d1 * math.sqrt(3) / 2 + d2 / 2)
    merged = InMemory(BASE, [d1, d2]).merge(of_weights(weights=[2, 1]), 1)
    torch.testing.assert_close(merged, d1 * math.sqrt(3) / 2 + d2 / 2)


def test_rows_and_columns_by_hand():
    # rows: (1, 0) and (0, 1) at right angles, half the way sin(45) of both; (2, 0) and (4, 0) colinear, the middle
    d1, d2 = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    half = math.sqrt(0.5)
    for first, second, row_wise in ((d1, d2, False), (d1.T, d2.T, True)):
        method = make_method("nuslerp", 2, flatten=False, row_wise=row_wise)
        merged = InMemory(torch.zeros(2, 2), [first, second]).merge(method, 1)
        expected = torch.tensor([[half, half], [3.0, 0.0]])
        torch.testing.assert_close(merged, expected.T if row_wise else expected)


def test_weights_that_cancel_are_half_and_half():
    base, models = random_inputs((9, 5), 2)
    cancelled = InMemory(base, models).merge(make_method("nuslerp", 2, weights=[1.0, -1.0]))
    assert_same_bits(cancelled, InMemory(base, models).merge(make_method("nuslerp", 2)))


def test_opposite_task_vectors_stay_finite():
    base, (model, _) = random_inputs((9, 5), 2)
    merged = InMemory(base, [model, base - (model - base)]).merge(make_method("nuslerp", 2, weights=[1.0, 2.0]))
    torch.testing.assert_close(merged, base - (model - base) / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(kind: dict, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape, 2)
    merged = [check_parity("nuslerp", base, models, block_elements=n, weights=[1, 3], **kind) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])
    if merged[0].numel():
        ours = InMemory(base, models).merge(of_weights(weights=[1, 3], **kind), 7)
        expected = reference.nuslerp(None, models, weights=[1, 3], **kind)
        slack = 64 * 2.0**-24 * sum(model.double().abs() for model in models)
        assert_rounds_to(ours, expected, slack)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_has_teeth(kind: dict, wrong, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 500)
    base, models = random_inputs((47, 31), 2)
    check_parity("nuslerp", base, models, block_elements=1000, weights=[1, 3], **kind)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("nuslerp", base, models, weights=[1, 3], formula=wrong("nuslerp"), **kind)


def test_a_recipe_without_a_base_works_on_weights():
    assert get_method("nuslerp").without_base() is NuSlerpOfWeights
