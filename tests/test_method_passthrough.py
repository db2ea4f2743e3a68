"""`passthrough`: one model as it is, scaled where asked."""

from __future__ import annotations

import pytest

from checkpoints.errors import InputError
from merging import make_recipe
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, random_inputs
from tests.reference import more_merging as more
from tests.reference import slacks
from tests.reference.of_method import Reference

REFERENCES = {
    "passthrough": Reference(
        more.passthrough, slacks.of_sums("passthrough", weights_too=True), {"weights": [1.5]}, in_weights=True
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_is_itself(shape: tuple[int, ...]):
    base, (model, *_) = random_inputs(shape)
    for block_elements in (1, 7, 1 << 17):
        assert_same_bits(InMemory(base, [model]).merge(make_method("passthrough", 1), block_elements), model)


def test_scaled():
    base, (model, *_) = random_inputs((9, 5))
    check_parity("passthrough", base, [model], weights=[-0.3])
    assert_same_bits(InMemory(base, [model]).merge(make_method("passthrough", 1, weights=[0.5])), model * 0.5)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("passthrough", base, [model], formula=flipped("passthrough"))


def test_two_models_are_too_many():
    with pytest.raises(InputError, match="passthrough merges 1 model, got 2"):
        make_recipe("passthrough", "base", "one,two")
    assert make_recipe("passthrough", "base", "one", parameters={"scale": 2}).method("w").weights == (2.0,)  # type: ignore[attr-defined]
