"""`wudi`: the sum of the task vectors, changed until each model's own directions are answered as it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints.errors import ArgumentError, InputError
from merging import make_recipe
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


def stacks(base: Tensor, models: list[Tensor]) -> list[list[np.ndarray]]:
    """The task vectors of each matrix of a stack, float64."""
    vectors = [(model.float() - base.float()).double().numpy().reshape(-1, *base.shape[-2:]) for model in models]
    return [list(one) for one in zip(*vectors, strict=True)]


def moments(vectors: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """C and B."""
    sizes = [(d * d).sum() or 1.0 for d in vectors]
    return (
        sum(d.T @ d / size for d, size in zip(vectors, sizes, strict=True)),
        sum(d @ d.T @ d / size for d, size in zip(vectors, sizes, strict=True)),
    )


def wudi(
    base: Tensor,
    models: list[Tensor],
    *,
    lambda_: float = 1.0,
    solver: str = "ridge",
    ridge: float = 1.0,
    t: float = 300.0,
    rank_share: float = 0.85,
    rest_lambda: float = 0.7,
    is_embedding: bool = False,
    is_head: bool = False,
) -> Tensor:
    """The formulas with C of all columns, whatever the shape, in float64."""
    if is_rest(base, is_embedding, is_head):
        return summed(base, models, rest_lambda)
    merged = []
    for vectors in stacks(base, models):
        c, b = moments(vectors)
        total, n = sum(vectors), len(c)
        if not c.any():
            merged.append(total)
        elif solver == "ridge":
            merged.append(total + (b - total @ c) @ np.linalg.inv(c + ridge * np.trace(c) / n * np.eye(n)))
        else:
            values, v = np.linalg.eigh(c)
            values, v = np.maximum(values[::-1], 1e-8), v[:, ::-1]
            f = np.where(np.arange(n) < np.ceil(rank_share * n), 1 - np.exp(-values * t), 0.0)
            merged.append(total - total @ v @ np.diag(f) @ v.T + b @ v @ np.diag(f / values) @ v.T)
    return base.double() + lambda_ * torch.from_numpy(np.stack(merged)).reshape(base.shape)


def slack(base: Tensor, models: list[Tensor], result: Tensor, *, is_head: bool = False, **arguments: Any) -> Tensor:
    """Float32: the merged task vector, times lambda, plus the base, or all that is added up. Float64: what the solution enlarges.

    That is at most 1 / mu for ridge, and for spectral t, and what the eigenvectors at the edge of the rank turn by.
    """
    bound = float32_slack(base, models, result)
    if base.ndim >= 2 and base.numel():
        n = base.shape[-1]
        for vectors in stacks(base, models):
            size = abs(arguments["lambda_"]) * sum(np.linalg.norm(d) for d in vectors)
            if arguments["solver"] == "ridge":
                bound = bound + 2.0**-50 * size * n / arguments["ridge"]
                continue
            values = np.linalg.eigvalsh(moments(vectors)[0])[::-1]
            k = int(np.ceil(arguments["rank_share"] * n))
            inside = 0 < k < n and values[k - 1] > 1e-10
            bound = bound + 2.0**-48 * size * (arguments["t"] + (1 / (values[k - 1] - values[k]) if inside else 0.0))
    return bound


REFERENCES = {
    "wudi": Reference(wudi, slack, {"lambda_": 0.8, "rest_lambda": 0.6, "ridge": 0.5}, None, prepare=with_head)
}
SOLVERS: list[dict[str, Any]] = [
    {}, {"ridge": 0.01}, {"solver": "spectral"}, {"solver": "spectral", "t": 7.0, "rank_share": 0.5},
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ridge": 0.1}, [2.014085, 0.154930]),
        ({"solver": "spectral", "t": 1.0, "rank_share": 1.0}, [2.064434, 0.463746]),
        ({"solver": "spectral", "t": 10.0, "rank_share": 1.0}, [1.988929, 0.026727]),
        ({"solver": "spectral", "t": 1.0, "rank_share": 0.5}, [2.011850, 0.590695]),
        # (3, 1) C^-1, C = [[1.5, .5], [.5, .5]]: the optimum answers (2, 0) and (1, 1) as their models do, 4 / 2 and 2 / 1
        ({"ridge": 1e-6}, [2.0, 0.0]),
        ({"ridge": 1e9}, [3.0, 1.0]),
        ({"solver": "spectral", "t": 0.0}, [3.0, 1.0]),
        ({"solver": "spectral", "rank_share": 0.0}, [3.0, 1.0]),
    ],
    ids=str,
)
def test_by_hand(settings: dict[str, Any], expected: list[float]):
    base = torch.zeros(1, 2)
    for lambda_ in (1.0, 0.5):
        found = merge_vectors(
            "wudi", torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), base=base, lambda_=lambda_, **settings
        )
        torch.testing.assert_close(found, lambda_ * torch.tensor([expected]), rtol=0, atol=4e-6)


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
def test_it_lowers_what_it_minimises(settings: dict[str, Any]):
    _, models = random_inputs((12, 17))
    base = torch.zeros(12, 17)
    (vectors,) = stacks(base, models)

    def loss(merged: np.ndarray) -> float:
        return float(sum(np.linalg.norm((merged - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2 for d in vectors))

    merged = InMemory(base, models).merge(make_method("wudi", 3, **settings)).double().numpy()
    assert loss(merged) < 0.9 * loss(sum(vectors))


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
def test_models_that_share_no_input_add_up(settings: dict[str, Any]):
    base, models = random_inputs((9, 8), 2)
    models[0][:, 4:] = base[:, 4:]
    models[1][:, :4] = base[:, :4]
    merged = InMemory(base, models).merge(make_method("wudi", 2, **settings))
    torch.testing.assert_close(merged, models[0] + models[1] - base, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 4), (47, 31), (3, 4, 70), (5, 200)], ids=str)
def test_boundaries(shape: tuple[int, ...], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Matrices of more and of fewer columns than the models have rows together, several in a block, several blocks in one."""
    patch_grid(monkeypatch, 40)
    base, models = random_inputs(shape)
    merged = [check_parity("wudi", base, models, block_elements=n, lambda_=1.3, **settings) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("settings", SOLVERS, ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (2, 50)], ids=str)
def test_a_model_that_changes_nothing_adds_nothing(shape: tuple[int, ...], settings: dict[str, Any]):
    base, models = random_inputs(shape, 2)
    with_it = check_parity("wudi", base, [models[0], base, models[1]], **settings)
    torch.testing.assert_close(with_it, check_parity("wudi", base, models, **settings))
    assert_same_bits(InMemory(base, [base, base]).merge(make_method("wudi", 2, **settings)), base)


@pytest.mark.parametrize(("name", "is_embedding"), [("model.embed_tokens.weight", True), ("lm_head.weight", False)])
def test_embeddings_and_the_head_are_summed(name: str, is_embedding: bool):
    base, models = random_inputs((9, 5))
    memory = InMemory(base, models, name, is_embedding)
    memory.tensor = type(memory.tensor)(name, (9, 5), is_embedding, is_head=not is_embedding)
    merged = memory.merge(make_method("wudi", 3, rest_lambda=0.4))
    torch.testing.assert_close(merged, base + 0.4 * sum(model - base for model in models))


def test_lambda_0_is_the_base():
    base, models = random_inputs((9, 5))
    assert_same_bits(InMemory(base, models).merge(make_method("wudi", 3, lambda_=0.0)), base)


def test_parity_has_teeth():
    base, models = random_inputs((47, 31))
    wrong = [
        flipped("wudi"),
        lambda b, m, **given: wudi(b, m[:2], **{key: value for key, value in given.items() if key != "is_embedding"}),
        lambda b, m, **given: wudi(b, m, **given | {"ridge": 1.01}),
        lambda b, m, **given: wudi(b, m, **given | {"solver": "spectral"}),
    ]
    for formula in wrong:
        with pytest.raises(AssertionError, match="not the rounded reference"):
            check_parity("wudi", base, models, formula=formula)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"t": 5.0}, "t: "), ({"rank_share": 0.5}, "rank_share: "), ({"solver": "spectral", "ridge": 2.0}, "ridge: ")],
)  # fmt: skip
def test_a_setting_of_the_other_solver_is_refused(settings: dict[str, Any], says: str):
    with pytest.raises(ArgumentError, match="does not use it") as error:
        make_method("wudi", 2, **settings)
    assert str(error.value).startswith(says)


def test_one_model_is_too_few():
    with pytest.raises(InputError, match="wudi merges at least 2 models besides the base, got 1"):
        make_recipe("wudi", "base", "one")
