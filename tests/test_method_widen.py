"""`widen`: task vectors weighed per channel by the ranks of how far its norm and its direction moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from checkpoints.errors import ArgumentError
from tests.golden_files import assert_same_bits
from tests.in_memory import (
    SHAPES,
    InMemory,
    check_parity,
    flipped,
    make_method,
    merge_models,
    patch_grid,
    random_inputs,
)
from tests.reference import merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference


def with_scores_of_others(base: torch.Tensor, models: Sequence[torch.Tensor], **arguments: Any) -> torch.Tensor:
    """The reference with each model's scores given to another one: WIDEN knows no order of models."""
    right = reference.scores_above
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "scores_above", lambda *values, **divide: right(*values, **divide)[::-1])
        return reference.widen(base, models, **arguments)


REFERENCES = {
    "widen": Reference(
        reference.widen,
        slacks.of_steps,
        {"ratio": 0.8, "calibration": 1.3},
        misplaced=with_scores_of_others,
        jumps=True,
    ),
}

NAME = "widen"
merge = partial(merge_models, NAME, block_elements=5)


def assert_is(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


# Columns (3, 4), (1, 0), (0, 2) with norms 5, 1, 2.
BASE = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])
# The first model leaves column 0, makes column 1 three times and column 2 half as long, and turns nothing.
X1 = torch.tensor([[3.0, 3.0, 0.0], [4.0, 0.0, 1.0]])
# The second turns columns 0 and 2 by 90 degrees, leaves column 1, and no norm changes.
X2 = torch.tensor([[-4.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
# norms:       differences (0, 2, 1) and (0, 0, 0); positions (0, 2, 1) and, equal ones in order, (0, 1, 2)
# directions:  1 - cosine  (0, 0, 0) and (1, 0, 1); positions (0, 1, 2) and (1, 0, 2)
# Ranks are positions / 3, their mean is 1/3: position 2 is above it and scores `calibration`, here 1; the others score
# their share of the softmax over the two models, where a position that is one less than the other's has Q, else 1 - Q:
Q = 1 / (1 + math.exp(1 / 3))
#   norms        (1/2, 1, Q)    and (1/2, Q, 1)
#   directions   (Q, 1 - Q, 1)  and (1 - Q, Q, 1)
S1 = [(0.5 + Q) / 2, (2 - Q) / 2, (1 + Q) / 2]
S2 = [(1.5 - Q) / 2, Q, 1.0]
# d_1 = [[0, 2, 0], [0, 0, -1]];  d_2 = [[-7, 0, 2], [-1, 0, -2]]
RESULT = [[3 - 7 * S2[0], 1 + 2 * S1[1], 2 * S2[2]], [4 - S2[0], 0.0, 2 - S1[2] - 2 * S2[2]]]


def test_by_hand():
    assert RESULT[0] == pytest.approx([-0.788995, 2.582570, 2.0], abs=1e-6)
    assert RESULT[1] == pytest.approx([3.458715, 0.0, -0.708715], abs=1e-6)
    for block_elements in (1, 2, 3, 6):
        assert_is(merge(X1, X2, base=BASE, block_elements=block_elements), RESULT)


def test_calibration_and_ratio_by_hand():
    # calibration 0: position 2 scores 0 in place of 1
    s1, s2 = [(0.5 + Q) / 2, (1 - Q) / 2, Q / 2], [(1.5 - Q) / 2, Q, 0.0]
    expected = [[3 - 7 * s2[0], 1 + 2 * s1[1], 2 * s2[2]], [4 - s2[0], 0.0, 2 - s1[2] - 2 * s2[2]]]
    assert_is(merge(X1, X2, base=BASE, calibration=0.0), expected)
    # ratio 2: position 2 is not above twice the mean 1, so all scores are softmax: 1 - Q (or 1/2) in place of 1
    s1, s2 = [(0.5 + Q) / 2, 1 - Q, (Q + 0.5) / 2], [(1.5 - Q) / 2, Q, (1.5 - Q) / 2]
    expected = [[3 - 7 * s2[0], 1 + 2 * s1[1], 2 * s2[2]], [4 - s2[0], 0.0, 2 - s1[2] - 2 * s2[2]]]
    assert_is(merge(X1, X2, base=BASE, ratio=2.0), expected)
    # ratio 0: every position but 0 is above 0 and scores 1
    s1, s2 = [(0.5 + Q) / 2, 1.0, 1.0], [0.75, (1 + Q) / 2, 1.0]
    expected = [[3 - 7 * s2[0], 1 + 2 * s1[1], 2 * s2[2]], [4 - s2[0], 0.0, 2 - s1[2] - 2 * s2[2]]]
    assert_is(merge(X1, X2, base=BASE, ratio=0.0), expected)


def test_an_embedding_is_scored_by_rows():
    expected = torch.tensor(RESULT).T.tolist()
    assert_is(merge(X1.T, X2.T, base=BASE.T, is_embedding=True), expected)
    plain = merge(X1.T, X2.T, base=BASE.T)
    assert (plain - torch.tensor(expected)).abs().max() > 0.1, "the columns of the transposed are something else"


def test_a_stack_is_merged_matrix_by_matrix():
    base, models = random_inputs((3, 6, 7))
    stacked = merge(*models, base=base, block_elements=20)
    for k in range(3):
        torch.testing.assert_close(stacked[k], merge(*[x[k] for x in models], base=base[k]), rtol=0, atol=1e-7)


def test_a_vector_by_hand():
    # |d_1| = 2, 0, 1, 1 and |d_2| = 0, 0, 3, 1, of mean 1 both: d_1[0] and d_2[2] are above it and score 1.
    # The softmax of (1, 3) gives the first model r = 1 / (1 + e^2), that of (1, 1) gives 1/2 to both.
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    models = [base + torch.tensor([2.0, 0.0, -1.0, 1.0]), base + torch.tensor([0.0, 0.0, 3.0, 1.0])]
    r = 1 / (1 + math.exp(2))
    for block_elements in (1, 3, 4):
        assert_is(merge(*models, base=base, block_elements=block_elements), [3.0, 2.0, 3 - r + 3, 5.0])
    assert_is(merge(*models, base=base, calibration=0.5), [2.0, 2.0, 3 - r + 1.5, 5.0])
    # ratio 3: nothing is above 3 but what is 3 is not above it; 2 and 3 score 1 / (1 + e^-2) = 1 - r
    assert_is(merge(*models, base=base, ratio=3.0), [1 + 2 * (1 - r), 2.0, 3 - r + 3 * (1 - r), 5.0])
    # all equal, of mean themselves: none is above, all share
    assert_is(merge(base + 0.5, base - 0.5, base=base), base.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 50), (2, 6, 7), (500,)])
def test_models_equal_to_the_base_give_the_base(dtype: torch.dtype, shape: tuple[int, ...]):
    base, _ = random_inputs(shape, dtype=dtype)
    for arguments in ({}, {"is_embedding": True}, {"calibration": 3.0}):
        assert_same_bits(merge(base, base, base=base, **arguments).to(dtype), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_embedding", [False, True])
@pytest.mark.parametrize("shape", [(40, 50), (2, 6, 7), (500,)])
def test_one_model_is_itself(dtype: torch.dtype, is_embedding: bool, shape: tuple[int, ...]):
    """The softmax over one model is 1, and so is `calibration`."""
    base, (model,) = random_inputs(shape, 1, dtype)
    lost = model.float().abs() < 2**-15 * base.float().abs()
    assert_same_bits(merge(model, base=base, is_embedding=is_embedding).to(dtype), model, allow=lost)


@pytest.mark.parametrize("is_embedding", [False, True])
def test_untouched_channels_stay(is_embedding: bool):
    base, models = random_inputs((40, 50))
    rows, columns = ([3, 4, 39], slice(None)) if is_embedding else (slice(None), [0, 7, 49])
    for model in models:
        model[rows, columns] = base[rows, columns]
    merged = merge(*models, base=base, is_embedding=is_embedding)
    assert_same_bits(merged[rows, columns], base[rows, columns])
    assert (merged != base).double().mean() > 0.5


def test_zero_columns_are_finite():
    """Nothing there; only in the models; in the base and not in one model, not in any: directions differ by 0 then."""
    base, models = random_inputs((8, 6))
    base[:, 0] = 0
    for model in models:
        model[:, 0] = 0
    base[:, 1] = 0
    models[0][:, 2] = 0
    for model in models:
        model[:, 3] = 0
    for is_embedding in (False, True):
        b, xs = (base.T, [x.T for x in models]) if is_embedding else (base, models)
        merged = check_parity(NAME, b.contiguous(), [x.contiguous() for x in xs], is_embedding=is_embedding)
        assert merged.isfinite().all()
        assert not (merged[0] if is_embedding else merged[:, 0]).any()
    zeros = torch.zeros(8, 6)
    assert not merge(zeros, zeros, base=zeros).any()
    assert merge(*models, base=zeros).isfinite().all()


def test_a_change_of_a_last_bit_outranks_none():
    """1 - cosine computed as such is 0 or noise here; the sums are written so that the smallest change counts."""
    base = torch.ones(64, 9)
    model = base.clone()
    model[0, 2] += 2**-20
    other = base.clone()
    other[:, 2] = 3.0  # one column, longer in proportion: no other direction
    memory = InMemory(base, [model, other])
    scores = make_method(NAME, 2, calibration=7.0).measure(memory.tensor, memory.scan)[:, 0]  # [models, channels]
    assert scores[0, 2] == 7.0, "last of 9 in norm and in direction"
    assert 3.5 < scores[1, 2] < 4.5, "last in norm, the third of 9 equal ones in direction"


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_the_unit_of_the_weights_does_not_matter(scale: float):
    base, models = random_inputs((20, 30))
    scaled = merge(*[model * scale for model in models], base=base * scale)
    assert_same_bits(scaled / scale, merge(*models, base=base))


def test_order_of_models_and_of_channels_changes_only_rounding():
    base, models = random_inputs((40, 33))
    one = merge(*models, base=base)
    torch.testing.assert_close(merge(*models[::-1], base=base), one, rtol=0, atol=1e-7)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    for model in models:  # no column untouched: equal ones are ranked in order
        assert (model != base).any(dim=0).all()
    torch.testing.assert_close(
        merge(*[x[:, order] for x in models], base=base[:, order]), one[:, order], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("is_embedding", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(shape: tuple[int, ...], is_embedding: bool):
    """Where a channel is a single number, its norm is only exact in float64 if that is a whole number."""
    is_single = len(shape) > 1 and (shape[-1] if is_embedding else shape[-2]) == 1
    base, models = random_inputs(shape, whole=is_single)
    blocks = (1, 2, 7, 1 << 17)
    merged = [check_parity(NAME, base, models, is_embedding=is_embedding, block_elements=n) for n in blocks]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("is_embedding", [False, True])
@pytest.mark.parametrize("shape", [(97, 61), (4, 30, 17), (6000,), (3, 700)])
@pytest.mark.parametrize(
    "arguments", [{}, {"ratio": 0.6, "calibration": 2.0}, {"ratio": 1.7, "calibration": 0.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(
    shape: tuple[int, ...], is_embedding: bool, arguments: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    patch_grid(monkeypatch, 500)  # sums over many blocks, over pieces of rows too
    base, models = random_inputs(shape, 3, dtype)
    if len(shape) == 2:  # a third of the rows and every fifth column untouched, as in real embeddings
        for model in models:
            model[::3] = base[::3]
            model[:, ::5] = base[:, ::5]
    check_parity(NAME, base, models, is_embedding=is_embedding, block_elements=1000, **arguments)


@pytest.mark.parametrize("shape", [(97, 61), (600,)])
def test_parity_sees_a_wrong_formula(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Turned deltas; scores of the next model in place of a model's own (its order alone is no part of the formula)."""
    base, models = random_inputs(shape)
    check_parity(NAME, base, models, calibration=0.3)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(NAME, base, models, calibration=0.3, formula=flipped(NAME))
    right = reference.scores_above
    monkeypatch.setattr(reference, "scores_above", lambda *values, **divide: right(*values, **divide)[::-1])
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(NAME, base, models, calibration=0.3)


def test_parity_sees_scores_of_the_other_dimension():
    base, models = random_inputs((61, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(NAME, base, models, formula=lambda *t, is_embedding, **a: reference.widen(*t, is_embedding=True))


def test_it_asks_for_embeddings_and_refuses_what_it_does_not_use():
    method = make_method(NAME, 2)
    assert method.needs_embeddings
    assert set(type(method).parameters()) == {"widen_ratio", "widen_calibration"}
    for key in ("ratio", "calibration"):
        with pytest.raises(ArgumentError, match=f"widen_{key}: expected"):
            make_method(NAME, 2, **{key: -0.5})
