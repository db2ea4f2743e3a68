"""Which tensor of a model stands for each tensor of the output: by name, or by the parameter that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from alignment.aligned_model import AlignedModel, Mismatches, same_kind_of_number
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.reader import equal_tensors
from checkpoints.settings import setting
from checkpoints.source import TensorInfo, TensorRef

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
        first: has the output's tensors; model: is matched with it; stored: what of it takes part.
        tied: head -> embedding, where the user had the output tie them.
        optional: see `align`.
    """
    label = model.label
    problems, mismatches = Problems(), Mismatches(label, first.advice)
    wanted = first.tensors
    own = {name: name for name in wanted if name in stored}
    missing = [name for name in wanted if name not in stored]
    extra = [
        name for name in stored if name not in wanted and (name not in first.stored or _is_head(first, tied, name))
    ]
    if missing and extra:
        aliases = _same_parameters(first, stored, missing, extra)
        if aliases:
            ours, theirs = next(iter(aliases.items()))
            problems.note(f"{label}: {len(aliases)} tensors have other names there, such as {theirs} for {ours}.")
        own |= aliases
        missing = [name for name in missing if name not in aliases]
        extra = [name for name in extra if name not in aliases.values()]
    for name in missing:
        if optional(name):
            continue
        twin = model.architecture.tied.get(name)
        if twin is not None and twin in stored:
            own[name] = twin
            problems.note(f"{label}: {name} is tied to {twin} there; that is used for it.")
        elif _is_buffer(first, name):
            problems.note(f"{label}: the buffer {name} is not stored there; that of {first.label} is kept.")
        else:
            mismatches.add_missing(name, first.label)
    for name in extra:
        if optional(name):
            continue
        twin = tied.get(name) or model.architecture.tied.get(name) or first.model.architecture.tied.get(name)
        twin = own.get(twin, twin) if twin is not None else None
        whose = "the output" if name in tied else first.label
        if name in model.architecture.ignored:
            problems.note(f"{label}: {name} is left out, as loading ignores or recomputes it.")
        elif twin is None or twin not in stored:
            mismatches.add_extra(name, first.label)
        elif equal_tensors(model.weights, name, twin):
            problems.note(f"{label}: {name} is left out, as it equals {twin}, to which {whose} ties it.")
        else:
            mismatches.add(
                name,
                f"expected equal to {twin}, to which {whose} ties it, got other numbers. Use {setting('tie_word_embeddings', 'no')}, "
                "which gives the output a head of its own.",
            )
    mismatches.report_to(problems)
    tensors = {name: TensorRef(model.weights, own[name]) for name in wanted if name in own}
    renamed = {name: there for name, there in own.items() if name != there}
    return AlignedModel(model, first.advice, stored, tensors, renamed, problems)


def _is_head(first: AlignedModel, tied: Mapping[str, str], name: str) -> bool:
    """Whether a tensor of the first model that the output lacks is a head that it ties."""
    return name in tied or name in first.model.architecture.tied


def _same_parameters(
    first: AlignedModel, stored: Mapping[str, TensorInfo], missing: Sequence[str], extra: Sequence[str]
) -> dict[str, str]:
    """Output tensor -> a stored tensor of another name that becomes the same parameter of the first model's class."""
    found = first.model.find_same({name: info.shape for name, info in stored.items()})
    own = {found[name]: name for name in extra if name in found}
    return {name: own[name] for name in missing if name in own}


def _is_buffer(first: AlignedModel, name: str) -> bool:
    """Whether a tensor of the first model is no weight, so that the others need not store it."""
    is_number = name not in first.stored or first.stored[name].dtype.is_floating_point
    return name in first.model.architecture.buffers or not is_number


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
