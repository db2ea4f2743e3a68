"""From a recipe to a model in memory: planned as a merge is, streamed by the same engine into the loaded model's parameters.

What does not depend on the candidate is done once: the models are open, the base is loaded, AIM's statistics are taken, and what a
method measures of a whole tensor (the thresholds of TIES, say) is kept for every candidate that measures the same.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch

from aim.activations import Activations
from aim.reading import read_request
from aim.request import AimRequest
from aim.transforms import make_transforms
from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.source import TensorRef
from forward.memory import available_bytes
from merging.kept_moments import Keep
from merging.methods.contract import Method
from merging.plan import make_plan
from merging.recipe import Recipe, source_key
from merging.recipe_reader import Reader
from search.texts import Document, Part
from streaming.blocks import Block, Scan, TensorSpec
from streaming.output import DEFAULT_SHARD_BYTES
from streaming.stream import Merger, PlannedTensor, StreamOptions, Transform

SHARE_KEPT = 0.25
"""Of the memory that is free when a search begins, what tensors' statistics may take, of all candidates together."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that has been read.

    Attributes:
        recipe: what is merged.
        aim: what AIM does to it; None for nothing.
    """

    recipe: Recipe
    aim: AimRequest | None


def read_candidate(tree: Mapping[str, Any], where: str) -> Candidate:
    """The candidate that a recipe without free entries describes. Raises Refusals: everything that is wrong with it."""
    reader = Reader(where)
    none: dict[str, Any] = {"seed": None, "out_dtype": None, "exclude": None, "only": None, "layout": {}}
    recipe = reader.read(dict(tree), none)
    reader.problems.raise_if_any()
    assert recipe is not None
    return Candidate(recipe, None if recipe.aim is None else read_request(recipe.aim, where))


@dataclass
class Seconds:
    """Where the time of candidates went.

    Attributes:
        planning: reading recipes and planning them.
        weights: computing and writing weights.
        forward: running the model on texts.
        candidates: how many.
    """

    planning: float = 0.0
    weights: float = 0.0
    forward: float = 0.0
    candidates: int = 0

    def as_text(self) -> str:
        """A line for people: seconds of a candidate, and what comes on top of the forward passes."""
        count = max(1, self.candidates)
        more = (self.planning + self.weights) / max(self.forward, 1e-9)
        return (
            f"a candidate: {self.planning / count:.2f} s planning, {self.weights / count:.2f} s weights, "
            f"{self.forward / count:.2f} s forward passes; {100 * more:.0f} % above the forward passes"
        )


class KeptStatistics:
    """Statistics of tensors by what decides them; what there is no room for is measured each time.

    Args:
        most: bytes of all together.
    """

    def __init__(self, most: int):
        self._left = most
        self._kept: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What was kept under a key, or else is measured now; no two threads ask for one key."""
        if key in self._kept:
            return self._kept[key]
        statistics = measure()
        size = _bytes_of(statistics)
        with self._lock:
            if size <= self._left:
                self._left -= size
                self._kept[key] = statistics
        return statistics


def _bytes_of(statistics: Any) -> int:
    """What statistics take in memory: their tensors, and something for what holds them."""
    if isinstance(statistics, torch.Tensor):
        return 256 + statistics.untyped_storage().nbytes()
    if dataclasses.is_dataclass(statistics):
        statistics = [getattr(statistics, one.name) for one in dataclasses.fields(statistics)]
    if isinstance(statistics, Mapping):
        statistics = list(statistics.values())
    return 256 + (sum(map(_bytes_of, statistics)) if isinstance(statistics, list | tuple) else 0)


@dataclass(frozen=True)
class Remembering:
    """A method whose statistics of a tensor are kept for candidates that measure the same; a `streaming.stream.Merger`."""

    method: Method
    kept: KeptStatistics
    space: Literal["task_vectors", "weights"] = field(init=False)
    reads_base: bool = field(init=False)
    whole_rows: bool = field(init=False)
    measures: bool = field(init=False)

    def __post_init__(self) -> None:
        for name in ("space", "reads_base", "whole_rows", "measures"):
            object.__setattr__(self, name, getattr(self.method, name))

    def measure(self, tensor: TensorSpec, scan: Scan) -> Any:
        """What the method measures, once."""
        fields = {
            one.name: getattr(self.method, one.name)
            for one in dataclasses.fields(self.method)
            if one.name not in self.method.unmeasured
        }
        key = (tensor.name, type(self.method), tuple(fields.items()))
        return self.kept.get(key, lambda: self.method.measure(tensor, scan))

    def formula(self, tensor: TensorSpec, statistics: Any) -> Any:
        """See `Merger.formula`."""
        return self.method.formula(tensor, statistics)

    def combine(self, block: Block, statistics: Any) -> torch.Tensor:
        """See `Merger.combine`."""
        return self.method.combine(block, statistics)


class Place(Protocol):
    """Where the weights of a candidate go: a model in memory, or one of which a layer is there at a time."""

    model: Any
    """As transformers loads it; without weights where a layer is there at a time."""
    can_score_in_parts: bool
    """Whether scoring some documents, and then others, takes no longer than all at once."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the base's tensors."""

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """Raise InputError where tensors do not fit the model."""

    def put(self, tensors: Sequence[PlannedTensor], transform: Transform | None, options: StreamOptions) -> None:
        """Have these weights from now on."""

    def score(self, documents: Sequence[Document]) -> list[float]:
        """The loss of each document, nats per scored token."""


class Candidates:
    """Makes models of recipes, one after the other, in one place in memory.

    Args:
        opened: the inputs, the base first.
        keys: `source_key` of each.
        place: where their weights go, and what scores them.
        options: of the stream.
        activations: of the base; None where no recipe asks for AIM.
        score_items: has the place's model answer items of benchmarks, and says what each answer is worth.
        prepare: gives the tensors of a plan what their method wants of the models beforehand; what it finds out for many candidates, it
            has kept with their statistics.

    Attributes:
        seconds: where the time went.
    """

    def __init__(
        self,
        opened: Sequence[Model],
        keys: Sequence[Any],
        place: Place,
        options: StreamOptions,
        activations: Activations | None = None,
        score_items: Callable[[Sequence[Any]], Sequence[float]] = lambda items: (),
        prepare: Callable[[Sequence[PlannedTensor], Keep], Sequence[PlannedTensor]] = lambda tensors, keep: tensors,
    ):
        self._opened, self._keys, self.place, self._options = opened, list(keys), place, options
        self.activations, self._score_items, self._prepare = activations, score_items, prepare
        self._statistics = KeptStatistics(int(SHARE_KEPT * available_bytes()))
        self.seconds = Seconds()

    @property
    def base(self) -> Model:
        """What the models were fine-tuned from."""
        return self._opened[0]

    def plan(self, candidate: Candidate) -> tuple[tuple[PlannedTensor, ...], Transform | None]:
        """Every tensor of a candidate, and what AIM does to it. Raises InputError: the recipe does not fit the models."""
        recipe = of_base(candidate.recipe)
        if [source_key(name) for name in recipe.inputs] != self._keys:
            raise InputError("models: expected the same models for every candidate. Mark no name of a model as free.")
        planned = make_plan(recipe, self._opened, max_shard_bytes=DEFAULT_SHARD_BYTES).tensors
        tensors = self._prepare(planned, self._statistics.get)
        self.place.check(tensors)
        transform: Transform | None = None
        if candidate.aim is not None and any(omega.of(t.spec.name) != 1.0 for omega in candidate.aim.relaxing.omegas for t in tensors):  # fmt: skip
            assert self.activations is not None
            relaxing, device = candidate.aim.relaxing, self._options.device
            transform = make_transforms(self.base, self.activations, relaxing, tensors, device)[0]
        remembering = (
            dataclasses.replace(tensor, method=cast(Merger, Remembering(tensor.method, self._statistics)))
            if isinstance(tensor.method, Method)
            else tensor
            for tensor in tensors
        )
        return tuple(remembering), transform

    def make(self, candidate: Candidate) -> None:
        """Put a candidate's weights into the model, rounded as its checkpoint would be."""
        started = time.monotonic()
        tensors, transform = self.plan(candidate)
        planned = time.monotonic()
        self.place.put(tensors, transform, self._options)
        self.seconds.planning += planned - started
        self.seconds.weights += time.monotonic() - planned
        self.seconds.candidates += 1

    def make_input(self, position: int) -> None:
        """Put the weights of an input into the model; 0 is the base."""
        model = self._opened[position]
        planned = [
            PlannedTensor(TensorSpec(name, info.shape), info.plain_dtype, TensorRef(model.weights, name), (), None)
            for name, info in model.weights.tensors.items()
            if name in self.place.shapes
        ]
        self.place.check(planned)
        self.place.put(planned, None, self._options)

    def score(self, parts: Sequence[Part]) -> list[float]:
        """The loss of each document, or what each answer to an item is worth, under the weights that are in memory."""
        started = time.monotonic()
        documents = [one for one in parts if isinstance(one, Document)]
        items = [one for one in parts if not isinstance(one, Document)]
        losses = iter(self.place.score(documents) if documents else ())
        worths = iter(self._score_items(items) if items else ())
        self.seconds.forward += time.monotonic() - started
        return [next(losses) if isinstance(one, Document) else next(worths) for one in parts]


def of_base(recipe: Recipe) -> Recipe:
    """A recipe whose output has the base's shapes where it leaves that open."""
    if recipe.layout.tokenizer_source != "auto":
        return recipe
    return dataclasses.replace(recipe, layout=dataclasses.replace(recipe.layout, tokenizer_source="base"))
