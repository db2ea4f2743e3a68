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

import pytest
import torch
from torch import Tensor

from merging.methods import get_method
from merging.methods.contract import Method
from streaming import blocks
from streaming.blocks import Block, Region, TensorSpec, tile
from tests.reference import merging as reference
from tests.reference.random_mask import keep_mask

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
        self._base = base.float().flatten()
        self._models = [model.float().flatten() for model in models]

    def block(self, region: Region, space: str = "task_vectors") -> Block:
        """The numbers of a region, copied: a method may overwrite them."""
        base = self._base[region.start : region.stop].clone()
        models = [model[region.start : region.stop].clone() for model in self._models]
        if space == "weights":
            return Block(region, None, [], models)
        return Block(region, base, [model - base for model in models], [])

    def scan(self, measure: Callable[[Block], Any], regions: Sequence[Region] | None = None) -> Iterator[Any]:
        """See `streaming.blocks.Scan`."""
        chosen = list(tile(self.tensor, blocks.GRID_ELEMENTS)) if regions is None else list(regions)
        self.scans.append(chosen)
        return (measure(self.block(region)) for region in chosen)

    def merge(self, method: Method, block_elements: int = blocks.GRID_ELEMENTS) -> Tensor:
        """Measure, then combine blocks of at most `block_elements`, the last one first. float32, the tensor's shape.

        Raises: AssertionError: the method overwrites the base, or returns another shape or dtype than it should.
        """
        statistics = method.measure(self.tensor, self.scan)
        out = torch.full((self.tensor.numel,), torch.nan)
        for region in reversed(list(tile(self.tensor, block_elements))):
            assert 0 < region.numel <= block_elements
            block = self.block(region, method.space)
            merged = method.combine(block, statistics)
            assert (merged.dtype, tuple(merged.shape)) == (torch.float32, (region.numel,))
            if block.base is not None:
                assert torch.equal(block.base, self._base[region.start : region.stop]), "the base was overwritten"
                assert merged.data_ptr() != block.base.data_ptr()
            out[region.start : region.stop] = merged
        return out.view(self.tensor.shape)


def patch_grid(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Make the grid that is measured `elements` wide, so that small tensors have many blocks."""
    for name, module in list(sys.modules.items()):
        for constant in ("GRID_ELEMENTS", "READ_ELEMENTS"):
            if name.split(".")[0] in ("checkpoints", "merging", "streaming") and hasattr(module, constant):
                monkeypatch.setattr(module, constant, elements)


def make_method(name: str, models: int, *, seed: int = 0, **arguments: Any) -> Method:
    """A method by name, with the arguments of `tests.reference` (weights, density ...); defaults are its own."""
    cls = get_method(name)
    given = {"densities" if key == "density" else key: value for key, value in arguments.items()}
    values: dict[str, Any] = {"seed": seed} if cls.draws else {}
    for field in cls.parameters().values():
        value = given.pop(field.name, field.metadata["default"])
        many = isinstance(value, Sequence)
        values[field.name] = (tuple(value) if many else (value,) * models) if field.metadata["per_model"] else value
    assert not given, f"{name} has no {', '.join(given)}"
    return cls(**values)


def reference_arguments(method: Method, tensor: TensorSpec) -> dict[str, Any]:
    """A method's parameters as `tests.reference.merging` takes them, with the masks of the reference hash."""
    names = {"weights": "weights", "densities": "density", "lambda_": "lambda_", "normalize": "normalize"}
    names |= {"ratio": "ratio", "calibration": "calibration"}
    arguments = {theirs: getattr(method, ours) for ours, theirs in names.items() if hasattr(method, ours)}
    if method.draws:
        seed: int = vars(method)["seed"]
        densities = enumerate(arguments["density"])
        arguments["masks"] = [keep_mask(seed, tensor.name, i, tensor.shape, rho) for i, rho in densities]
        arguments["rescale"] = "density"
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
    arguments = reference_arguments(method, tensor)
    is_embedding = tensor.is_embedding and not tensor.is_vector
    result = (formula or reference.METHODS[name])(base, models, is_embedding=is_embedding, **arguments)
    unclear = torch.zeros(base.shape, dtype=torch.bool)
    if name in ("ties", "dare_ties"):
        unclear = reference.election_is_close(base, models, **arguments)
    return result, _float32_slack(name, base, models, arguments), unclear


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
    right = reference.METHODS[name]
    return lambda base, models, **arguments: right(base, [*models[1:], models[0]], **arguments)


def flipped(name: str) -> Callable[..., Tensor]:
    """The reference with the sign of what it adds turned (of linear: of everything)."""
    right = reference.METHODS[name]
    if name == "linear":
        return lambda base, models, **arguments: -right(base, models, **arguments)
    return lambda base, models, **arguments: 2 * base.double() - right(base, models, **arguments)
