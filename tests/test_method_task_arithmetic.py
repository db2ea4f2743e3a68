"""`task_arithmetic`: the base plus the weighted task vectors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from checkpoints.errors import ArgumentError
from tests.golden_files import assert_same_bits, ulp_distance
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, merge_vectors, random_inputs, shifted
from tests.reference import merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "task_arithmetic": Reference(
        reference.task_arithmetic,
        slacks.of_steps,
        {"weights": slacks.UNEQUAL["weights"], "lambda_": 0.8},
        misplaced=shifted_formula(reference.task_arithmetic),
    ),
}

NAME = "task_arithmetic"
BASE = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
D1 = torch.tensor([[2.0, -1.0, 0.5], [0.0, -4.0, 1.0]])
D2 = torch.tensor([[-1.0, -3.0, 0.5], [1.0, 4.0, 0.0]])
merge = partial(merge_vectors, NAME, D1, D2, base=BASE)


def test_by_hand():
    # d_1 + 3 d_2 = [[2 - 3, -1 - 9, 0.5 + 1.5], [0 + 3, -4 + 12, 1 + 0]] = [[-1, -10, 2], [3, 8, 1]]
    assert merge(weights=[1, 3]).tolist() == [[0.0, -8.0, 5.0], [7.0, 13.0, 7.0]]
    # half of it
    assert merge(weights=[1, 3], lambda_=0.5).tolist() == [[0.5, -3.0, 4.0], [5.5, 9.0, 6.5]]
    # over 1 + 3: [[-0.25, -2.5, 0.5], [0.75, 2, 0.25]]
    assert merge(weights=[1, 3], normalize=True).tolist() == [[0.75, -0.5, 3.5], [4.75, 7.0, 6.25]]
    # both: over 4, times -2
    assert merge(weights=[1, 3], normalize=True, lambda_=-2).tolist() == [[1.5, 7.0, 2.0], [2.5, 1.0, 5.5]]
    # to forget what the second model learnt: d_1 - d_2 = [[3, 2, 0], [-1, -8, 1]]
    assert merge(weights=[1, -1]).tolist() == [[4.0, 4.0, 3.0], [3.0, -3.0, 7.0]]
    # weights and lambda are 1 and nothing is divided where nothing is said: d_1 + d_2 = [[1, -4, 1], [1, 0, 1]]
    assert merge().tolist() == [[2.0, -2.0, 4.0], [5.0, 5.0, 7.0]]


def test_nothing_is_read_to_measure():
    memory = InMemory(BASE, [BASE])
    assert make_method(NAME, 1).measure(memory.tensor, memory.scan) is None
    assert memory.scans == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lambda_zero_is_the_base(dtype: torch.dtype):
    base, models = random_inputs((40, 50), dtype=dtype)
    merged = InMemory(base, models).merge(make_method(NAME, 3, weights=[0.3, -2, 1], lambda_=0.0), 70)
    assert_same_bits(merged.to(dtype), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_model_at_weight_one_is_itself(dtype: torch.dtype):
    """Bitwise, except where the model's value is far below the base's and the float32 difference lost its end."""
    base, (model,) = random_inputs((400, 50), 1, dtype)
    base[0, :10] = 1000.0
    model[0, :10] = torch.tensor([2.0**-k for k in range(4, 14)])
    merged = InMemory(base, [model]).merge(make_method(NAME, 1), 70).to(dtype)
    lost = model.float().abs() < 2**-15 * base.float().abs()
    assert_same_bits(merged, model, allow=lost)
    assert 0 < lost.sum() < 20


def test_one_model_in_float32_is_itself_to_one_unit_in_the_last_place():
    """Where model and base are of one size; the difference of two float32 numbers within a factor of 2 is exact."""
    base, (model,) = random_inputs((400, 50), 1)
    merged = InMemory(base, [model]).merge(make_method(NAME, 1), 70)
    near = (model.abs() > base.abs() / 2) & (model.abs() < base.abs() * 2)
    assert near.double().mean() > 0.8
    assert ulp_distance(merged, model)[near].max() <= 1
    assert_same_bits(merged[model == base], model[model == base])


def test_a_weight_of_zero_leaves_a_model_out():
    base, models = random_inputs((31, 17))
    without = InMemory(base, models[::2]).merge(make_method(NAME, 2, weights=[0.6, 0.7]))
    assert_same_bits(InMemory(base, models).merge(make_method(NAME, 3, weights=[0.6, 0.0, 0.7])), without)


def test_a_model_equal_to_the_base_adds_nothing():
    base, models = random_inputs((31, 17))
    without = InMemory(base, models).merge(make_method(NAME, 3))
    assert_same_bits(InMemory(base, [*models, base]).merge(make_method(NAME, 4)), without)


def test_order_of_models_changes_only_rounding():
    base, models = random_inputs((64, 33))
    weights = [0.2, 0.7, -1.3]
    one = InMemory(base, models).merge(make_method(NAME, 3, weights=weights))
    other = InMemory(base, models[::-1]).merge(make_method(NAME, 3, weights=weights[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...]):
    base, models = random_inputs(shape)
    merged = [check_parity(NAME, base, models, weights=[0.3, 0.5, 0.9], block_elements=n) for n in (1, 2, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weights": [0.5, 0.3, 0.2], "lambda_": 1.5},
        {"weights": [1.0, -0.4, 0.7], "normalize": True},
        {"weights": [0.4, 0.4, 0.4], "normalize": True, "lambda_": -0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(arguments: dict, dtype: torch.dtype):
    base, models = random_inputs((97, 61), 3, dtype)
    check_parity(NAME, base, models, block_elements=1000, **arguments)


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(wrong):
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(NAME, base, models, weights=[0.5, 0.3, 0.2], formula=wrong(NAME))


def test_weights_that_add_up_to_nothing_are_refused_only_where_divided_by():
    with pytest.raises(ArgumentError, match="add up to 0"):
        make_method(NAME, 2, weights=[1.0, -1.0], normalize=True)
    make_method(NAME, 2, weights=[1.0, -1.0])
