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
    label = model.label
    problems, mismatches = Problems(), Mismatches(label, first.advice)
    # By name.
    wanted = first.tensors
    own = {name: name for name in wanted if name in stored}
    missing = [name for name in wanted if name not in stored]
    extra = [
        name for name in stored if name not in wanted and (name not in first.stored or _is_head(first, tied, name))
    ]
    assembled: dict[str, TensorRef] = {}
    # By the parameter that both become in the first model's class, whole or in pieces.
    if missing and extra:
        found = _same_parameters(first, model, stored, missing)
        whole = {name: pieces[0].name for name, pieces in found.items() if pieces[0].is_whole}
        parts = {name: pieces for name, pieces in found.items() if name not in whole}
        if whole:
            ours, theirs = next(iter(whole.items()))
            problems.note(f"{label}: {len(whole)} tensors have other names there, such as {theirs} for {ours}.")
        if parts:
            ours, pieces = next(iter(parts.items()))
            problems.note(
                f"{label}: {len(parts)} tensors are stored in other pieces there, such as {ours} in {pieces[0].name}."
            )
        source = Assembled(model.weights, parts, {name: wanted[name].info.shape for name in parts})
        assembled = {name: TensorRef(source, name) for name in parts}
        own |= whole
        used = {piece.name for pieces in found.values() for piece in pieces}
        missing = [name for name in missing if name not in found]
        extra = [name for name in extra if name not in used]
    # What is still missing: a tied head, a buffer, what nothing is computed with; else it is lacking.
    lacking, kept = [], []
    for name in missing:
        if optional(name):
            continue
        twin = _tied_to(first, model, name)
        if twin is not None and twin in stored:
            own[name] = twin
            problems.note(f"{label}: {name} is tied to {twin} there; that is used for it.")
        elif _is_buffer(first, name):
            problems.note(f"{label}: the buffer {name} is not stored there; that of {first.label} is kept.")
        elif name in first.model.known_architecture.unused:
            kept.append(name)
        else:
            lacking.append(name)
    # What is still extra: what nothing is computed with, a head that equals its embedding; else it is a stranger.
    ignored = [name for name in extra if not optional(name) and name in model.known_architecture.unused]
    if ignored:
        problems.note(f"{label}: left out, as the model computes nothing with them: {list_kinds(ignored)}.")
    strangers, untied = [], {}
    for name in extra:
        if optional(name) or name in ignored:
            continue
        ours = _name_of_head(first, model, name)
        twin = (
            tied.get(ours) or model.known_architecture.tied.get(name) or first.model.known_architecture.tied.get(ours)
        )
        twin = own.get(twin, twin) if twin is not None else None
        whose = "the output" if ours in tied else first.label
        if twin is None or twin not in stored:
            strangers.append(name)
        elif equal_tensors(model.weights, name, twin):
            problems.note(f"{label}: {name} is left out, as it equals {twin}, to which {whose} ties it.")
        else:
            untied[name] = f"expected equal to {twin}, to which {whose} ties it, got other numbers."
    # A model of the decoder alone keeps the first model's other parts; the other way round is refused in one message.
    if lacking and not strangers and _lacks_a_part(first.model, model, lacking):
        kept += lacking
        lacking = []
    if kept:
        problems.note(f"{label}: not stored there, and kept as in {first.label}: {list_kinds(kept)}.")
    for name in lacking:
        mismatches.add_missing(name, first.label)
    if strangers and not lacking and _lacks_a_part(model, first.model, strangers):
        other_way = f"Make it the base, and {first.label} one of the models."
        problems.add(
            f"{label}: expected a {first.model.known_architecture.model_class} as {first.label}, got a {model.known_architecture.model_class}, "
            f"of which other parts have no place there: {list_kinds(strangers)}. {other_way if first.advice == MODELS_OF_THIS_BASE else first.advice}"
        )
        strangers = []
    for name in strangers:
        mismatches.add_extra(name, first.label)
    for name, problem in untied.items():
        use = setting("tie_word_embeddings", "no")
        mismatches.add(name, f"{problem} Use {use}, which gives the output a head of its own.")
    mismatches.report_to(problems)
    # In the order of the output's names.
    refs = {name: TensorRef(model.weights, there) for name, there in own.items()} | assembled
    tensors = {name: refs[name] for name in wanted if name in refs}
    renamed = {name: there for name, there in own.items() if name != there}
    return AlignedModel(model, first.advice, stored, tensors, renamed, problems)


def _is_head(first: AlignedModel, tied: Mapping[str, str], name: str) -> bool:
    """Whether a tensor of the first model that the output lacks is a head that it ties."""
    return name in tied or name in first.model.known_architecture.tied


def _same_parameters(
    first: AlignedModel, model: Model, stored: Mapping[str, TensorInfo], missing: Sequence[str]
) -> dict[str, list[Piece]]:
    """Output tensor -> what it consists of in the model's files, found by the parameters that both become."""
    found = first.model.find_pieces({name: info.shape for name, info in stored.items()}, model)
    ours, theirs = first.model.known_architecture.output_head, model.known_architecture.output_head
    if (
        ours is not None and theirs is not None and theirs in stored
    ):  # a head that the first model ties is in none of its files
        found.setdefault(ours, [Piece(theirs, 0, stored[theirs].numel, is_whole=True)])
    return {name: found[name] for name in missing if name in found}


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
