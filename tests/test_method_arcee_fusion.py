"""`arcee_fusion`: the model's weights where they matter most."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, make_method, patch_grid, random_inputs
from tests.reference.of_method import Reference


def importances(base: Tensor, model: Tensor) -> tuple[np.ndarray, float]:
    """|x - b| times the divergence of the row, as the formula has it, and the threshold."""

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True) + 1e-8

    b, x = (np.atleast_1d(tensor.float().double().numpy()) for tensor in (base, model))
    if not b.size:
        return np.zeros(tuple(base.shape)), 0.0
    p, q = softmax(x), softmax(b)
    found = np.abs(x - b) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    q1, median, q3 = np.quantile(found, [0.25, 0.5, 0.75])
    return found.reshape(tuple(base.shape)), float(median + 1.5 * (q3 - q1))


def arcee_fusion(base: Tensor, models: list[Tensor], **unused: object) -> Tensor:
    """x where the importance reaches the threshold, else b."""
    found, threshold = importances(base, models[0])
    return torch.where(torch.from_numpy(np.asarray(found >= threshold)), models[0].double(), base.double())


def unclear(base: Tensor, models: list[Tensor], **unused: object) -> Tensor:
    """Importances so near the threshold that float32 may put them on its other side, and those that are noise of the formula."""
    found, threshold = importances(base, models[0])
    noise = 1e-13 * np.asarray(
        (models[0].double() - base.double()).numpy()
    )  # of sum p ln(p / q), whose terms are near 1 and cancel
    margin = 1e-5 * abs(threshold) + noise + (noise.max() if noise.size else 0.0)
    return torch.from_numpy(np.asarray(np.abs(found - threshold) <= margin)) & (base != models[0])


def exact(base: Tensor, models: list[Tensor], result: Tensor, **unused: object) -> Tensor:
    """Nothing is computed: an element is the model's or the base's."""
    return torch.zeros_like(result)


REFERENCES = {"arcee_fusion": Reference(arcee_fusion, exact, {}, None, unclear, in_weights=True, jumps=True)}


def test_by_hand():
    # importances of the first row: 0, .089, 0, 2.67; of the second: 0, .00013, 0, .00013. Threshold .0336
    model = torch.tensor([[0.1, 0.2, 0.3, 3.0], [0.0, 0.1, 0.0, 0.1]])
    base = torch.tensor([[0.1, 0.1, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.1, 0.2, 0.3, 3.0], [0.0, 0.0, 0.0, 0.0]])
    found, threshold = importances(base, model)
    assert found.flatten() == pytest.approx([0, 0.089026, 0, 2.670788, 0, 0.000125, 0, 0.000125], abs=1e-6)
    assert threshold == pytest.approx(0.033588, abs=1e-6)
    for block_elements in (1, 3, 8):
        merged = InMemory(base, [model]).merge(make_method("arcee_fusion", 1), block_elements)
        assert_same_bits(merged, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 2), (3, 3), (47, 31), (1, 800), (900,), (5, 13, 11)], ids=str)
def test_boundaries(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    patch_grid(monkeypatch, 7)
    base, models = random_inputs(shape, 1)
    models = [base + 10 * (models[0] - base)]
    merged = [check_parity("arcee_fusion", base, models, block_elements=n) for n in (1, 7, 1 << 17)]
    for other in merged[1:]:
        assert_same_bits(other, merged[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(700, 500), (3, 150_000), (400_000,)], ids=str)
def test_quartiles_of_tensors_that_are_sampled(shape: tuple[int, ...], dtype: torch.dtype):
    """Larger than what is sorted whole, in rows of which some begin within a block."""
    base, models = random_inputs(shape, 1, dtype)
    model = (base.float() + 20 * (models[0].float() - base.float())).to(dtype)
    check_parity("arcee_fusion", base, [model])


def test_parity_has_teeth():
    base, models = random_inputs((47, 31), 1)
    check_parity("arcee_fusion", base, models)
    for wrong in (lambda b, m, **_: arcee_fusion(m[0], [b]), lambda b, m, **_: arcee_fusion(b.T, [m[0].T]).T):
        with pytest.raises(AssertionError, match="not the rounded reference"):
            check_parity("arcee_fusion", base, models, formula=wrong)
