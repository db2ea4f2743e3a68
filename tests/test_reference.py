"""The judges judged: the float64 reference, the mask reference, the goldens' loader and the pico models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden_files import (
    DTYPES,
    Golden,
    assert_same_bits,
    authors_masks,
    bernoulli_masks,
    golden,
    golden_names,
    goldens_by_method,
    load_tensors,
    relative_error,
    share_within_ulp,
    tensor_sha16,
    trim_is_ambiguous,
    ulp_distance,
)
from tests.pico import ARCHITECTURES, make_family, write_checkpoint
from tests.reference import merging, random_mask
from tests.reference.merging import METHODS, dare_linear, dare_ties, linear, task_arithmetic, ties, widen

Method = Callable[..., Tensor]

# Hand-worked examples. Three rows below are the base and what two fine-tunes add to it.

BASE = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
D1 = torch.tensor([[2.0, -1.0, 0.5], [0.0, -4.0, 1.0]])
D2 = torch.tensor([[-1.0, -3.0, 0.5], [1.0, 4.0, 0.0]])
MODELS = [BASE + D1, BASE + D2]


def assert_close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_linear_by_hand():
    # x_1 = [[3, 1, 3.5], [4, 1, 7]]   x_2 = [[0, -1, 3.5], [5, 9, 6]]
    # (1 x_1 + 3 x_2) / 4, for instance (3 + 0) / 4 = 0.75, (1 - 3) / 4 = -0.5, (7 + 18) / 4 = 6.25
    assert_close(linear(BASE, MODELS, weights=[1, 3]), [[0.75, -0.5, 3.5], [4.75, 7.0, 6.25]])
    assert_close(linear(None, MODELS, weights=[1, 3], normalize=False), [[3.0, -2.0, 14.0], [19.0, 28.0, 25.0]])


def test_task_arithmetic_by_hand():
    # 1 d_1 + 3 d_2 = [[-1, -10, 2], [3, 8, 1]]; times lambda 0.5, plus the base
    assert_close(task_arithmetic(BASE, MODELS, weights=[1, 3], lambda_=0.5), [[0.5, -3.0, 4.0], [5.5, 9.0, 6.5]])
    # normalised: that sum over 4 is [[-0.25, -2.5, 0.5], [0.75, 2, 0.25]]
    normalized = task_arithmetic(BASE, MODELS, weights=[1, 3], normalize=True)
    assert_close(normalized, [[0.75, -0.5, 3.5], [4.75, 7.0, 6.25]])


def test_ties_by_hand():
    # density 0.5 of 6 elements keeps 3.
    # d_1 keeps -4, 2 and the first of the two magnitudes 1:  [[ 2, -1, 0], [0, -4, 0]]
    # d_2 keeps 4, -3 and the first of the two magnitudes 1:  [[-1, -3, 0], [0,  4, 0]]
    # weights 1 and 2, D_1 + D_2:                             [[ 0, -7, 0], [0,  4, 0]], signs + - + + + +
    # who agrees:  element (0, 0) only model 1;  (0, 1) both;  (1, 1) only model 2
    # mean:        2 / 1 = 2;                    -7 / 3;       8 / 2 = 4
    assert_close(ties(BASE, MODELS, weights=[1, 2], density=0.5), [[3.0, 2 - 7 / 3, 3.0], [4.0, 9.0, 6.0]])
    # a sum, and half of it: 2 -> 1, -7 -> -3.5, 8 -> 4
    summed = ties(BASE, MODELS, weights=[1, 2], density=0.5, normalize=False, lambda_=0.5)
    assert_close(summed, [[2.0, -1.5, 3.0], [4.0, 9.0, 6.0]])


def test_ties_of_a_negative_weight_by_hand():
    # D_1 = d_1, D_2 = -0.5 d_2: sums [[2.5, 0.5, 0.25], [-0.5, -6, 1]], signs + + + - - +
    # agree: (0,0) both, (0,1) model 2, (0,2) model 1, (1,0) model 2, (1,1) both, (1,2) model 1
    # over the sum of their weights: 2.5 / 0.5, 1.5 / -0.5, 0.5 / 1, -0.5 / -0.5, -6 / 0.5, 1 / 1
    expected = [[1 + 5.0, 2 - 3.0, 3 + 0.5], [4 + 1.0, 5 - 12.0, 6 + 1.0]]
    assert_close(ties(BASE, MODELS, weights=[1, -0.5]), expected)


def test_trim_keeps_the_lower_index_of_equal_magnitudes():
    d = torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 4)
    # int(0.6 * 16) = 9 of 16 equal magnitudes: the first two rows and one more
    kept = merging.trim_mask(d, 0.6)
    assert kept.flatten().tolist() == [True] * 9 + [False] * 7
    d[3, 3], d[3, 2] = 2.0, 1 + 2**-30  # the second is 1 in float32
    assert merging.trim_mask(d, 0.6).flatten().tolist() == [True] * 8 + [False] * 7 + [True]
    assert merging.trim_mask(d, 0).sum() == 0
    assert merging.trim_mask(d, 1).sum() == 16


def test_dare_linear_by_hand():
    masks = [torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), torch.tensor([[0, 1, 1], [0, 1, 1]]).bool()]
    # kept, times 1 / 0.5:  [[4, 0, 1], [0, -8, 0]]   [[0, -6, 1], [0, 8, 0]]
    # 1 and 2 times:        [[4, -12, 3], [0, 8, 0]]
    result = dare_linear(BASE, MODELS, weights=[1, 2], density=0.5, masks=masks)
    assert_close(result, [[5.0, -10.0, 6.0], [4.0, 13.0, 6.0]])
    # not rescaled: half of that
    result = dare_linear(BASE, MODELS, weights=[1, 2], density=0.5, masks=masks, rescale=None)
    assert_close(result, [[3.0, -4.0, 4.5], [4.0, 9.0, 6.0]])
    # l1: |d_1| sums to 8.5, kept 6.5; |d_2| to 9.5, kept 7.5
    result = dare_linear(BASE, MODELS, density=0.5, masks=masks, rescale="l1")
    r1, r2 = 8.5 / 6.5, 9.5 / 7.5
    assert_close(result, [[1 + 2 * r1, 2 - 3 * r2, 3 + 0.5 * (r1 + r2)], [4.0, 5 - 4 * r1 + 4 * r2, 6.0]])


def test_dare_ties_by_hand():
    masks = [torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()]
    # times 2:        [[4, 0, 1], [0, -8, 0]]   [[-2, -6, 0], [0, 8, 0]]
    # weights 1, 2:   D_2 = [[-4, -12, 0], [0, 16, 0]]; sums 0, -12, 1, 0, 8, 0: signs + - + + + +
    # agreeing, sum:  [[4, -12, 1], [0, 16, 0]]
    result = dare_ties(BASE, MODELS, weights=[1, 2], density=0.5, masks=masks)
    assert_close(result, [[5.0, -10.0, 4.0], [4.0, 21.0, 6.0]])
    # over the weights of the agreeing: 4 / 1, -12 / 2, 1 / 1, 16 / 2
    result = dare_ties(BASE, MODELS, weights=[1, 2], density=0.5, masks=masks, normalize=True)
    assert_close(result, [[5.0, -4.0, 4.0], [4.0, 13.0, 6.0]])


WIDEN_BASE = torch.tensor([[3.0, 0.0, 2.0], [4.0, 1.0, 0.0]])  # column norms 5, 1, 2
WIDEN_MODELS = [
    torch.tensor([[6.0, 1.0, 2.0], [8.0, 0.0, 0.0]]),  # stretches column 0, turns column 1 by 90 degrees
    torch.tensor([[3.0, 0.0, 0.0], [4.0, 3.0, 2.0]]),  # stretches column 1, turns column 2 by 90 degrees
]
# norms differ by (5, 0, 0) and (0, 2, 0): positions (2, 0, 1) and (0, 2, 1), ranks are a third of it, their mean 1/3.
# 1 - cosine is   (0, 1, 0) and (0, 0, 1): positions (0, 2, 1) and (0, 1, 2).
# Position 2 is above the mean and scores 1. Else the softmax, with p = 1 / (1 + e^(2/3)), q = 1 / (1 + e^(1/3)):
#   norms      (1, p, 1/2)   (p, 1, 1/2)
#   direction  (1/2, 1, q)   (1/2, q, 1)
P, Q = 1 / (1 + math.exp(2 / 3)), 1 / (1 + math.exp(1 / 3))
S1, S2 = [0.75, (P + 1) / 2, (0.5 + Q) / 2], [(P + 0.5) / 2, (1 + Q) / 2, 0.75]
# d_1 = [[3, 1, 0], [4, -1, 0]], d_2 = [[0, 0, -2], [0, 2, 2]]
WIDEN_RESULT = [[3 + 3 * S1[0], S1[1], 2 - 2 * S2[2]], [4 + 4 * S1[0], 1 - S1[1] + 2 * S2[1], 2 * S2[2]]]


def test_widen_by_hand():
    assert_close(widen(WIDEN_BASE, WIDEN_MODELS), WIDEN_RESULT)
    assert WIDEN_RESULT[0] == pytest.approx([5.25, 0.669622, 0.5], abs=1e-6)
    assert WIDEN_RESULT[1] == pytest.approx([7.0, 1.747808, 1.5], abs=1e-6)


def test_widen_scores_the_rows_of_an_embedding_and_each_matrix_of_a_stack():
    expected = torch.tensor(WIDEN_RESULT).double()
    embedding = widen(WIDEN_BASE.T, [x.T for x in WIDEN_MODELS], is_embedding=True)
    assert_close(embedding, expected.T.tolist())
    other = WIDEN_BASE.flip(1)
    stacked = widen(torch.stack([WIDEN_BASE, other]), [torch.stack([x, other]) for x in WIDEN_MODELS])
    assert_close(stacked[0], WIDEN_RESULT)
    assert torch.equal(stacked[1], other.double())


def test_widen_of_a_vector_by_hand():
    # |d_1| = 1, 0, 2 of mean 1: the 2 scores `calibration`. |d_2| = 1, 1, 1: nothing is above its mean.
    # softmax: (1/2, 1/2); (., e / (1 + e)); (., e / (e + e^2) = 1 / (1 + e))
    base = torch.tensor([1.0, 1.0, 1.0])
    models = [base + torch.tensor([1.0, 0.0, -2.0]), base + 1]
    r = 1 / (1 + math.e)
    assert_close(widen(base, models), [1 + 0.5 + 0.5, 1 + (1 - r), 1 - 2 + r])
    assert_close(widen(base, models, calibration=0.0), [2.0, 1 + (1 - r), 1 + r])
    # ratio 2: 2 is not above 2 * 1 either, its softmax is e^2 / (e + e^2) = 1 - r
    assert_close(widen(base, models, ratio=2.0), [2.0, 1 + (1 - r), 1 - 2 * (1 - r) + r])


def test_widen_of_zero_columns_is_finite():
    base = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])
    result = widen(base, [base + torch.tensor([0.0, 0.5, 0.5]), base])
    assert result.isfinite().all()
    assert torch.equal(result[:, 0], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_laws(method: str):
    masks = [torch.rand(2, 3) < 0.5 for _ in MODELS]
    run = METHODS[method]
    if method != "linear":
        same = run(BASE, [BASE, BASE], masks=masks, density=0.5)
        assert torch.equal(same, BASE.double()), "models equal to the base give the base"
    if method not in ("linear", "widen"):
        assert torch.equal(run(BASE, MODELS, lambda_=0, masks=masks, density=0.5), BASE.double())
    alone = run(BASE, MODELS[:1], masks=[None])
    if method != "widen":
        assert_close(alone, MODELS[0].tolist())


# Against the goldens


def masks_of(of: Golden) -> dict[str, list[Tensor | None]] | None:
    if of.seed is None:
        return {name: [None] * len(of.models) for name in of.hashes} if of.method.startswith("dare") else None
    shapes = {name: known.shape for name, known in of.hashes.items()}
    return bernoulli_masks(of.seed, shapes, of.densities, of.dtype)


def compare(of: Golden, method: Method | None = None) -> None:
    """Compare the stored tensors of a golden with a float64 method, as strictly as the golden's arithmetic allows."""
    method = method or METHODS[of.method]
    sources, masks = of.load_inputs(), masks_of(of)
    near, exact = [], []
    for name, expected in of.kept.items():
        base = sources["base"][name]
        models = [sources[model][name][: base.shape[0]] for model in of.models]
        arguments = {"weights": of.weights, "density": of.densities, "rescale": of.rescale}
        arguments["masks"] = masks[name] if masks else None
        result = method(base, models, lambda_=of.lambda_, normalize=of.normalize, **arguments)
        unclear = torch.zeros(base.shape, dtype=torch.bool)
        if of.method == "ties":
            unclear |= trim_is_ambiguous(base, models, of.densities, of.dtype)
        if of.method.endswith("ties") and of.dtype == torch.float32:
            unclear |= merging.election_is_close(base, models, **arguments)
        rows = of.rows[name]
        clear = ~unclear[rows]
        ours, theirs = result[rows][clear], expected[clear]
        if expected.dtype == torch.float32:
            # float32 rounding of every step: 2^-24 each; the l1 norms of mergekit are float32 sums
            bound = (2e-6 if of.rescale else 3e-7) * (base[rows][clear].double().abs() + ours.abs()) + 1e-12
            worst = ((ours - theirs.double()).abs() / bound).max().item()
            assert worst <= 1, f"{of.name}: {name}: {worst:.1f} times the tolerance"
        else:
            near.append(ulp_distance(ours.to(expected.dtype), theirs) <= 1)
            exact.append(ours.to(expected.dtype) == theirs)
    if near:
        shares = torch.cat(near).double().mean().item(), torch.cat(exact).double().mean().item()
        wanted = (1.0, 0.999) if of.dtype == torch.float32 else (0.98, 0.0)
        if shares[0] < wanted[0] or shares[1] < wanted[1]:
            raise AssertionError(f"{of.name}: {shares} of the elements within 1 ulp and exact, not {wanted}")


COMPARED = [
    name
    for name in golden_names("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    if "union" not in name
]


@pytest.mark.parametrize("name", COMPARED)
def test_reference_agrees_with_golden(name: str):
    compare(golden(name))


def test_reference_agrees_with_the_union_golden():
    """A token that one model alone has is given to all others, base too, as that model's row."""
    of = golden("pad_union_ta_f32")
    sources = of.load_inputs()
    for name, expected in of.kept.items():
        rows = of.hashes[name].shape[0]
        donor = sources["instruct_pad"][name]
        base, *models = [torch.cat([sources[key][name], donor[sources[key][name].shape[0] : rows]]) for key in sources]
        result = task_arithmetic(base, models, weights=of.weights).to(expected.dtype)
        assert share_within_ulp(result[of.rows[name]], expected, ulps=0) > 0.999


def test_dare_agrees_with_its_authors_rule():
    """Kept entries times 1 / density. The authors round twice on the way (a model in bf16, its task vector in bf16)."""
    of = golden("authors_mask_merging", "aim")
    sources, masks = of.load_inputs(), authors_masks(of)
    near = []
    for name, expected in of.kept.items():
        models = [sources[model][name] for model in of.models]
        result = dare_linear(sources["base"][name], models, density=0.5, masks=masks[name])
        near.append(ulp_distance(result[of.rows[name]].to(expected.dtype), expected).flatten() <= 1)
    assert torch.cat(near).double().mean() > 0.99


def test_widen_agrees_with_the_float32_golden():
    of = golden("widen_f32load", "aim")
    sources = of.load_inputs()
    for name, expected in of.kept.items():
        base, models = sources["base"][name], [sources[model][name] for model in of.models]
        result = widen(base, models, is_embedding="embed" in name)[of.rows[name]]
        delta = base[of.rows[name]].double()
        bound = 1e-2 if expected.dim() > 1 else 1e-5
        assert relative_error(result - delta, expected - delta) <= bound, name


# The comparison has teeth


def shifted(method: Method) -> Method:
    return lambda base, models, **arguments: method(base, [*models[1:], models[0]], **arguments)


def flipped(method: Method) -> Method:
    return lambda base, models, **arguments: 2 * base.double() - method(base, models, **arguments)


UNEQUAL = [name for name in COMPARED if "aimdefault" not in name and "dare_ties_d01" not in name]


@pytest.mark.parametrize("name", UNEQUAL)
def test_comparison_sees_a_shifted_model_order(name: str):
    of = golden(name)
    with pytest.raises(AssertionError):
        compare(of, shifted(METHODS[of.method]))


@pytest.mark.parametrize("name", [name for name in COMPARED if "linear_w" not in name and name != "pad_linear_f32"])
def test_comparison_sees_a_flipped_delta(name: str):
    of = golden(name)
    with pytest.raises(AssertionError):
        compare(of, flipped(METHODS[of.method]))


@pytest.mark.parametrize("name", golden_names("ties", "dare_ties"))
def test_comparison_sees_a_flipped_election(name: str, monkeypatch: pytest.MonkeyPatch):
    right = merging.elect_sign
    monkeypatch.setattr(merging, "elect_sign", lambda weighted: -right(weighted))
    with pytest.raises(AssertionError):
        compare(golden(name))


def test_comparison_sees_a_flipped_sum_of_linear():
    of = golden("linear_w_f32")
    with pytest.raises(AssertionError):
        compare(of, lambda base, models, **arguments: -linear(base, models, **arguments))


def test_comparison_sees_a_widen_that_scores_the_wrong_model(monkeypatch: pytest.MonkeyPatch):
    right = merging.column_scores
    monkeypatch.setattr(merging, "column_scores", lambda *arguments: right(*arguments)[::-1])
    with pytest.raises(AssertionError):
        test_widen_agrees_with_the_float32_golden()


# Random masks


def test_mask_words_are_pinned():
    """These bits are promised: a change of the hash changes every DARE merge that anyone has made."""
    words = [
        random_mask.random_word(0, "model.layers.0.mlp.down_proj.weight", 1, index) for index in (0, 1, 2, 1 << 32)
    ]
    assert words == PINNED_WORDS
    assert random_mask.keys(0, "a", 0, 0) == PINNED_KEYS


PINNED_WORDS = [3754767723, 1880715394, 1258219312, 2518033824]
PINNED_KEYS = (1453234907, 2883956916)


@pytest.mark.parametrize("start", [0, 12345, (1 << 32) - 40, (5 << 32) - 1])
def test_mask_array_equals_mask_of_each_element(start: int):
    arguments = (7, "lm_head.weight", 2)
    words = random_mask.random_words(*arguments, 100, start)
    assert words.tolist() == [random_mask.random_word(*arguments, start + offset) for offset in range(100)]
    mask = random_mask.keep_mask(*arguments, (4, 25), 0.3, start)
    assert mask.flatten().tolist() == [random_mask.is_kept(*arguments, start + offset, 0.3) for offset in range(100)]


def test_mask_ends_and_keys():
    assert random_mask.keep_mask(0, "w", 0, (1000,), 1.0).all()
    assert not random_mask.keep_mask(0, "w", 0, (1000,), 0.0).any()
    masks = [random_mask.keep_mask(*key, (1000,), 0.5) for key in [(0, "w", 0), (1, "w", 0), (0, "v", 0), (0, "w", 1)]]
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    nested = random_mask.keep_mask(0, "w", 0, (1000,), 0.2)
    assert (masks[0] | ~nested).all(), "what a lower density keeps, a higher one keeps"


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_mask_looks_random(density: float):
    """Counts, neighbours in rows and columns, and pairs of models, each within five standard deviations."""
    size = 1024
    masks = [random_mask.keep_mask(0, "model.layers.0.mlp.up_proj.weight", i, (size, size), density) for i in range(2)]
    first, second = (((mask.double() - density) / (density * (1 - density)) ** 0.5).numpy() for mask in masks)
    n = size * size
    assert abs(first.sum()) < 5 * n**0.5
    assert abs((first * second).sum()) < 5 * n**0.5
    flat = first.reshape(-1)
    for lag in [*range(1, 9), *(1 << bit for bit in range(4, 18)), 5120, 13824, 14336, 28672]:
        assert abs(np.dot(flat[:-lag], flat[lag:])) < 5 * n**0.5, lag
    for axis in (0, 1):
        chi2 = (first.sum(axis=axis) ** 2 / size).sum()
        assert abs(chi2 - size) < 5 * (2 * size) ** 0.5


# Loader and comparison helpers


def test_every_golden_loads_and_its_whole_tensors_have_their_digest():
    assert sum(len(names) for names in goldens_by_method().values()) == len(golden_names()) == 40
    for name in golden_names():
        of = golden(name)
        assert len(of.hashes) in (12, 21)
        for tensor_name, values in of.kept.items():
            sha16, dtype, shape = of.hashes[tensor_name]
            assert values.dtype == DTYPES[dtype]
            if tuple(values.shape) == shape:
                assert tensor_sha16(values) == sha16
                of.check(tensor_name, values)


def test_stored_rows_are_where_the_loader_says():
    """Of a merged checkpoint that is here as a whole, the rows are the stored ones."""
    of = golden("ta_aimdefault")
    whole = load_tensors(of.inputs.parent / "merged" / "ta_aimdefault")
    for name in of.hashes:
        of.check(name, whole[name])
    broken = whole["lm_head.weight"].clone()
    broken[0, 0] += 1  # not among the stored rows
    with pytest.raises(AssertionError, match="outside the stored rows"):
        of.check("lm_head.weight", broken)


def test_same_bits_is_strict():
    zero = torch.zeros(2, 2)
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ, the first at \(1, 0\)"):
        assert_same_bits(torch.tensor([[0.0, 0.0], [-0.0, 0.0]]), zero)
    with pytest.raises(AssertionError, match="expected"):
        assert_same_bits(zero.bfloat16(), zero)
    assert_same_bits(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), zero, allow=torch.tensor([[False, True], [False, False]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ulp_distance(dtype: torch.dtype):
    zero, one, eps = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype), torch.finfo(dtype).eps
    assert ulp_distance(zero, -zero).item() == 0
    assert ulp_distance(one, one + 2 * eps).item() == 2
    assert ulp_distance(one, one - eps).item() == 2, "below a power of two the steps are half as long"
    assert ulp_distance(-one, -one - eps).item() == 1
    smallest = torch.finfo(dtype).smallest_normal * eps  # the smallest subnormal number
    assert ulp_distance(zero + smallest, zero - smallest).item() == 2
    assert share_within_ulp(torch.cat([one, one]), torch.cat([one, one + 2 * eps])) == 0.5


def test_trim_is_ambiguous_only_where_equals_are_cut():
    base, model = torch.zeros(6), torch.tensor([3.0, 1.0, -1.0, 1.0, 0.5, 2.0])
    assert trim_is_ambiguous(base, [model], [0.5], torch.float32).tolist() == [False, True, True, True, False, False]
    assert not trim_is_ambiguous(base, [model], [5 / 6], torch.float32).any()
    assert not trim_is_ambiguous(base, [model], [1.0], torch.float32).any()


# Pico models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pico_family_loads(tmp_path, architecture: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family = make_family(tmp_path, architecture, n_models=1)
    model, report = AutoModelForCausalLM.from_pretrained(family.models[0], output_loading_info=True)
    assert not any(report.values()), report
    inputs = AutoTokenizer.from_pretrained(family.base)("merge", return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    base, tuned = load_tensors(family.base), load_tensors(family.models[0])
    assert [(name, t.shape, t.dtype) for name, t in base.items()] == [(n, t.shape, t.dtype) for n, t in tuned.items()]
    stays = torch.cat([(base[name] == tuned[name]).flatten() for name in base]).double().mean()
    assert 0.1 < stays < 0.8
    assert 0.005 < max(relative_error(tuned[name], base[name]) for name in base) < 0.1


def test_pico_family_is_reproducible_and_shards(tmp_path):
    one = make_family(tmp_path / "one", "mixtral", n_models=1)
    two = make_family(tmp_path / "two", "mixtral", n_models=1, max_shard_size="20KB")
    files = sorted(two.models[0].glob("*.safetensors"))
    assert len(files) > 1
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_tensors(one.models[0])
    assert parts.keys() == whole.keys()
    for name in whole:
        assert_same_bits(parts[name], whole[name])


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_write_checkpoint(tmp_path, weights: str, shards: int):
    tensors = {"b": torch.ones(3, 4), "a": torch.zeros(()), "c": torch.arange(5), "d": torch.zeros(0)}
    folder = write_checkpoint(tmp_path / "odd", tensors, shards=shards, weights=weights)
    stem = "model" if weights == "safetensors" else "pytorch_model"
    index = {f"{stem}.{weights}.index.json"} if shards > 1 else set()
    numbered = {f"{stem}-0000{i}-of-00003.{weights}" for i in (1, 2, 3)} if shards > 1 else {f"{stem}.{weights}"}
    assert {path.name for path in folder.iterdir()} == numbered | index | {"config.json"}
    read = [
        load_file(path) if weights == "safetensors" else torch.load(path) for path in map(folder.joinpath, numbered)
    ]
    assert {name for part in read for name in part} == set(tensors)
    for part in read:
        for name, tensor in part.items():
            assert_same_bits(tensor, tensors[name], where=name)
