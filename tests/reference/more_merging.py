"""The methods that came with mergekit's recipes in plain float64, one whole tensor in memory at a time.

As `merging.py` beside it, written from the formulas alone; every tensor is treated as the vectors that the formulas speak
of, where the engine works with scalar products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.reference.merging import (
    Numbers,
    _add,
    _add_elected,
    _float32_weights,
    _one_each,
    _rescaled,
    _total,
    elect_sign,
    task_vectors,
)


def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    **thin: object,
) -> Tensor:
    """Keep int(density n) entries of each task vector after the int(gamma n) largest, then as task_arithmetic."""
    return _add(
        base, thinned("breadcrumbs", base, models, **thin), weights=weights, lambda_=lambda_, normalize=normalize
    )


def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    **thin: object,
) -> Tensor:
    """The same, with signs elected."""
    d = thinned("breadcrumbs_ties", base, models, **thin)
    return _add_elected(base, d, weights=weights, lambda_=lambda_, normalize=normalize)


def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
    **thin: object,
) -> Tensor:
    """Keep what the masks say, restore the l1 norms, elect signs, average."""
    return _add_elected(
        base, thinned("della", base, models, **thin), weights=weights, lambda_=lambda_, normalize=normalize
    )


def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
    **thin: object,
) -> Tensor:
    """Keep what the masks say, restore the l1 norms, add up."""
    return _add(
        base, thinned("della_linear", base, models, **thin), weights=weights, lambda_=lambda_, normalize=normalize
    )


def thinned(
    name: str,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: Numbers = 1.0,
    gamma: Numbers = 0.01,
    masks: Sequence[Tensor | None] | None = None,
    rescale: str | None = None,
    **unused: object,
) -> list[Tensor]:
    """The task vectors with what is dropped set to 0, rescaled."""
    found = []
    for index, d in enumerate(task_vectors(base, models)):
        rho = _one_each(density, len(models))[index]
        if rho >= 1:
            found.append(d)
            continue
        if name.startswith("breadcrumbs"):
            mask = middle_mask(d, rho, _one_each(gamma, len(models))[index])
        else:
            assert masks is not None
            mask = masks[index] if masks[index] is not None else torch.ones_like(d, dtype=torch.bool)
        found.append(_rescaled(d, mask, rho, rescale))
    return found


def middle_mask(d: Tensor, density: float, gamma: float) -> Tensor:
    """True at the int(density n) entries that follow the int(gamma n) largest; of equal ones the lower index is larger."""
    magnitude = d.float().abs().flatten().numpy()
    n = magnitude.size
    kept = int(density * n)
    top = min(int(gamma * n), n - kept)
    order = np.argsort(-magnitude, kind="stable")
    keep = np.zeros(n, dtype=bool)
    keep[order[top : top + kept]] = True
    return torch.from_numpy(keep).reshape(d.shape)


def della_probabilities(d: Tensor, density: float, epsilon: float) -> Tensor:
    """For each entry its probability of being kept: by its rank in its row, equal entries share the mean of their ranks."""
    columns = max(1, d.shape[-1]) if d.dim() else 1
    found = []
    for row in d.float().abs().reshape(-1, columns).tolist():
        ordered = sorted(row)
        first = {value: ordered.index(value) for value in row}
        ranks = [first[value] + (row.count(value) - 1) / 2 for value in row]
        places = [rank / (columns - 1) if columns > 1 else 0.5 for rank in ranks]
        found.append([density - epsilon + 2 * epsilon * place for place in places])
    return torch.tensor(found, dtype=torch.float64).reshape(d.shape)


def sce(base: Tensor, models: Sequence[Tensor], *, select_topk: float = 1.0, **unused: object) -> Tensor:
    """Select entries by variance over the models, weigh the models by mean square, erase minority signs."""
    d = task_vectors(base, models)
    if base.numel() == 0:
        return base.double()
    if select_topk < 1:
        variance = torch.stack(d).var(dim=0, unbiased=False).float()
        order = np.argsort(-variance.flatten().numpy(), kind="stable")
        keep = np.zeros(order.size, dtype=bool)
        keep[order[: int(select_topk * int((variance > 0).sum()))]] = True
        d = [torch.where(torch.from_numpy(keep).reshape(base.shape), d_i, 0.0) for d_i in d]
    squares = [float(d_i.square().mean()) for d_i in d]
    total = sum(squares)
    weights = [square / total for square in squares] if total >= 1e-6 else [1 / len(d)] * len(d)
    sign = elect_sign(d)
    agrees = [(torch.sign(d_i) == sign).double() for d_i in d]
    mix = _total([w_i * d_i * a_i for w_i, d_i, a_i in zip(weights, d, agrees, strict=True)])
    divisor = _total([w_i * a_i for w_i, a_i in zip(weights, agrees, strict=True)])
    return base.double() + mix / divisor.clamp(min=1e-6)


def slerp(base: Tensor, models: Sequence[Tensor], *, t: float = 0.5, **unused: object) -> Tensor:
    """From base to model on the arc; straight where they are nearly colinear."""
    x, y = base.float().double(), models[0].float().double()
    u, v = (vector / vector.norm() if vector.norm() > 1e-8 else vector for vector in (x, y))
    dot = float((u * v).sum())
    if abs(dot) > 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(dot)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weights: Numbers = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
    **unused: object,
) -> Tensor:
    """Between two task vectors (without a base: two weights) on the arc; whole, by row, or by column (`row_wise`)."""
    x, y = [m.float().double() for m in models] if base is None else task_vectors(base, models)
    first, second = _one_each(weights, 2)
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    rows = [vector.reshape(1, -1) if flatten or vector.dim() < 2 else vector for vector in (x, y)]
    if row_wise and rows[0] is x:
        rows = [vector.transpose(-1, -2) for vector in rows]
    merged = torch.empty_like(rows[0])
    for index in itertools.product(*(range(size) for size in rows[0].shape[:-1])):
        merged[index] = _arc(rows[0][index], rows[1][index], t)
    if row_wise and not flatten and x.dim() >= 2:
        merged = merged.transpose(-1, -2)
    out = merged.reshape(x.shape)
    return out if base is None else base.double() + out


def _arc(x: Tensor, y: Tensor, t: float) -> Tensor:
    u, v = (vector / max(float(vector.norm()), 1e-7) for vector in (x, y))
    angle = math.acos(max(-1.0, min(1.0, float((u * v).sum()))))
    if abs(math.sin(angle)) < 1e-6:
        return (1 - t) * x + t * y
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def karcher(
    base: Tensor | None, models: Sequence[Tensor], *, max_iter: int = 10, tol: float = 1e-5, **unused: object
) -> Tensor:
    """The Karcher mean of the directions, as long as the models are on average."""
    x = [m.float().double() for m in models]
    norms = [float(vector.norm()) for vector in x]
    units = [vector / norm for vector, norm in zip(x, norms, strict=True) if norm > tol]
    if not units:
        return torch.zeros_like(x[0])
    mean = _total(units) / len(units)
    mean = units[0] if mean.norm() < tol else mean
    mean = mean / mean.norm()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = max(-1.0, min(1.0, float((mean * unit).sum())))
            angle = math.acos(dot)
            if tol <= angle <= math.pi - 1e-6:
                tangent += angle / math.sin(angle) * (unit - dot * mean) / len(units)
        size = float(tangent.norm())
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean = mean / mean.norm()
    return sum(norms) / len(norms) * mean


def model_stock(base: Tensor, models: Sequence[Tensor], *, filter_wise: bool = False, **unused: object) -> Tensor:
    """Towards the mean of the models, by the mean cosine between their task vectors."""
    d = [d_i.reshape(1, -1) if not filter_wise or base.dim() < 2 else d_i for d_i in task_vectors(base, models)]
    count = len(d)
    cosines = [
        ((one * other).sum(dim=-1) / (one.norm(dim=-1) * other.norm(dim=-1)).clamp(min=1e-6)).clamp(-1, 1)
        for one, other in itertools.combinations(d, 2)
    ]
    c = _total(cosines) / len(cosines)
    divisor = 1 + (count - 1) * c
    t = torch.where(divisor > 1e-6, count * c / divisor, 0.0).unsqueeze(-1)
    return base.double() + (t * _total(d) / count).reshape(base.shape)


def passthrough(base: Tensor | None, models: Sequence[Tensor], *, weights: Numbers = 1.0, **unused: object) -> Tensor:
    """The one model, scaled."""
    (scale,) = _float32_weights(weights, 1)
    return scale * models[0].float().double()


METHODS: dict[str, Callable[..., Tensor]] = {
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "della": della,
    "della_linear": della_linear,
    "sce": sce,
    "model_stock": model_stock,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "karcher": karcher,
    "passthrough": passthrough,
}
