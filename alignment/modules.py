"""Match the weights of modules behind a model (`2_Dense/` of an embedding model): by folder and name, like the model's own."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.aligned_model import AlignedModel, Mismatches
from checkpoints.problems import Problems
from checkpoints.source import TensorRef


def add_modules(models: Sequence[AlignedModel], problems: Problems) -> list[AlignedModel]:
    """Give every model the tensors of the modules that the first one has, named by their folder.

    A model without the folder changes nothing there: where another has it, the first model's weights stand for it, else they
    are copied. What only a later model has is left out.

    Args:
        models: the one that gives names first.
        problems: gets notes.
    """
    first = models[0]
    wanted = first.model.weights.modules.tensors
    ours = {name: TensorRef(first.model.weights.modules, name) for name in wanted}
    folders = sorted({_folder(name) for name in wanted})
    changed = {folder for model in models[1:] for folder in _folders(model)}
    aligned = [first.with_tensors(ours)] if ours else [first]
    for model in models[1:]:
        theirs = model.model.weights.modules
        mismatches = Mismatches(model.label, model.advice)
        there = _folders(model)
        refs = {name: ref for name, ref in ours.items() if _folder(name) not in there and _folder(name) in changed}
        for name in wanted:
            if name in theirs.tensors:
                refs[name] = TensorRef(theirs, name)
            elif _folder(name) in there:
                mismatches.add_missing(name, first.label)
        for name in theirs.tensors:
            if _folder(name) in folders and name not in wanted:
                mismatches.add_extra(name, first.label)
        lacking = [folder for folder in folders if folder not in there]
        if lacking:
            problems.note(
                f"{model.label}: has no {', '.join(lacking)}; the weights there count as those of {first.label}."
            )
        more = sorted(there - set(folders))
        if more:
            problems.note(f"{model.label}: {', '.join(more)} is left out, as {first.label} has none.")
        mismatches.report_to(model.problems)
        aligned.append(model.with_tensors({name: refs[name] for name in wanted if name in refs}))
    return aligned


def _folders(model: AlignedModel) -> set[str]:
    return {_folder(name) for name in model.model.weights.modules.tensors}


def _folder(name: str) -> str:
    """The folder that a tensor of a module lies in, with the slash at its end."""
    return name[: name.rindex("/") + 1]
