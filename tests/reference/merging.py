"""The merge methods in plain float64, one whole tensor in memory at a time: what the engine is compared with.

Written from the formulas of NUMERICS.md and from nothing else; imports no code of this project. Slow on purpose.

Every method is `f(base, models, *, weights, density, lambda_, normalize, ...) -> float64 tensor`, and takes

    base: the base model's tensor, any float dtype.
    models: the fine-tuned tensors, in order, same shape.
    weights: one for each model, or one number for all (default 1).
    density: fraction kept, one for each model, or one number for all.
    lambda_: scales what is added to the base.

Arguments that belong to other methods are ignored, so that a test can pass the same to all. b, x_i, w_i and
d_i = x_i - b are float32 numbers, as the formulas say; from there on everything is float64, and nothing is rounded at
the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Numbers = float | Sequence[float]
NO_DIVISOR = 1e-8  # a sum of weights this near 0 counts as 1 where no signs are elected


def linear(
    base: Tensor | None, models: Sequence[Tensor], *, weights: Numbers = 1.0, normalize: bool = True, **unused: object
) -> Tensor:
    """sum w_i x_i, over sum w_i if `normalize`. The base has no part in it."""
    w = _float32_weights(weights, len(models))
    total = _total([w_i * x_i.float().double() for w_i, x_i in zip(w, models, strict=True)])
    return total / _sum_of_weights(w) if normalize else total


def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    **unused: object,
) -> Tensor:
    """b + lambda * sum w_i d_i (over sum w_i if `normalize`)."""
    return _add(base, task_vectors(base, models), weights=weights, lambda_=lambda_, normalize=normalize)


def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    density: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: str | None = None,
    **unused: object,
) -> Tensor:
    """Trim each task vector to its largest magnitudes, elect a sign, average the models that agree with it.

    Args:
        rescale: "l1" gives each trimmed task vector the l1 norm it had before, as mergekit does where asked to.
    """
    trimmed = _sparsified(base, models, None, density, rescale)
    return _add_elected(base, trimmed, weights=weights, lambda_=lambda_, normalize=normalize)


def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    weights: Numbers = 1.0,
    density: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: str | None = "density",
    **unused: object,
) -> Tensor:
    """Drop entries of each task vector where its mask is False, rescale what is kept, then as task_arithmetic.

    Args:
        masks: for each model a bool tensor, True = kept; None keeps all.
        rescale: "density" multiplies by 1 / density, "l1" restores the l1 norm as mergekit does, None leaves as is.
    """
    dropped = _sparsified(base, models, masks, density, rescale)
    return _add(base, dropped, weights=weights, lambda_=lambda_, normalize=normalize)


def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None],
    weights: Numbers = 1.0,
    density: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: str | None = "density",
    **unused: object,
) -> Tensor:
    """Drop and rescale as dare_linear, elect signs as ties; a sum, not a mean, by default."""
    dropped = _sparsified(base, models, masks, density, rescale)
    return _add_elected(base, dropped, weights=weights, lambda_=lambda_, normalize=normalize)


def widen(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
    is_embedding: bool = False,
    **unused: object,
) -> Tensor:
    """b + sum S_i d_i, where S_i says how much more than the others model i turned and stretched each column.

    Of a matrix the columns are scored, of an embedding the rows (its tokens), of a one-dimensional weight each element;
    a tensor of three dimensions is a stack of matrices (experts), each on its own.

    Args:
        ratio: columns that rank above `ratio` times the mean rank are important.
        calibration: the score that important columns get.
        is_embedding: score rows instead of columns.
    """
    if base.dim() > 2:
        stack = [
            widen(b, [x[k] for x in models], ratio=ratio, calibration=calibration, is_embedding=is_embedding)
            for k, b in enumerate(base)
        ]
        return torch.stack(stack) if stack else base.double()
    if is_embedding:
        transposed = widen(base.T, [x.T for x in models], ratio=ratio, calibration=calibration)
        return transposed.T.contiguous()
    deltas = task_vectors(base, models)
    if base.dim() < 2:
        score = scores_above([d.abs() for d in deltas], [ratio * d.abs().mean() for d in deltas], calibration)
    else:
        score = column_scores(base.float().double(), [x.float().double() for x in models], ratio, calibration)
    return base.double() + _total([s_i * d_i for s_i, d_i in zip(score, deltas, strict=True)])


METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "widen": widen,
}


# The steps


def task_vectors(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """d_i = x_i - b, subtracted in float32, as float64."""
    return [(x.float() - base.float()).double() for x in models]


def trim_mask(d: Tensor, density: float) -> Tensor:
    """True at the int(density * n) entries of largest |d| in float32; of equal ones the lower flat index is kept."""
    magnitude = d.detach().float().abs().flatten().numpy()
    order = np.argsort(-magnitude, kind="stable")  # stable: equals stay in the order of their index
    keep = np.zeros(magnitude.size, dtype=bool)
    keep[order[: int(density * magnitude.size)]] = True
    return torch.from_numpy(keep).reshape(d.shape)


def elect_sign(weighted: Sequence[Tensor]) -> Tensor:
    """+1 where the sum of the weighted task vectors is 0 or more, else -1."""
    return torch.where(_total(weighted) >= 0, 1.0, -1.0).double()


def election_is_close(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    density: Numbers = 1.0,
    masks: Sequence[Tensor | None] | None = None,
    rescale: str | None = None,
    margin: float = 1e-6,
    **unused: object,
) -> Tensor:
    """Where |sum D_i| <= margin * sum |D_i| (and not all are 0): float32 sums may elect the other sign than these do.

    Same arguments as `ties` (no masks) or `dare_ties`. Returns a bool tensor: elements to leave out of a comparison.
    """
    weighted = weighted_task_vectors(_sparsified(base, models, masks, density, rescale), weights)
    size = _total([D_i.abs() for D_i in weighted])
    return (_total(weighted).abs() <= margin * size) & (size > 0)


def weighted_task_vectors(d: Sequence[Tensor], weights: Numbers) -> list[Tensor]:
    """D_i = w_i d_i."""
    return [w_i * d_i for w_i, d_i in zip(_float32_weights(weights, len(d)), d, strict=True)]


def _add(base: Tensor, d: Sequence[Tensor], *, weights: Numbers, lambda_: float, normalize: bool) -> Tensor:
    mix = _total(weighted_task_vectors(d, weights))
    if normalize:
        mix = mix / _sum_of_weights(_float32_weights(weights, len(d)))
    return base.double() + lambda_ * mix


def _add_elected(base: Tensor, d: Sequence[Tensor], *, weights: Numbers, lambda_: float, normalize: bool) -> Tensor:
    weighted = weighted_task_vectors(d, weights)
    sign = elect_sign(weighted)
    agrees = [(torch.sign(D_i) == sign).double() for D_i in weighted]
    mix = _total([D_i * a_i for D_i, a_i in zip(weighted, agrees, strict=True)])
    if normalize:
        w = _float32_weights(weights, len(d))
        divisor = _total([w_i * a_i for w_i, a_i in zip(w, agrees, strict=True)])
        mix = mix / torch.where(divisor == 0, 1.0, divisor)
    return base.double() + lambda_ * mix


def _sparsified(
    base: Tensor,
    models: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    density: Numbers,
    rescale: str | None,
) -> list[Tensor]:
    """The task vectors, trimmed to their largest magnitudes (`masks` is None) or dropped by masks, then rescaled."""
    task_vector, rhos = task_vectors(base, models), _one_each(density, len(models))
    if masks is None:
        masks = [trim_mask(d, rho) for d, rho in zip(task_vector, rhos, strict=True)]
    return [
        d if mask is None else _rescaled(d, mask, rho, rescale)
        for d, mask, rho in zip(task_vector, masks, rhos, strict=True)
    ]


def _rescaled(d: Tensor, mask: Tensor, rho: float, rescale: str | None) -> Tensor:
    kept = torch.where(mask, d, 0.0)
    if rescale == "l1":
        before, after = d.abs().sum(), kept.abs().sum()
        return kept if min(before, after) < 1e-7 else kept * (before / after)
    if rescale == "density":
        return kept / rho if rho > 0 else torch.zeros_like(d)
    assert rescale is None, f"rescale: expected 'density', 'l1' or None, got {rescale!r}"
    return kept


def column_scores(base: Tensor, models: Sequence[Tensor], ratio: float, calibration: float) -> list[Tensor]:
    """The mean of the scores of both differences: of column norms, and of column directions."""
    m_b = base.norm(dim=0)
    norms = [x.norm(dim=0) for x in models]
    stretched = [(m_i - m_b).abs() for m_i in norms]
    turned = [_one_minus_cosine(base, x) for x in models]
    columns = base.shape[1]
    above = [ratio * (columns - 1) / 2] * len(models)  # the mean of the ranks 0 .. columns - 1
    scores = []
    for difference in (stretched, turned):
        ranks = [_rank(row) for row in difference]
        scores.append(scores_above(ranks, above, calibration, divide_by=columns))
    return [(of_norm + of_direction) / 2 for of_norm, of_direction in zip(*scores, strict=True)]


def _one_minus_cosine(base: Tensor, model: Tensor) -> Tensor:
    """Of each pair of columns; 0 where one of them is all zero, and exactly 0 where they are equal."""
    dot = (base * model).sum(dim=0)
    lengths = base.norm(dim=0) * model.norm(dim=0)
    difference = 1 - dot / torch.where(lengths == 0, 1.0, lengths)
    return torch.where((lengths == 0) | (base == model).all(dim=0), 0.0, difference)


def _rank(difference: Tensor) -> Tensor:
    """The position of each column in ascending order; equals keep the order of their index. Whole numbers."""
    order = np.argsort(difference.numpy(), kind="stable")
    rank = np.empty(order.size)
    rank[order] = np.arange(order.size)
    return torch.from_numpy(rank)


def scores_above(
    values: Sequence[Tensor], above: Sequence[float | Tensor], calibration: float, divide_by: int = 1
) -> list[Tensor]:
    """Softmax over models of values / divide_by; `calibration` where a model's own value is above its threshold."""
    softmax = torch.softmax(torch.stack(list(values)) / divide_by, dim=0)
    return [
        torch.where(value > limit, calibration, score)
        for value, limit, score in zip(values, above, softmax, strict=True)
    ]


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def _one_each(numbers: Numbers, count: int) -> list[float]:
    values = [float(numbers)] * count if isinstance(numbers, int | float) else [float(number) for number in numbers]
    assert len(values) == count, f"expected {count} numbers, got {len(values)}"
    return values


def _float32_weights(weights: Numbers, count: int) -> list[float]:
    """Weights are float32 numbers: 0.3 is 0.30000001192..., which decides signs where a sum is nearly 0."""
    return [float(np.float32(weight)) for weight in _one_each(weights, count)]


def _sum_of_weights(w: Sequence[float]) -> float:
    total = sum(w)
    return 1.0 if abs(total) < NO_DIVISOR else total
