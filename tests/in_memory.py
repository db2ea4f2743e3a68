"""One tensor in memory, cut into blocks as the engine cuts it: methods without files, threads or the engine.

    ours = InMemory(base, models).merge(make_method("ties", 2, weights=[1, 2], density=0.5), block_elements=7)
    check_parity("ties", base, models, weights=[1, 2], density=0.5)      # against tests/reference, or AssertionError

Nothing here knows a formula: what is right comes from tests/reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.methods import METHODS, get_method
from merging.methods.contract import Method
from merging.parameters import REQUIRED
from streaming import blocks
from streaming.blocks import Block, Region, TensorSpec, tile
from tests.reference import of_method
from tests.reference.of_method import Reference

Numbers = float | Sequence[float]
PLURALS = {"density": "densities", "gamma": "gammas", "epsilon": "epsilons"}
"""Arguments of references that are fields of another name, where the class has such a field."""

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


WITHOUT_DATA = [name for name, entry in METHODS.items() if not entry.needs_data]
"""The methods that merge without text of each model."""


def argument_names(cls: type[Method]) -> dict[str, str]:
    """Field of a class -> the argument of references for it."""
    singular = {field: key for key, field in PLURALS.items()}
    return {field: singular.get(field, field) for _, field in cls.parameters().values()}


def keys_of(cls: type[Method]) -> dict[str, str]:
    """Argument of references -> recipe key."""
    names = argument_names(cls)
    return {names[field]: key for key, (_, field) in cls.parameters().items()}


def required(name: str) -> dict[str, Any]:
    """The arguments without which a method does nothing, from its reference."""
    cls = get_method(name)
    names = argument_names(cls)
    needed = [names[field] for one, field in cls.parameters().values() if one.default is REQUIRED]
    return {argument: of_method.find(name).arguments[argument] for argument in needed}


def required_flags(name: str) -> list[str]:
    """The same as flags."""
    keys = keys_of(get_method(name))
    return [f"--{keys[argument]}={value}" for argument, value in required(name).items()]


def make_method(method: str | type[Method], models: int, *, seed: int = 0, **arguments: Any) -> Method:
    """A method by name or class, with the arguments of its reference (weights, density ...); defaults are its own."""
    cls = get_method(method) if isinstance(method, str) else method
    names = argument_names(cls)
    values: dict[str, Any] = {"seed": seed} if cls.draws else {}
    for one, field in cls.parameters().values():
        value = arguments.pop(names[field], one.default)
        assert value is not REQUIRED, f"{method} needs {names[field]}"
        many = isinstance(value, Sequence)
        values[field] = (tuple(value) if many else (value,) * models) if one.per_model else value
    assert not arguments, f"{method} has no {', '.join(arguments)}"
    return cls(**values)


def merge_models(
    method: str,
    *models: Tensor,
    base: Tensor | None = None,
    is_embedding: bool = False,
    block_elements: int = 4,
    **arguments: Any,
) -> Tensor:
    """Merge tensors by a method's name and its reference's arguments; float32, of their shape.

    Args:
        base: the first model, where none is given.
        block_elements: at most, so that small tensors have several blocks.
    """
    memory = InMemory(models[0] if base is None else base, models, is_embedding=is_embedding)
    return memory.merge(make_method(method, len(models), **arguments), block_elements)


def merge_vectors(method: str, *vectors: Tensor, base: Tensor, change: bool = False, **arguments: Any) -> Tensor:
    """`merge_models` of models that are the base and a task vector each; with `change`, less the base."""
    merged = merge_models(method, *(base + vector for vector in vectors), base=base, **arguments)
    return merged - base if change else merged


def fitting(name: str, models: Sequence[Any]) -> list[Any]:
    """As many of the models as a method merges."""
    return list(models[: get_method(name).max_models])


def fitting_arguments(arguments: Mapping[str, Any], models: int) -> dict[str, Any]:
    """Arguments for three models cut to fewer."""
    return {key: value[:models] if isinstance(value, list) else value for key, value in arguments.items()}


def expect(
    of: str | Reference,
    method: Method,
    tensor: TensorSpec,
    base: Tensor,
    models: Sequence[Tensor],
    formula: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What float64 says of one tensor.

    Args:
        of: a method's reference, or its name.
        formula: instead of the reference's own (to show that a wrong one is noticed).

    Returns: the result; how far float32 arithmetic may be from it, both float64; and, bool, where float32 may decide
        otherwise, so that nothing can be said.
    """
    reference = of_method.find(of) if isinstance(of, str) else of
    arguments = {name: getattr(method, field) for field, name in argument_names(type(method)).items()}
    if reference.prepare is not None:
        arguments = reference.prepare(method, tensor, base, models, arguments)
    is_embedding = tensor.is_embedding and not tensor.is_vector
    result = (formula or reference.formula)(base, models, is_embedding=is_embedding, **arguments)
    unclear = torch.zeros(base.shape, dtype=torch.bool)
    if reference.unclear is not None:
        unclear = reference.unclear(base, models, **arguments)
    return result, reference.slack(base, models, result, **arguments), unclear


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
    name: str | Reference,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    tensor: str = "model.layers.0.mlp.up_proj.weight",
    is_embedding: bool = False,
    block_elements: int = blocks.GRID_ELEMENTS,
    formula: Callable[..., Tensor] | None = None,
    seed: int = 3,
    cls: type[Method] | None = None,
    **arguments: Any,
) -> Tensor:
    """Merge one tensor in memory and compare it with the float64 reference; the merged tensor, float32.

    Args:
        name: of the method, or a reference, with the method's class as `cls`.
    """
    memory = InMemory(base, models, tensor, is_embedding)
    method = make_method(cls or str(name), len(models), seed=seed, **arguments)
    merged = memory.merge(method, block_elements)
    expected, slack, unclear = expect(name, method, memory.tensor, base, models, formula)
    share = unclear.double().mean() if unclear.numel() > 100 else 0
    assert share < 0.02, f"{share} of the elements cannot be compared"
    assert_rounds_to(merged, expected, slack, unclear, f"{type(method).__name__} {tuple(base.shape)}")
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
    """A method's reference with every model in another one's place: a comparison must notice."""
    return of_method.shifted(of_method.find(name).formula)


def flipped(name: str) -> Callable[..., Tensor]:
    """A method's reference with the sign of what it adds turned (in weight space: of everything)."""
    return of_method.find(name).flipped()
