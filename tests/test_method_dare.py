"""`dare_linear` and `dare_ties`: drop at random, rescale, then add up, with or without electing signs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from checkpoints.errors import ArgumentError
from tests.golden_files import assert_same_bits
from tests.in_memory import SHAPES, InMemory, check_parity, flipped, make_method, merge_vectors, random_inputs, shifted
from tests.reference import merging as reference
from tests.reference import slacks
from tests.reference.of_method import Reference
from tests.reference.of_method import shifted as shifted_formula
from tests.reference.random_mask import keep_mask

REFERENCES = {
    "dare_linear": Reference(
        reference.dare_linear,
        slacks.of_steps,
        slacks.UNEQUAL | {"normalize": True},
        {"density": 1.0},
        None,
        slacks.rescale_rule("density"),
        misplaced=shifted_formula(reference.dare_linear),
    ),
    "dare_ties": Reference(
        reference.dare_ties,
        slacks.of_steps,
        slacks.UNEQUAL,
        {"density": 1.0},
        reference.election_is_close,
        slacks.rescale_rule("density"),
        misplaced=shifted_formula(reference.dare_ties),
    ),
}

NAMES = ["dare_linear", "dare_ties"]
BASE = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
D1 = torch.tensor([[4.0, -2.0, 1.0], [-6.0, 3.0, -1.0]])
D2 = torch.tensor([[-4.0, -5.0, 2.0], [3.0, 1.0, 2.0]])
SEED = 4
# What seed 4 keeps of a tensor "w" at density 0.5, and twice that of d_1 and d_2:
MASKS = [[[1, 1, 1], [1, 1, 0]], [[0, 1, 0], [0, 1, 1]]]
KEPT = [[[8.0, -4.0, 2.0], [-12.0, 6.0, 0.0]], [[0.0, -10.0, 0.0], [0.0, 2.0, 4.0]]]
merge = partial(merge_vectors, base=BASE, seed=SEED, density=0.5)


def test_the_masks_that_the_examples_below_work_with():
    assert [keep_mask(SEED, "w", model, (2, 3), 0.5).int().tolist() for model in (0, 1)] == MASKS
    assert [(2 * d * torch.tensor(m)).tolist() for d, m in zip((D1, D2), MASKS, strict=True)] == KEPT


def test_dare_linear_by_hand():
    # the two of KEPT added up: [[8, -14, 2], [-12, 8, 4]]
    assert merge("dare_linear", D1, D2).tolist() == [[18.0, 6.0, 32.0], [28.0, 58.0, 64.0]]
    assert merge("dare_linear", D1, D2, lambda_=0.5).tolist() == [[14.0, 13.0, 31.0], [34.0, 54.0, 62.0]]
    # once the first and three times the second: [[8, -34, 2], [-12, 12, 12]]
    # a quarter of it: [[2, -8.5, 0.5], [-3, 3, 3]]
    assert merge("dare_linear", D1, D2, weights=[1, 3]).tolist() == [[18.0, -14.0, 32.0], [28.0, 62.0, 72.0]]
    assert merge("dare_linear", D1, D2, weights=[1, 3], normalize=True).tolist() == [
        [12.0, 11.5, 30.5],
        [37.0, 53.0, 63.0],
    ]


def test_dare_ties_by_hand():
    # weights 1 and -1: D_2 = [[0, 10, 0], [0, -2, -4]];  sums [[8, 6, 2], [-12, 4, -4]], signs + + + - + -
    # who agrees: D_1 8;  D_2 10;  D_1 2;  D_1 -12;  D_1 6;  D_2 -4
    assert merge("dare_ties", D1, D2, weights=[1, -1]).tolist() == [[18.0, 30.0, 32.0], [28.0, 56.0, 56.0]]
    # over their weights: 8, 10 / -1, 2, -12, 6, -4 / -1
    assert merge("dare_ties", D1, D2, weights=[1, -1], normalize=True).tolist() == [
        [18.0, 10.0, 32.0],
        [28.0, 56.0, 64.0],
    ]
    # weights 2.5 and -1: at (0, 1) -10 + 10 = 0 counts as +, so D_2 has it: 10;  the rest 20, 5, -30, 15, -4
    assert merge("dare_ties", D1, D2, weights=[2.5, -1]).tolist() == [[30.0, 30.0, 35.0], [10.0, 65.0, 56.0]]
    # all agree: a sum by default, a mean if asked for: -14 / 2, 8 / 2, and the others alone
    assert merge("dare_ties", D1, D2).tolist() == [[18.0, 6.0, 32.0], [28.0, 58.0, 64.0]]
    assert merge("dare_ties", D1, D2, normalize=True).tolist() == [[18.0, 13.0, 32.0], [28.0, 54.0, 64.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lambda_zero_and_density_zero_are_the_base(name: str, dtype: torch.dtype):
    base, models = random_inputs((40, 50), dtype=dtype)
    for arguments in ({"lambda_": 0.0, "density": 0.3}, {"density": 0.0}, {"density": 1e-12}):
        merged = InMemory(base, models).merge(make_method(name, 3, weights=[0.3, -2, 1], **arguments), 70)
        assert_same_bits(merged.to(dtype), base)


def test_density_one_drops_nothing():
    """dare_linear is then task_arithmetic, dare_ties is ties without trimming and with a sum, bit for bit."""
    base, models = random_inputs((40, 50))
    memory = InMemory(base, models)
    arguments = {"weights": [0.3, -0.2, 1.1], "lambda_": 0.7}
    for name, twin, extra in (("dare_linear", "task_arithmetic", {}), ("dare_ties", "ties", {"density": 1.0})):
        for normalize in (False, True):
            one = make_method(name, 3, density=1.0, normalize=normalize, **arguments)
            other = make_method(twin, 3, normalize=normalize, **arguments, **extra)
            assert_same_bits(memory.merge(one), memory.merge(other))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_whole_model_at_weight_one_is_itself(name: str, dtype: torch.dtype):
    base, (model,) = random_inputs((400, 50), 1, dtype)
    lost = model.float().abs() < 2**-15 * base.float().abs()
    merged = InMemory(base, [model]).merge(make_method(name, 1, density=1.0), 70)
    assert_same_bits(merged.to(dtype), model, allow=lost)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.75])
def test_an_element_is_dropped_or_divided_by_the_density(name: str, density: float):
    """And on the whole nothing is lost: the sum stays, within five standard deviations."""
    d = torch.rand(300, 400, generator=torch.Generator().manual_seed(0)) + 0.5
    merged = InMemory(torch.zeros_like(d), [d]).merge(make_method(name, 1, density=density))
    kept = merged != 0
    assert_same_bits(merged[kept], d[kept] / density)
    deviation = (d.double().square().sum() * (1 - density) / density).sqrt()
    assert (merged.double().sum() - d.double().sum()).abs() < 5 * deviation


@pytest.mark.parametrize("name", NAMES)
def test_densities_are_the_models_own(name: str):
    base, models = random_inputs((50, 60))
    whole = InMemory(base, models[:1]).merge(make_method(name, 1, density=1.0))
    assert_same_bits(InMemory(base, models).merge(make_method(name, 3, density=[1.0, 0.0, 0.0])), whole)
    check_parity(name, base, models, density=[0.9, 0.5, 0.1])


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_leaves_a_model_out(name: str):
    base, models = random_inputs((31, 17))
    without = InMemory(base, models[:2]).merge(make_method(name, 2, weights=[0.6, 0.7]))
    assert_same_bits(InMemory(base, models).merge(make_method(name, 3, weights=[0.6, 0.7, 0.0])), without)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_models_changes_rounding_where_nothing_is_drawn_and_the_masks_elsewhere(name: str):
    base, models = random_inputs((64, 33))
    weights = [0.2, 0.7, 1.3]

    def both(density: float) -> tuple[torch.Tensor, torch.Tensor]:
        one = make_method(name, 3, weights=weights, density=density)
        other = make_method(name, 3, weights=weights[::-1], density=density)
        return InMemory(base, models).merge(one), InMemory(base, models[::-1]).merge(other)

    one, other = both(1.0)
    close = reference.election_is_close(base, models, weights=weights) & (name == "dare_ties")
    torch.testing.assert_close(one[~close], other[~close], rtol=0, atol=1e-7)
    one, other = both(0.5)
    assert ((one - other).abs() > 1e-5).double().mean() > 0.3, "masks belong to positions, not to models"


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_tensor_name_decide_the_masks(name: str):
    base, models = random_inputs((40, 50))

    def run(tensor: str, seed: int) -> torch.Tensor:
        return InMemory(base, models, tensor).merge(make_method(name, 3, seed=seed), 333)

    assert_same_bits(run("a", 0), run("a", 0))
    for tensor, seed in (("a", 1), ("a", -1), ("b", 0)):
        assert not torch.equal(run("a", 0), run(tensor, seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(name: str, shape: tuple[int, ...]):
    base, models = random_inputs(shape)
    for density in (0.0, 0.5, 1.0):
        arguments = {"weights": [0.3, 0.5, 0.9], "density": density}
        merged = [check_parity(name, base, models, block_elements=n, **arguments) for n in (1, 7, 1 << 17)]
        for other in merged[1:]:
            assert_same_bits(other, merged[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weights": [0.5, 0.3, 0.2], "density": [0.2, 0.5, 0.9], "lambda_": 1.5, "normalize": True},
        {"weights": [1.0, -0.4, 0.7], "density": 0.3, "seed": 12345678901234567890},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_reference(name: str, arguments: dict, dtype: torch.dtype):
    base, models = random_inputs((97, 61), 3, dtype)
    check_parity(name, base, models, block_elements=1000, **arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [shifted, flipped])
def test_parity_sees_a_wrong_formula(name: str, wrong):
    base, models = random_inputs((97, 61))
    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity(name, base, models, weights=[0.5, 0.3, 0.2], density=0.5, formula=wrong(name))


def test_parity_sees_masks_of_another_model():
    base, models = random_inputs((97, 61))

    def wrong(*tensors, masks, **arguments):
        return reference.dare_linear(*tensors, masks=masks[::-1], **arguments)

    with pytest.raises(AssertionError, match="not the rounded reference"):
        check_parity("dare_linear", base, models, density=0.5, formula=wrong)


def test_values_outside_their_ranges_are_refused():
    for name in NAMES:
        with pytest.raises(ArgumentError, match="density: expected a number in"):
            make_method(name, 1, density=1.5)
    with pytest.raises(ArgumentError, match="add up to 0"):
        make_method("dare_linear", 2, weights=[1.0, -1.0], normalize=True)
    make_method("dare_ties", 2, weights=[1.0, -1.0], normalize=True)  # it divides by those that agree
