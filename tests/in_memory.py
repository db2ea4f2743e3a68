"""One tensor in memory, cut into blocks as the engine cuts it: methods without files, threads or the engine.

    ours = InMemory(base, models).merge(make_method("ties", 2, weights=[1, 2], density=0.5), block_elements=7)
    check_parity("ties", base, models, weights=[1, 2], density=0.5)      # against tests/reference, or AssertionError

Nothing here knows a formula: what is right comes from tests/reference.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merging.methods import METHODS, get_method
from merging.methods.contract import Method
from merging.parameters import PARAMETERS
from streaming import blocks
from streaming.blocks import Block, Region, TensorSpec, tile
from tests.reference import merging as reference
from tests.reference import more_merging as more
from tests.reference.random_mask import MODULUS, keep_mask, random_words

Numbers = float | Sequence[float]
FLOAT32_STEP = 2.0**-24

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (0,), (7,), (1, 1), (1, 9), (9, 1), (3, 5), (0, 4), (4, 0), (2, 3, 4), (2, 0, 3), (0, 2, 3), (2, 3, 1, 5),
]  # fmt: skip
"""Every kind of boundary: no dimension, one element, none, one row, one column, stacks, stacks of nothing."""


class InMemory:
    """A tensor of a base model and of its fine-tunes.

    Attributes:
        tensor: what the methods see of it.
        scans: the regions of each call of `scan` so far, in order.
    """

    def __init__(self, base: Tensor, models: Sequence[Tensor], name: str = "w", is_embedding: bool = False):
        self.tensor = TensorSpec(name, tuple(base.shape), is_embedding)
        self.scans: list[list[Region]] = []
        self._method: Method | None = None
        self._base = base.float().flatten()
        self._models = [model.float().flatten() for model in models]

    def block(self, region: Region, method: Method | None = None) -> Block:
        """The numbers of a region as a method sees them, copied: it may overwrite them. Task vectors, without a method."""
        base = self._base[region.start : region.stop].clone()
        models = [model[region.start : region.stop].clone() for model in self._models]
        if method is not None and method.space == "weights":
            return Block(region, base if method.reads_base else None, [], models)
        return Block(region, base, [model - base for model in models], [])

    def scan(self, measure: Callable[[Block], Any], regions: Sequence[Region] | None = None) -> Iterator[Any]:
        """See `streaming.blocks.Scan`."""
        chosen = list(tile(self.tensor, blocks.GRID_ELEMENTS)) if regions is None else list(regions)
        self.scans.append(chosen)
        return (measure(self.block(region, self._method)) for region in chosen)

    def merge(self, method: Method, block_elements: int = blocks.GRID_ELEMENTS) -> Tensor:
        """Measure, then combine blocks of at most `block_elements`, the last one first. float32, the tensor's shape.

        Raises: AssertionError: the method overwrites the base, or returns another shape or dtype than it should.
        """
        self._method = method
        statistics = method.measure(self.tensor, self.scan)
        out = torch.full((self.tensor.numel,), torch.nan)
        block_elements = max(block_elements, blocks.GRID_ELEMENTS if method.whole_rows else 1)
        for region in reversed(list(tile(self.tensor, block_elements))):
            assert 0 < region.numel <= block_elements
            block = self.block(region, method)
            merged = method.combine(block, statistics)
            assert (merged.dtype, tuple(merged.shape)) == (torch.float32, (region.numel,))
            if block.base is not None:
                assert torch.equal(block.base, self._base[region.start : region.stop]), "the base was overwritten"
                assert merged.data_ptr() != block.base.data_ptr()
            out[region.start : region.stop] = merged
        return out.view(self.tensor.shape)


def patch_grid(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Make the grid that is measured, and other blocks, `elements` wide, so that small tensors have many blocks."""
    for name, module in list(sys.modules.items()):
        for constant in ("GRID_ELEMENTS", "BLOCK_ELEMENTS", "READ_ELEMENTS"):
            if name.split(".")[0] in ("checkpoints", "merging", "streaming") and hasattr(module, constant):
                monkeypatch.setattr(module, constant, elements)


def make_method(name: str, models: int, *, seed: int = 0, **arguments: Any) -> Method:
    """A method by name, with the arguments of `tests.reference` (weights, density ...); defaults are its own."""
    cls = get_method(name)
    plurals = {"density": "densities", "gamma": "gammas", "epsilon": "epsilons"}
    given = {plurals.get(key, key): value for key, value in arguments.items()}
    values: dict[str, Any] = {"seed": seed} if cls.draws else {}
    for key, field in cls.parameters().items():
        value = given.pop(field.name, METHODS[name].defaults[key])
        many = isinstance(value, Sequence)
        values[field.name] = (tuple(value) if many else (value,) * models) if PARAMETERS[key].per_model else value
    assert not given, f"{name} has no {', '.join(given)}"
    return cls(**values)


def fitting(name: str, models: Sequence[Any]) -> list[Any]:
    """As many of the models as a method merges."""
    return list(models[: get_method(name).max_models])


FORMULAS = reference.METHODS | more.METHODS
RESCALES = {"dare_linear": "density", "dare_ties": "density", "della": "l1", "della_linear": "l1"}
"""What each method does to what it keeps where `rescale` is not given."""


def reference_arguments(
    name: str, method: Method, tensor: TensorSpec, base: Tensor, models: Sequence[Tensor]
) -> dict[str, Any]:
    """A method's parameters as `tests.reference` takes them, with the masks of the reference hash."""
    singular = {"densities": "density", "gammas": "gamma", "epsilons": "epsilon"}
    arguments = {singular.get(key, key): value for key, value in vars(method).items() if key != "seed"}
    if "rescale" in arguments:
        arguments["rescale"] = {None: RESCALES.get(name), True: "l1", False: None}[arguments["rescale"]]
    if method.draws:
        seed: int = vars(method)["seed"]
        densities = enumerate(arguments["density"])
        if "epsilon" not in arguments:
            arguments["masks"] = [keep_mask(seed, tensor.name, i, tensor.shape, rho) for i, rho in densities]
        else:
            deltas = reference.task_vectors(base, models)
            kept = [
                more.della_probabilities(deltas[i], rho, arguments["epsilon"][i] if 0 < rho < 1 else 0)
                for i, rho in densities
            ]
            arguments["masks"] = [
                random_words(seed, tensor.name, i, tensor.numel).astype(np.uint64)
                < np.round(one.flatten().numpy() * MODULUS)
                for i, one in enumerate(kept)
            ]
            arguments["masks"] = [torch.from_numpy(mask).reshape(tensor.shape) for mask in arguments["masks"]]
    return arguments


def expect(
    name: str,
    method: Method,
    tensor: TensorSpec,
    base: Tensor,
    models: Sequence[Tensor],
    formula: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What float64 says of one tensor.

    Args:
        formula: instead of the reference's own (to show that a wrong one is noticed).

    Returns: the result; how far float32 arithmetic may be from it, both float64; and, bool, where float32 may elect the
        other sign, so that nothing can be said.
    """
    arguments = reference_arguments(name, method, tensor, base, models)
    is_embedding = tensor.is_embedding and not tensor.is_vector
    result = (formula or FORMULAS[name])(base, models, is_embedding=is_embedding, **arguments)
    unclear = torch.zeros(base.shape, dtype=torch.bool)
    if name in ("ties", "dare_ties"):
        unclear = reference.election_is_close(base, models, **arguments)
    elif name in ("breadcrumbs_ties", "della", "sce"):
        vectors = (
            reference.task_vectors(base, models) if name == "sce" else more.thinned(name, base, models, **arguments)
        )
        unclear = reference.election_is_close(
            torch.zeros_like(vectors[0]), vectors, weights=arguments.get("weights", 1.0)
        )
    if name in more.METHODS:
        return result, _slack_of_sums(name, base, models, result, arguments), unclear
    return result, _float32_slack(name, base, models, arguments), unclear


def _slack_of_sums(
    name: str, base: Tensor, models: Sequence[Tensor], result: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """As `_float32_slack`, for sums whose factors depend on the tensor: of what is added up, times how much it grows."""
    added = [x.double().abs() for x in models] if name in ("slerp", "karcher", "passthrough") else []
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


def _float32_slack(name: str, base: Tensor, models: Sequence[Tensor], arguments: dict[str, Any]) -> Tensor:
    """A bound on what one float32 rounding of each step can add up to, element by element, and twice that."""
    count = len(models)
    weights = arguments.get("weights", [max(1.0, arguments.get("calibration", 1.0))] * count)
    densities = arguments.get("density", [1.0] * count) if "masks" in arguments else [1.0] * count
    terms = [x.double() for x in models] if name == "linear" else reference.task_vectors(base, models)
    scaled = zip(weights, terms, densities, strict=True)
    reach = torch.stack([abs(w) * x.abs() / max(rho, 1e-9) for w, x, rho in scaled]).sum(dim=0)
    if arguments.get("normalize"):
        subsets = itertools.chain.from_iterable(itertools.combinations(weights, n) for n in range(1, count + 1))
        reach = reach / min([1.0, *(abs(sum(subset)) for subset in subsets if abs(sum(subset)) > 1e-6)])
    start = 0 if name == "linear" else base.double().abs()
    return 2 * (count + 4) * FLOAT32_STEP * (abs(arguments.get("lambda_", 1.0)) * reach + start)


def assert_rounds_to(
    actual: Tensor, expected: Tensor, slack: Tensor, ignore: Tensor | None = None, where: str = "tensor"
) -> None:
    """`actual` is what some number within `slack` of `expected` rounds to in its dtype. Rounding is monotone.

    Args:
        actual: any float dtype; expected, slack: float64; ignore: bool, elements that may be anything. All one shape.
    Raises: AssertionError with the number of elements that are wrong and the worst of them.
    """
    assert actual.shape == expected.shape, f"{where}: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"
    low, high = (expected - slack).to(actual.dtype), (expected + slack).to(actual.dtype)
    wrong = ~((actual >= low) & (actual <= high))
    if ignore is not None:
        wrong &= ~ignore
    if wrong.any():
        error = ((actual.double() - expected).abs() * wrong).flatten()
        worst = int(error.argmax())
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} elements are not the rounded reference; the worst, "
            f"element {worst}: expected {expected.flatten()[worst]:.9g}, got {actual.flatten()[worst]:.9g}"
        )


def check_parity(
    name: str,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    tensor: str = "model.layers.0.mlp.up_proj.weight",
    is_embedding: bool = False,
    block_elements: int = blocks.GRID_ELEMENTS,
    formula: Callable[..., Tensor] | None = None,
    seed: int = 3,
    **arguments: Any,
) -> Tensor:
    """Merge one tensor in memory and compare it with the float64 reference; the merged tensor, float32."""
    memory = InMemory(base, models, tensor, is_embedding)
    method = make_method(name, len(models), seed=seed, **arguments)
    merged = memory.merge(method, block_elements)
    expected, slack, unclear = expect(name, method, memory.tensor, base, models, formula)
    share = unclear.double().mean() if unclear.numel() > 100 else 0
    assert share < 0.02, f"{share} of the elements cannot be compared"
    assert_rounds_to(merged, expected, slack, unclear, f"{name} {tuple(base.shape)}")
    return merged


def random_inputs(
    shape: Sequence[int], models: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, whole: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tunes near it, some elements untouched.

    Args:
        whole: small whole numbers instead, whose sums, products and (of one element) norms are exact.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        if whole:
            return torch.randint(-3, 4, tuple(shape), generator=generator).float()
        return torch.randn(tuple(shape), generator=generator)

    base = (draw() if whole else draw() * 0.1).to(dtype)
    scale = 1.0 if whole else 0.02
    touched = [torch.rand(tuple(shape), generator=generator) > 0.2 for _ in range(models)]
    return base, [(base.float() + draw() * scale * mask).to(dtype) for mask in touched]


def shifted(name: str) -> Callable[..., Tensor]:
    """The reference with every model in another one's place: a comparison must notice."""
    right = FORMULAS[name]
    return lambda base, models, **arguments: right(base, [*models[1:], models[0]], **arguments)


def flipped(name: str) -> Callable[..., Tensor]:
    """The reference with the sign of what it adds turned (in weight space: of everything)."""
    right = FORMULAS[name]
    if name in ("linear", "slerp", "karcher", "passthrough"):
        return lambda base, models, **arguments: -right(base, models, **arguments)
    return lambda base, models, **arguments: 2 * base.double() - right(base, models, **arguments)
