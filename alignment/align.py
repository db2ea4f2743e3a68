"""Bring every input of an output under its names, into its shapes and its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from alignment.aligned_model import AlignedModel
from alignment.layout import Layout
from alignment.matching import MODELS_OF_THIS_BASE, check_shapes, match_names
from alignment.modules import add_modules
from alignment.stored import left_out, unties_itself
from alignment.vocabularies import align_vocabularies
from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.reader import equal_tensors
from checkpoints.settings import setting
from checkpoints.sidecars import SideFiles, list_left_out
from checkpoints.source import FLOAT8, TensorInfo, TensorRef, holds_mxfp4
from checkpoints.tensor_names import list_kinds
from checkpoints.tokenizer_files import set_tied


@dataclass
class Alignment:
    """The inputs of an output, all under its names and in its shapes.

    Attributes:
        models: the model that gives names, config and dtypes first; the others in order.
        dtypes: of the output's tensors, as the first model stores them; every name is in it.
        files: the output's side files.
        layout: what was asked for, `tokenizer_source` and `new_token_rows` decided.
        problems: everything that does not fit, and the notes.
    """

    models: list[AlignedModel]
    dtypes: Mapping[str, torch.dtype]
    files: SideFiles
    layout: Layout
    problems: Problems

    @property
    def first(self) -> AlignedModel:
        """The model that gives names, config and dtypes."""
        return self.models[0]

    def of(self, model: Model) -> AlignedModel:
        """What became of an input."""
        return next(aligned for aligned in self.models if aligned.model is model)


def align(
    primary: Model,
    others: Sequence[Model],
    layout: Layout,
    *,
    advice: str = MODELS_OF_THIS_BASE,
    optional: Callable[[str], bool] = lambda name: False,
    part: Callable[[Model], Iterable[str]] = lambda model: model.weights.tensors,
) -> Alignment:
    """Bring every model's tensors under the names, shapes and vocabulary of the output.

    Args:
        primary: gives names, dtypes, config and, unless `layout` says otherwise, tokenizer, vocabulary and head.
        others: what is merged with it, in order.
        layout: what the user chose.
        advice: the last sentence of a refusal.
        optional: whether an output tensor need not be in the other models, or of another shape there: it is not merged.
        part: the stored tensors of a model that take part, by their names there.

    Returns: everything found, refusals included (`problems`).
    """
    problems = Problems()
    files = primary.side_files()
    if primary.is_file:
        problems.note(
            f"{primary.label}: is a file of tensors, merged by their names: the output has no config.json and no tokenizer."
        )
    # The first model's tensors that take part, and what is left out.
    stored = _stored(primary, part)
    dropped = left_out(primary, stored)
    if dropped:
        problems.note(f"{primary.label}: left out, as loading ignores or recomputes them: {list_kinds(dropped)}.")
    own = {file.name for file in primary.weights.files}
    lost = [name for name in list_left_out(primary.folder) if name not in own]
    if lost:
        more = f" and {len(lost) - 8:,} more" if len(lost) > 8 else ""
        problems.note(
            f"{primary.label}: files of its folder that the output does not get: {', '.join(lost[:8])}{more}."
        )
    _warn_of_lost_code(primary, files, problems)
    for model in (primary, *others):
        if any(info.dtype in FLOAT8 for _, parts in model.parts for file in parts for info in file.tensors.values()):
            problems.note(f"{model.label}: its float8 weights are multiplied with their scales.")
        if model.location.name.is_gguf:
            from checkpoints.gguf_files import gguf_note

            problems.note(gguf_note(model.location))
        if any(holds_mxfp4(file.tensors) for _, parts in model.parts for file in parts):
            problems.note(
                f"{model.label}: its MXFP4 weights are decoded to bfloat16, as loading without kernels for them does."
            )
    tensors = {name: TensorRef(primary.weights, name) for name in stored if name not in dropped}
    if layout.tie_word_embeddings is None and unties_itself(primary, stored, dropped):
        set_tied(files, False)
        problems.note(f"{primary.label}: its head is not its embedding; config.json says so in the output.")
    # Its head, as the user chose.
    head = _Head(tensors)
    if layout.tie_word_embeddings is not None:
        head = _choose_head(primary, tensors, layout.tie_word_embeddings, problems)
        if head.is_there:
            set_tied(files, layout.tie_word_embeddings)
    first = AlignedModel(primary, advice, stored, head.tensors)
    dtypes = {name: ref.info.plain_dtype for name, ref in first.tensors.items()}
    # The others: by name, then by vocabulary, then by shape.
    models = [first]
    models += [match_names(first, model, _stored(model, part), head.tied, optional=optional) for model in others]
    tables = align_vocabularies(models, layout, files, problems)
    models = add_modules(tables.models, problems)
    dtypes |= {name: info.plain_dtype for name, info in primary.weights.modules.tensors.items()}
    models[1:] = [check_shapes(models[0], model, tables.refused, optional) for model in models[1:]]
    # Gather what does not fit, and what was decided.
    for aligned in models:
        if aligned.problems and (other := _other_class(models[0], aligned)):
            problems.add(other)
        problems.take(aligned.problems)
    decided = replace(layout, tokenizer_source=tables.tokenizer_source, new_token_rows=tables.new_token_rows)
    return Alignment(models, dtypes, files, decided, problems)


def _other_class(first: AlignedModel, model: AlignedModel) -> str:
    """That a model which does not fit is of another family, which is why; empty where it is of the same."""
    ours, theirs = (str((aligned.model.config.get("architectures") or [""])[0]) for aligned in (first, model))
    if not ours or not theirs or ours == theirs:
        return ""
    says = f"{model.label}: expected a {ours} as {first.label}, got a {theirs}"
    return "" if any(str(problem).startswith(says) for problem in model.problems) else f"{says}. {model.advice}"


def _warn_of_lost_code(primary: Model, files: SideFiles, problems: Problems) -> None:
    """Warn where config.json names Python files of the model's own that the output does not get: it would not load."""
    named = primary.config.get("auto_map")
    classes = [name for name in named.values() if isinstance(name, str)] if isinstance(named, dict) else []
    modules = {name.rpartition(".")[0] for name in classes if "--" not in name}  # the others lie in another repo
    lost = sorted(f"{module}.py" for module in modules if module and f"{module}.py" not in files)
    if lost:
        fetch = not primary.location.name.is_local and not primary.trust_remote_code
        how = (
            f"Add {setting('trust_remote_code')}, which fetches it and lets it run, if you know and trust it."
            if fetch
            else "Add the missing files to its folder."
        )
        problems.warn(
            f"{primary.label}: config.json: expected the model's own code in {', '.join(lost)}, got no such file, and the output does not load "
            f"without. {how}"
        )


def _stored(model: Model, part: Callable[[Model], Iterable[str]]) -> dict[str, TensorInfo]:
    return {name: model.weights.tensors[name] for name in part(model)}


@dataclass(frozen=True)
class _Head:
    """The output's tensors once its head is decided.

    Attributes:
        tied: the head that the output ties -> the embedding that it is tied to; empty where it is not tied by request.
        is_there: whether the model has a head and an embedding at all.
    """

    tensors: dict[str, TensorRef]
    tied: Mapping[str, str] = field(default_factory=dict)
    is_there: bool = False


def _choose_head(primary: Model, tensors: Mapping[str, TensorRef], tie: bool, problems: Problems) -> _Head:
    """Give the output a head of its own, or tie it to the embedding, as the user asked."""
    architecture = primary.architecture
    tensors = dict(tensors)
    head, embedding = architecture.output_head, architecture.input_embedding
    chosen = setting("tie_word_embeddings", "yes" if tie else "no")
    if head is None or embedding is None or architecture.stored_name(embedding) not in tensors:
        problems.add(
            InputError(f"{chosen}: {primary.label} has no head and embedding of one vocabulary. Leave it out.")
        )
        return _Head(tensors)
    embedding = architecture.stored_name(embedding)
    if not tie:
        if head not in tensors:
            # In the base's own order a head may stand anywhere; names are sorted when they are written.
            tensors[head] = TensorRef(primary.weights, embedding)
            problems.note(f"{primary.label}: {head} is tied to {embedding} there; the output gets a head of its own.")
        return _Head(tensors, is_there=True)
    if head in tensors and head != embedding:
        if not equal_tensors(primary.weights, head, embedding):
            problems.add(f"{chosen}: {primary.label}: {head} and {embedding} hold different numbers. Leave it out.")
        del tensors[head]
        problems.note(f"{primary.label}: {head} is left out, as it equals {embedding}, to which the output ties it.")
    return _Head(tensors, {head: embedding}, is_there=True)
