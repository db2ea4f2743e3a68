"""`multislerp`: the mean direction of several models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from checkpoints.errors import ArgumentError
from merging.methods import get_method
from merging.methods.multislerp import MultiSlerpOfWeights
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, patch_grid, random_inputs, shifted
from tests.reference import of_method
from tests.reference.of_method import FLOAT32_STEP, Reference


def multislerp(
    base: Tensor | None,
    models: list[Tensor],
    *,
    weights: list[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
    **unused: object,
) -> Tensor:
    """From the mean direction m along the tangent sum w (u - (u.m) m), as long as the vectors are on average."""
    vectors = [model.double() if base is None else (model.float() - base.float()).double() for model in models]
    w = [weight / sum(weights) for weight in weights] if normalize_weights else weights
    units = [vector / (vector.norm() + eps) for vector in vectors]
    m = torch.stack([w_i * u for w_i, u in zip(w, units, strict=True)]).sum(dim=0)
    start = 0.0 if base is None else base.double()
    if m.norm() < eps:
        return start + torch.stack([w_i * v for w_i, v in zip(w, vectors, strict=True)]).sum(dim=0)
    m = m / m.norm()
    tangent = torch.stack([w_i * (u - (u * m).sum() * m) for w_i, u in zip(w, units, strict=True)]).sum(dim=0)
    tau = float(tangent.norm()) + eps
    direction = math.cos(tau) * m + math.sin(tau) / tau * tangent
    return start + direction * sum(w_i * float(vector.norm()) for w_i, vector in zip(w, vectors, strict=True))


def slack(base: Tensor, models: list[Tensor], result: Tensor, **arguments: object) -> Tensor:
    """Roundings of what is added up: each task vector times what its factor may be at most."""
    deltas = [(model.double() - base.double()).abs() for model in models]
    longest = max([float(delta.norm()) for delta in deltas], default=0.0)
    growth = [max(1.0, longest / max(float(delta.norm()), 1e-30)) for delta in deltas]
    grown = float((result - base.double()).norm()) / max(longest, 1e-30) if base.numel() else 0.0
    reach = torch.stack([g * delta for g, delta in zip(growth, deltas, strict=True)]).sum(dim=0)
    return 32 * FLOAT32_STEP * (max(4.0, 4 * grown) * reach + base.double().abs())


REFERENCES = {
    "multislerp": Reference(
        multislerp, slack, {"weights": [0.7, 0.4, 1.3]}, single=None, misplaced=of_method.shifted(multislerp)
    )
}


def of_weights(models: int, **arguments: object) -> MultiSlerpOfWeights:
    """The method of a recipe without a base."""
    method = make_method("multislerp", models, **arguments)
    return MultiSlerpOfWeights(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


@pytest.mark.parametrize(("weights", "expected"), [([1, 1], [2.474874, 2.474874]), ([3, 1], [3.083221, 1.02774])])
def test_by_hand(weights: list[float], expected: list[float]):
    # directions (1, 0) and (0, 1), lengths 3 and 4: with weights of 1/2 at 45 degrees, 3.5 long
    vectors = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    base = torch.tensor([10.0, 20.0])
    merged = InMemory(base, vectors).merge(of_weights(2, weights=weights), 1)
    torch.testing.assert_close(merged, torch.tensor(expected))
    merged = InMemory(base, [base + vector for vector in vectors]).merge(
        make_method("multislerp", 2, weights=weights), 1
    )
    torch.testing.assert_close(merged, base + torch.tensor(expected))


def test_without_a_mean_direction_they_are_added_up():
    vector = torch.tensor([3.0, 4.0])
    merged = InMemory(torch.zeros(2), [vector, -vector]).merge(make_method("multislerp", 2))
    assert merged.tolist() == [0.0, 0.0]
    third = [torch.tensor([math.cos(angle), math.sin(angle)]) for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    merged = InMemory(torch.zeros(2), third).merge(make_method("multislerp", 3, eps=1e-6, weights=[1, 1, 1]))
    torch.testing.assert_close(merged, torch.zeros(2), rtol=0, atol=1e-6)


def test_weights_that_add_up_to_0_are_refused_where_they_are_divided():
    with pytest.raises(ArgumentError, match="weight: 1, -1 add up to 0, which normalize_weights divides by"):
        make_method("multislerp", 2, weights=[1.0, -1.0])
    make_method("multislerp", 2, weights=[1.0, -1.0], normalize_weights=False)


@pytest.mark.parametrize("kind", [{}, {"normalize_weights": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(kind: dict, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape, 3)
    merged = [
        check_parity("multislerp", base, models, block_elements=n, weights=[1, 3, 2], **kind) for n in (1, 7, 1 << 17)
    ]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_has_teeth(wrong):
    base, models = random_inputs((47, 31), 3)
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("multislerp", base, models, weights=[1, 3, 2], formula=wrong("multislerp"))


def test_a_recipe_without_a_base_works_on_weights():
    assert get_method("multislerp").without_base() is MultiSlerpOfWeights
