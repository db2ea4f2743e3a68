"""Bounds on float32 arithmetic, doubtful elections and masks, for the references of the older methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reference import merging as reference
from tests.reference import more_merging as more
from tests.reference.of_method import FLOAT32_STEP
from tests.reference.random_mask import MODULUS, keep_mask, random_words

UNEQUAL: dict[str, Any] = {"weights": [0.7, 0.4, 1.1], "density": [0.3, 0.6, 0.9], "lambda_": 0.8}
"""Arguments that tell every model from every other."""


def rescale_rule(own: str | None = None) -> Callable[..., dict[str, Any]]:
    """Prepare arguments: `rescale` as references take it, where the method's own rule is `own`; and masks, where it draws."""

    def prepare(
        method: Any, tensor: Any, base: Tensor, models: Sequence[Tensor], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        arguments = arguments | {"rescale": {None: own, True: "l1", False: None}[arguments["rescale"]]}
        if not method.draws:
            return arguments
        densities = list(enumerate(arguments["density"]))
        if "epsilon" not in arguments:
            masks = [keep_mask(method.seed, tensor.name, i, tensor.shape, rho) for i, rho in densities]
            return arguments | {"masks": masks}
        deltas = reference.task_vectors(base, models)
        kept = [
            more.della_probabilities(deltas[i], rho, arguments["epsilon"][i] if 0 < rho < 1 else 0)
            for i, rho in densities
        ]
        flat = [
            random_words(method.seed, tensor.name, i, tensor.numel).astype(np.uint64)
            < np.round(one.flatten().numpy() * MODULUS)
            for i, one in enumerate(kept)
        ]
        return arguments | {"masks": [torch.from_numpy(mask).reshape(tensor.shape) for mask in flat]}

    return prepare


def close_election(name: str) -> Callable[..., Tensor]:
    """Where the election between thinned task vectors is close, for a method of `more_merging`."""

    def unclear(base: Tensor, models: Sequence[Tensor], **arguments: Any) -> Tensor:
        vectors = (
            reference.task_vectors(base, models) if name == "sce" else more.thinned(name, base, models, **arguments)
        )
        return reference.election_is_close(torch.zeros_like(vectors[0]), vectors, weights=arguments.get("weights", 1.0))

    return unclear


def of_steps(base: Tensor, models: Sequence[Tensor], result: Tensor, **arguments: Any) -> Tensor:
    """A bound on what one float32 rounding of each step can add up to, element by element, and twice that."""
    return _steps(reference.task_vectors(base, models), base.double().abs(), arguments)


def of_weights(base: Tensor, models: Sequence[Tensor], result: Tensor, **arguments: Any) -> Tensor:
    """The same, for sums of weights."""
    return _steps([model.double() for model in models], torch.zeros_like(base, dtype=torch.float64), arguments)


def _steps(terms: Sequence[Tensor], start: Tensor, arguments: dict[str, Any]) -> Tensor:
    count = len(terms)
    weights = arguments.get("weights", [max(1.0, arguments.get("calibration", 1.0))] * count)
    densities = arguments.get("density", [1.0] * count) if "masks" in arguments else [1.0] * count
    scaled = zip(weights, terms, densities, strict=True)
    reach = torch.stack([abs(w) * x.abs() / max(rho, 1e-9) for w, x, rho in scaled]).sum(dim=0)
    if arguments.get("normalize"):
        subsets = itertools.chain.from_iterable(itertools.combinations(weights, n) for n in range(1, count + 1))
        reach = reach / min([1.0, *(abs(sum(subset)) for subset in subsets if abs(sum(subset)) > 1e-6)])
    return 2 * (count + 4) * FLOAT32_STEP * (abs(arguments.get("lambda_", 1.0)) * reach + start)


def of_sums(name: str, *, weights_too: bool = False) -> Callable[..., Tensor]:
    """A bound for sums whose factors depend on the tensor: of what is added up, times how much it grows.

    Args:
        weights_too: weights are added up, not task vectors alone.
    """

    def slack(base: Tensor, models: Sequence[Tensor], result: Tensor, **arguments: Any) -> Tensor:
        added = [x.double().abs() for x in models] if weights_too else []
        added += [d.abs() for d in reference.task_vectors(base, models)]
        reach = torch.stack(added).sum(dim=0)
        weights = [abs(w) for w in arguments.get("weights", ())]
        growth = (
            max([1.0, *weights]) * max(1.0, abs(arguments.get("lambda_", 1.0))) / min([1.0, *(w for w in weights if w)])
        )
        if arguments.get("rescale") == "l1":
            before = [float(d.abs().sum()) for d in reference.task_vectors(base, models)]
            after = [float(d.abs().sum()) for d in more.thinned(name, base, models, **arguments | {"rescale": None})]
            growth *= max([1.0, *(one / other for one, other in zip(before, after, strict=True) if other)])
        if name == "model_stock" and base.numel():
            largest = float((result - base.double()).abs().max())
            growth *= max(1.0, largest / max(float(reach.max()), 1e-30))
        return 32 * FLOAT32_STEP * (growth * reach + base.double().abs())

    return slack
