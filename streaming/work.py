"""What a job writes, planned: `merging` and `aim` each make one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from checkpoints.model import Model
from checkpoints.save_path import RECIPE_FILE
from checkpoints.settings import Show, as_in_python
from checkpoints.sidecars import SideFiles
from checkpoints.staging import Stage
from checkpoints.writer import Shard, file_names
from streaming.stream import Merger, Observer, PlannedTensor, Transform

CARD_FILE = "README.md"
Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Tensor -> parts of it, in their order: first element, and the one after the last."""


@dataclass(frozen=True)
class Findings:
    """What a stream noticed of the numbers.

    Attributes:
        unchanged: positions of the models whose task vectors are zero throughout; see `stream`.
        non_finite: tensor -> elements of it that are NaN or infinite, in all outputs together, where that was allowed.
    """

    unchanged: frozenset[int]
    non_finite: Mapping[str, int]

    def non_finite_warnings(self) -> list[str]:
        """Which tensors hold what is not finite, for people: a line for each."""
        return [f"{name}: {n:,} elements that are NaN or infinite were written." for name, n in self.non_finite.items()]


def no_details() -> dict[str, Any]:
    """Nothing to add to merge_recipe.json."""
    return {}


@dataclass(frozen=True)
class Variant:
    """One checkpoint of a run.

    Attributes:
        folder: below the save path; empty where the run writes one checkpoint, the save path itself.
        transform: what changes the merge on its way there.
        details: asked when the weights are written: further keys of its merge_recipe.json.
        card: a paragraph of its model card.
        methods: output tensor -> how it is merged here; None for as planned.
    """

    folder: str = ""
    transform: Transform | None = None
    details: Callable[[], Mapping[str, Any]] = no_details
    card: str = ""
    methods: Mapping[str, Merger | None] | None = None

    def changed_as(self, change: Variant) -> Variant:
        """This merge with what another variant does to one."""
        first, then = self.details, change.details
        return Variant(
            folder=joined(self.folder, change.folder),
            transform=change.transform,
            details=lambda: {**first(), **then()},
            card="\n\n".join(filter(None, (self.card, change.card))),
            methods=self.methods,
        )


def joined(*folders: str) -> str:
    """The folder of a sweep over several settings: `lambda_0.5_omega_0.2`."""
    return "_".join(filter(None, folders))


@dataclass(kw_only=True)
class Work(ABC):
    """What a job writes, planned.

    Attributes:
        verb: what is done, for progress bars: `merging`.
        inputs: every opened model, the base (or what stands in for it) first.
        tensors: every output tensor with its sources.
        shards: the files that they go into.
        files: config, tokenizer and the rest.
        out_dtype: `auto`, or the dtype asked for.
        decides: what decides the output's bytes beside inputs, files and options, for JSON.
        recipe: keys of merge_recipe.json that say what is done.
        record: keys of merge_recipe.json that come after a step's.
        card: the beginning of the model card.
        notes: what a user should know.
        warnings: what a user should look at.
        sweep: the checkpoints that the tensors are written into, where these are several; a step has its own.
    """

    verb: str
    inputs: Sequence[Model]
    tensors: Sequence[PlannedTensor]
    shards: list[Shard]
    files: SideFiles
    out_dtype: str
    decides: Mapping[str, Any]
    recipe: Mapping[str, Any]
    card: str
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sweep: Sequence[Variant] = ()

    @property
    def base(self) -> Model:
        """The base, or the model that stands in for it: gives what is no number."""
        return self.inputs[0]

    @property
    def bytes_to_write(self) -> int:
        """Bytes of one output's tensors."""
        return bytes_written(self.tensors)

    @property
    def runs_models(self) -> bool:
        """Whether models are run while the tensors are written."""
        return False

    @property
    def file_names(self) -> list[str]:
        """Every file of one checkpoint."""
        return [*file_names(self.shards), *self.files.names, CARD_FILE, RECIPE_FILE]

    @property
    def file_sizes(self) -> dict[str, int]:
        """The files whose bytes are known before they are written -> bytes: all but index, card and recipe."""
        sizes = {shard.file_name: shard.size for shard in self.shards}
        return sizes | {name: len(self.files.read(name)) for name in self.files.names}

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """The plan for programs."""

    @abstractmethod
    def as_text(self, show: Show = as_in_python) -> str:
        """The plan for people."""

    def parts(self, todo: Sequence[PlannedTensor], stage: Stage) -> Generator[Sequence[PlannedTensor]]:
        """The tensors to be written, in parts of which one is streamed before the next is asked for: so a work can find out between
        them what the next ones need, and forget it again. Raises InputError.

        Args:
            todo: those that no earlier run finished; each has to come once, as it is or with another method.
            stage: where a work keeps what it has for a run that goes on.
        """
        yield todo

    def merges(self) -> Sequence[Variant]:
        """The merges that are written, each perhaps several times, with what a step changes: one, or those of a sweep."""
        return self.sweep or (Variant(),)

    def merged_by(self, variant: Variant, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor as a variant merges it."""
        return tensor if variant.methods is None else replace(tensor, method=variant.methods[tensor.spec.name])

    def start(self, count: int) -> Sequence[Observer | None]:
        """What looks at the blocks of each of so many merges when a run begins; None looks at none."""
        return [None] * count

    def warnings_of(self, findings: Findings) -> list[str]:
        """What a user should look at, now that the numbers are known."""
        return findings.non_finite_warnings()

    def closing_record(self, observer: Observer | None) -> dict[str, Any]:
        """The last keys of merge_recipe.json."""
        return {}


def bytes_written(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes of output tensors."""
    return sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors)


def remaining(tensors: Sequence[PlannedTensor], whole: Collection[str], parts: Spans) -> list[PlannedTensor]:
    """What is left of tensors of which some are finished, and parts of others.

    Args:
        whole: names of those that are finished.
        parts: finished parts of others.
    """
    left: list[PlannedTensor] = []
    for tensor in tensors:
        name = tensor.spec.name
        if name in whole:
            continue
        if not parts.get(name):
            left.append(tensor)
        else:
            left += [replace(tensor, part=span) for span in gaps(tensor.spec.numel, parts[name])]
    return left


def gaps(numel: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The elements of a tensor that are in none of some parts, which are in their order."""
    edges = [0, *(edge for span in spans for edge in span), numel]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
