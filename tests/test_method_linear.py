"""`linear`: the weighted mean of the models."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from checkpoints.errors import ArgumentError
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, merge_models, random_inputs, shifted
from tests.reference import merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula

REFERENCES = {
    "linear": Reference(
        reference.linear,
        slacks.of_weights,
        {"weights": slacks.UNEQUAL["weights"]},
        in_weights=True,
        misplaced=shifted_formula(reference.linear),
    ),
}

BASE = torch.full((2, 3), 100.0)
X1 = torch.tensor([[2.0, -4.0, 6.0], [0.0, 1.0, -8.0]])
X2 = torch.tensor([[-2.0, 0.0, 1.0], [4.0, 1.0, 8.0]])
merge = partial(merge_models, "linear", base=BASE)


def test_by_hand():
    # (1 x_1 + 3 x_2) / 4: (2 - 6) / 4, (-4 + 0) / 4, (6 + 3) / 4; (0 + 12) / 4, (1 + 3) / 4, (-8 + 24) / 4
    assert merge(X1, X2, weights=[1, 3]).tolist() == [[-1.0, -1.0, 2.25], [3.0, 1.0, 4.0]]
    # not divided
    assert merge(X1, X2, weights=[1, 3], normalize=False).tolist() == [[-4.0, -4.0, 9.0], [12.0, 4.0, 16.0]]
    # weights are 1 where none are given: the plain mean
    assert merge(X1, X2).tolist() == [[0.0, -2.0, 3.5], [2.0, 1.0, 0.0]]
    # 3 x_1 - 1 x_2 over 2: (6 + 2) / 2, (-12 - 0) / 2, (18 - 1) / 2; (0 - 4) / 2, (3 - 1) / 2, (-24 - 8) / 2
    assert merge(X1, X2, weights=[3, -1]).tolist() == [[4.0, -6.0, 8.5], [-2.0, 1.0, -16.0]]


def test_the_base_has_no_part_in_it():
    """A block of linear has no base at all, and no task vectors."""
    memory = InMemory(BASE, [X1, X2])
    method = make_method("linear", 2)
    assert method.space == "weights"
    assert method.measure(memory.tensor, memory.scan) is None
    assert memory.scans == [], "nothing is read to measure"
    assert torch.equal(memory.merge(method), InMemory(BASE * 7, [X1, X2]).merge(method))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_is_itself(dtype: torch.dtype, normalize: bool):
    base, (model,) = random_inputs((40, 50), 1, dtype)
    method = make_method("linear", 1, normalize=normalize)
    assert_same_bits(InMemory(base, [model]).merge(method, 70).to(dtype), model)
    if normalize:  # the mean of one, whatever its weight
        method = make_method("linear", 1, weights=[0.25])
        assert_same_bits(InMemory(base, [model]).merge(method, 70).to(dtype), model)


def test_a_weight_of_zero_leaves_a_model_out():
    base, models = random_inputs((31, 17))
    without = InMemory(base, models[::2]).merge(make_method("linear", 2, weights=[0.6, 0.7]))
    assert_same_bits(InMemory(base, models).merge(make_method("linear", 3, weights=[0.6, 0.0, 0.7])), without)


def test_equal_models_give_that_model():
    base, (model,) = random_inputs((31, 17), 1)
    assert_same_bits(InMemory(base, [model] * 4).merge(make_method("linear", 4)), model)  # times 4 and over 4 are exact


def test_order_of_models_changes_only_rounding():
    base, models = random_inputs((64, 33))
    weights = [0.2, 0.7, 1.3]
    one = InMemory(base, models).merge(make_method("linear", 3, weights=weights))
    other = InMemory(base, models[::-1]).merge(make_method("linear", 3, weights=weights[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    assert not torch.equal(one, InMemory(base, models[::-1]).merge(make_method("linear", 3, weights=weights)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...]):
    base, models = random_inputs(shape)
    merged = [
        check_parity("linear", base, models, weights=[0.3, 0.5, 0.9], block_elements=n) for n in (1, 2, 7, 1 << 17)
    ]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"normalize": False},
        {"weights": [0.5, 0.3, 0.2]},
        {"weights": [1.0, -0.4, 0.7]},
        {"weights": [2.0, -1.0, 0.0], "normalize": False},
        {"weights": [1e-3, 5e-4, 1.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(arguments: dict, dtype: torch.dtype):
    base, models = random_inputs((97, 61), 3, dtype)
    check_parity("linear", base, models, block_elements=1000, **arguments)


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(wrong):
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("linear", base, models, weights=[0.5, 0.3, 0.2], formula=wrong("linear"))


def test_weights_that_add_up_to_nothing_are_refused():
    with pytest.raises(ArgumentError, match="add up to 0"):
        make_method("linear", 2, weights=[1.0, -1.0])
    assert merge(X1, X2, weights=[1, -1], normalize=False).tolist() == (X1 - X2).tolist()


def test_a_weight_that_is_no_number_is_refused():
    for weight in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ArgumentError, match="weight: expected a finite number"):
            make_method("linear", 2, weights=[1.0, weight])
