"""`iso_c`: the sum of the task vectors with equal singular values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
from tests.reference.of_method import Reference
from tests.reference.whole_matrix import float32_slack, is_rest, summed, with_head


def spectra(base: Tensor, models: list[Tensor]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """U, S, V^T of the sum of the task vectors, for each matrix of a stack."""
    total = np.asarray(sum((model.float() - base.float()).double() for model in models))
    return [np.linalg.svd(one, full_matrices=False) for one in total.reshape(-1, *total.shape[-2:])]


def iso_c(
    base: Tensor,
    models: list[Tensor],
    *,
    lambda_: float = 1.0,
    rest_lambda: float = 0.7,
    is_embedding: bool = False,
    is_head: bool = False,
) -> Tensor:
    """b + lambda mean(S) U V^T by singular values in float64; b + rest_lambda sum d_i for what is no matrix of a layer."""
    if is_rest(base, is_embedding, is_head):
        return summed(base, models, rest_lambda)
    merged = [s.mean() * (u * (s > 1e-6 * s.max(initial=0.0))) @ vt for u, s, vt in spectra(base, models)]
    return base.double() + lambda_ * torch.from_numpy(np.stack(merged)).reshape(base.shape)


def slack(base: Tensor, models: list[Tensor], result: Tensor, *, is_head: bool = False, **arguments: Any) -> Tensor:
    """Float32: the merged task vector, times lambda, plus the base, or all that is added up. Float64: the Gram squares the condition."""
    bound = float32_slack(base, models, result)
    if base.ndim >= 2 and base.numel():
        for _, s, _ in spectra(base, models):
            kept = s[s > 1e-6 * s.max(initial=0.0)]
            if kept.size:
                size = abs(arguments["lambda_"]) * s.mean() * len(s)
                bound = bound + 2.0**-50 * (kept.max() / kept.min()) ** 2 * size
    return bound


REFERENCES = {"iso_c": Reference(iso_c, slack, {"lambda_": 0.8, "rest_lambda": 0.6}, None, prepare=with_head)}


def change(*vectors: list[list[float]], **arguments: Any) -> Tensor:
    """What `iso_c` adds to a base of zeros."""
    tensors = [torch.tensor(vector) for vector in vectors]
    return merge_vectors("iso_c", *tensors, base=torch.zeros_like(tensors[0]), block_elements=1, **arguments)


def test_by_hand():
    # singular values 3 and 1 become 2 and 2; half of it
    one, other = [[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(change(one, other), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(change(one, other, lambda_=0.5), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    # 0 counts in the mean, 3 / 2, and gets no direction
    torch.testing.assert_close(change(one), torch.tensor([[1.5, 0.0], [0.0, 0.0]]))
    # the sum is [[3, 1], [1, 2]], symmetric and positive: U V^T = I, the mean singular value half of the trace
    torch.testing.assert_close(change([[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]), 2.5 * torch.eye(2))


def test_all_singular_values_are_their_mean():
    base, models = random_inputs((40, 23))
    base = torch.zeros_like(base)
    merged = InMemory(base, models).merge(make_method("iso_c", 3)).double()
    before, after = torch.linalg.svdvals(sum(models).double()), torch.linalg.svdvals(merged)
    torch.testing.assert_close(after, before.mean().expand(23), rtol=1e-5, atol=0)
    assert before[0] > 1.5 * before[-1]


def test_a_turned_matrix_is_the_turned_merge():
    base, models = random_inputs((12, 5))
    one = InMemory(base, models).merge(make_method("iso_c", 3))
    other = InMemory(base.T.contiguous(), [model.T.contiguous() for model in models]).merge(make_method("iso_c", 3))
    torch.testing.assert_close(one, other.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 4), (47, 31), (5, 200)], ids=str)
@pytest.mark.parametrize("models", [1, 3])
def test_boundaries(shape: tuple[int, ...], models: int, monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 40)
    base, tuned = random_inputs(shape, models)
    merged = [check_parity("iso_c", base, tuned, block_elements=n, lambda_=1.3) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize(("name", "is_embedding"), [("model.embed_tokens.weight", True), ("lm_head.weight", False)])
def test_embeddings_and_the_head_are_summed(name: str, is_embedding: bool):
    """A matrix of the reference's other branch, so that the two are told apart."""
    base, models = random_inputs((9, 5))
    memory = InMemory(base, models, name, is_embedding)
    memory.tensor = type(memory.tensor)(name, (9, 5), is_embedding, is_head=not is_embedding)
    merged = memory.merge(make_method("iso_c", 3))
    torch.testing.assert_close(merged, base + 0.7 * sum(model - base for model in models))


def test_lambda_0_is_the_base_and_no_change_changes_nothing():
    base, models = random_inputs((9, 5))
    assert_same_bits(InMemory(base, models).merge(make_method("iso_c", 3, lambda_=0.0)), base)
    assert_same_bits(InMemory(base, [base, base]).merge(make_method("iso_c", 2)), base)


def test_an_infinity_that_was_let_through_stays_in_its_matrix():
    base, models = random_inputs((3, 9, 4))
    models[1][1, 2, 3] = torch.inf
    merged = InMemory(base, models).merge(make_method("iso_c", 3))
    assert merged[1].isnan().all()
    assert merged[[0, 2]].isfinite().all()


def test_parity_has_teeth():
    base, models = random_inputs((47, 31))
    for wrong in (flipped("iso_c"), lambda b, m, **given: iso_c(b, m[:2], lambda_=given["lambda_"])):
        with pytest.raises(AssertionError, match="not the rounded reference"):
            check_parity("iso_c", base, models, formula=wrong)
