"""Find the tensor of a model that stands for each tensor of the output: by name, or by the parameter that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from alignment.aligned_model import AlignedModel, Mismatches, same_kind_of_number
from checkpoints.model import Model
from checkpoints.pieces import Assembled, Piece
from checkpoints.problems import Problems
from checkpoints.reader import equal_tensors
from checkpoints.settings import setting
from checkpoints.source import TensorInfo, TensorRef
from checkpoints.tensor_names import list_kinds

MODELS_OF_THIS_BASE = "Give models fine-tuned from this base."


def match_names(
    first: AlignedModel,
    model: Model,
    stored: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    *,
    optional: Callable[[str], bool] = lambda name: False,
) -> AlignedModel:
    """Find each tensor of the output in a model.

    By its name; else by the parameter that it becomes in the first model's class, which a prefix of names may hide; a
    head that the model ties is its embedding. Refused: a tensor that is missing or extra. Left out with a note: what
    loading ignores or recomputes, and a head equal to the embedding it is tied to.

    Args:
        first: has the output's tensors.
        model: is matched with it.
        stored: what of it takes part.
        tied: head -> embedding, where the user had the output tie them.
        optional: see `align`.
    """
    matching = _Matching(first, model, stored, tied, optional)
    matching.match_parameters()
    matching.settle_missing()
    matching.settle_extra()
    matching.settle_parts()
    return matching.aligned()


class _Matching:
    """One model's tensors on their way to the output's names.

    Attributes:
        own: output tensor -> its name in the model.
        assembled: output tensors that the model stores in pieces.
        missing: output tensors that nothing stands for so far; extra, tensors of the model that stand for none.
        kept: output tensors that stay as the first model has them.
        lacking: missing tensors that have to be there; strangers, extra ones that must not.
    """

    def __init__(
        self,
        first: AlignedModel,
        model: Model,
        stored: Mapping[str, TensorInfo],
        tied: Mapping[str, str],
        optional: Callable[[str], bool],
    ):
        self.first, self.model, self.stored, self.tied, self.optional = first, model, stored, tied, optional
        self.label = model.label
        self.problems, self.mismatches = Problems(), Mismatches(model.label, first.advice)
        wanted = first.tensors
        self.own = {name: name for name in wanted if name in stored}
        self.missing = [name for name in wanted if name not in stored]
        self.extra = [
            name for name in stored if name not in wanted and (name not in first.stored or _is_head(first, tied, name))
        ]
        self.assembled: dict[str, TensorRef] = {}
        self.kept: list[str] = []
        self.lacking: list[str] = []
        self.strangers: list[str] = []

    def match_parameters(self) -> None:
        """Match what has other names by the parameter that both become in the first model's class, whole or in pieces."""
        if not (self.missing and self.extra):
            return
        pieces_of = _same_parameters(self.first, self.model, self.stored, self.missing)
        whole = {name: pieces[0].name for name, pieces in pieces_of.items() if pieces[0].is_whole}
        parts = {name: pieces for name, pieces in pieces_of.items() if name not in whole}
        if whole:
            ours, theirs = next(iter(whole.items()))
            self.problems.note(
                f"{self.label}: {len(whole)} tensors have other names there, such as {theirs} for {ours}."
            )
        if parts:
            ours, pieces = next(iter(parts.items()))
            self.problems.note(
                f"{self.label}: {len(parts)} tensors are stored in other pieces there, such as {ours} in {pieces[0].name}."
            )
        shapes = {name: self.first.tensors[name].info.shape for name in parts}
        source = Assembled(self.model.weights, parts, shapes)
        self.assembled = {name: TensorRef(source, name) for name in parts}
        self.own |= whole
        used = {piece.name for pieces in pieces_of.values() for piece in pieces}
        self.missing = [name for name in self.missing if name not in pieces_of]
        self.extra = [name for name in self.extra if name not in used]

    def settle_missing(self) -> None:
        """Find a tied head, a buffer, or what nothing is computed with in what is still missing; the rest is lacking."""
        for name in self.missing:
            if self.optional(name):
                continue
            twin = _tied_to(self.first, self.model, name)
            if twin is not None and twin in self.stored:
                self.own[name] = twin
                self.problems.note(f"{self.label}: {name} is tied to {twin} there; that is used for it.")
            elif _is_buffer(self.first, name):
                self.problems.note(
                    f"{self.label}: the buffer {name} is not stored there; that of {self.first.label} is kept."
                )
            elif name in self.first.model.known_architecture.unused:
                self.kept.append(name)
            else:
                self.lacking.append(name)

    def settle_extra(self) -> None:
        """Leave out what nothing is computed with, and a head that equals its embedding; the rest are strangers."""
        first, model = self.first.model.known_architecture, self.model.known_architecture
        ignored = [name for name in self.extra if not self.optional(name) and name in model.unused]
        if ignored:
            self.problems.note(
                f"{self.label}: left out, as the model computes nothing with them: {list_kinds(ignored)}."
            )
        use = setting("tie_word_embeddings", "no")
        for name in self.extra:
            if self.optional(name) or name in ignored:
                continue
            ours = _name_of_head(self.first, self.model, name)
            twin = self.tied.get(ours) or model.tied.get(name) or first.tied.get(ours)
            twin = self.own.get(twin, twin) if twin is not None else None
            whose = "the output" if ours in self.tied else self.first.label
            if twin is None or twin not in self.stored:
                self.strangers.append(name)
            elif equal_tensors(self.model.weights, name, twin):
                self.problems.note(f"{self.label}: {name} is left out, as it equals {twin}, to which {whose} ties it.")
            else:
                self.mismatches.add(
                    name,
                    f"expected equal to {twin}, to which {whose} ties it, got other numbers. Use {use}, which gives the output a head of its own.",
                )

    def settle_parts(self) -> None:
        """Keep the first model's other parts where this one is its decoder alone; refuse the other way round in one message."""
        first, model = self.first.model, self.model
        if self.lacking and not self.strangers and _lacks_a_part(first, model, self.lacking):
            self.kept += self.lacking
            self.lacking = []
        if self.kept:
            self.problems.note(
                f"{self.label}: not stored there, and kept as in {first.label}: {list_kinds(self.kept)}."
            )
        if self.strangers and not self.lacking and _lacks_a_part(model, first, self.strangers):
            other_way = f"Make it the base, and {first.label} one of the models."
            self.problems.add(
                f"{self.label}: expected a {first.known_architecture.model_class} as {first.label}, got a {model.known_architecture.model_class}, "
                f"of which other parts have no place there: {list_kinds(self.strangers)}. {other_way if self.first.advice == MODELS_OF_THIS_BASE else self.first.advice}"
            )
            self.strangers = []

    def aligned(self) -> AlignedModel:
        """The model under the output's names, in their order, with everything that does not fit."""
        for name in self.lacking:
            self.mismatches.add_missing(name, self.first.label)
        for name in self.strangers:
            self.mismatches.add_extra(name, self.first.label)
        self.mismatches.report_to(self.problems)
        refs = {name: TensorRef(self.model.weights, there) for name, there in self.own.items()} | self.assembled
        tensors = {name: refs[name] for name in self.first.tensors if name in refs}
        renamed = {name: there for name, there in self.own.items() if name != there}
        return AlignedModel(self.model, self.first.advice, self.stored, tensors, renamed, self.problems)


def _is_head(first: AlignedModel, tied: Mapping[str, str], name: str) -> bool:
    """Whether a tensor of the first model that the output lacks is a head that it ties."""
    return name in tied or name in first.model.known_architecture.tied


def _same_parameters(
    first: AlignedModel, model: Model, stored: Mapping[str, TensorInfo], missing: Sequence[str]
) -> dict[str, list[Piece]]:
    """Output tensor -> what it consists of in the model's files, found by the parameters that both become."""
    pieces_of = first.model.find_pieces({name: info.shape for name, info in stored.items()}, model)
    ours, theirs = first.model.known_architecture.output_head, model.known_architecture.output_head
    if (
        ours is not None and theirs is not None and theirs in stored
    ):  # a head that the first model ties is in none of its files
        pieces_of.setdefault(ours, [Piece(theirs, 0, stored[theirs].numel, is_whole=True)])
    return {name: pieces_of[name] for name in missing if name in pieces_of}


def _name_of_head(first: AlignedModel, model: Model, name: str) -> str:
    """What the first model calls a tensor that is the other's head; any other keeps its name."""
    ours = first.model.known_architecture.output_head
    return ours if ours is not None and name == model.known_architecture.output_head else name


def _tied_to(first: AlignedModel, model: Model, name: str) -> str | None:
    """The stored tensor of a model that has the values of an output tensor which it ties."""
    theirs = model.known_architecture
    if name == first.model.known_architecture.output_head and theirs.output_head is not None:
        name = theirs.output_head
    return theirs.tied.get(name)


def _lacks_a_part(whole: Model, part: Model, names: Sequence[str]) -> bool:
    """Whether one model is of the class of another's decoder, and lacks what is outside of it: a part that reads images, say.

    Args:
        names: the tensors that it lacks, as the whole one stores them.
    """
    ours, theirs = whole.known_architecture, part.known_architecture
    return theirs.model_class != ours.model_class and not any(ours.is_text(name) for name in names)


def _is_buffer(first: AlignedModel, name: str) -> bool:
    """Whether a tensor of the first model is no weight, so that the others need not store it."""
    is_number = name not in first.stored or first.stored[name].dtype.is_floating_point
    return name in first.model.known_architecture.buffers or not is_number


def check_shapes(
    first: AlignedModel, model: AlignedModel, tables: Collection[str], optional: Callable[[str], bool]
) -> AlignedModel:
    """Refuse a model's tensors whose shape or kind of number is another than the output's.

    Args:
        tables: those that were refused already, as vocabularies.
        optional: see `align`.

    Returns: the model without the optional tensors that do not fit.
    """
    mismatches = Mismatches(model.label, model.advice)
    unfit = set()
    for name, ref in model.tensors.items():
        expected, got = first.tensors[name].info, ref.info
        fits = got.shape == expected.shape and same_kind_of_number(got, expected)
        if not fits and optional(name):
            unfit.add(name)
        elif got.shape != expected.shape and name not in tables:
            mismatches.add_shape(name, expected, got, first.label)
        elif not same_kind_of_number(got, expected):
            mismatches.add_dtype(name, expected, got, first.label)
    problems = Problems(model.problems, model.problems.notes)
    mismatches.report_to(problems)
    return replace(
        model, tensors={name: ref for name, ref in model.tensors.items() if name not in unfit}, problems=problems
    )
