"""Which tensor of a fine-tuned model stands for each tensor of the base: by name, with vocabulary rows by token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.reader import equal_tensors
from checkpoints.source import FLOAT_DTYPES, Source, TensorRef, dtype_name
from checkpoints.vocabulary import MISSING, AlignedRows, MeanRows, match_rows
from streaming.blocks import kind_of

MODELS_OF_THIS_BASE = "Give models fine-tuned from this base."


@dataclass
class Matched:
    """One model against the base.

    tensors: output tensor -> the model's tensor of equal shape; a buffer that the model does not store is not in it.
    refused: kind of tensor and what is wrong -> the tensors, in order; advice: what to do about it.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str | InputError] = field(default_factory=list)
    refused: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    advice: str = MODELS_OF_THIS_BASE

    def refuse(self, name: str, problem: str) -> None:
        """Note what is wrong with a tensor; what is wrong with forty layers alike becomes one problem."""
        self.refused.setdefault((kind_of(name), problem), []).append(name)

    def sum_up(self, label: str) -> None:
        """Turn what was refused into problems of the model `label`."""
        for (kind, problem), names in self.refused.items():
            more = f" and {len(names) - 1} more {kind}" if len(names) > 1 else ""
            self.problems.append(f"{label}: {names[0]}{more}: {problem}")


def match_model(
    base: Model,
    model: Model,
    names: Sequence[str],
    *,
    new_rows: Literal["base", "mean"] = "base",
    advice: str = MODELS_OF_THIS_BASE,
) -> Matched:
    """Find each tensor of `names`, the base's, in a model.

    Refused: a weight that is missing, extra or of another shape. Left out with a note: what loading ignores or
    recomputes, and a head equal to the embedding it is tied to. Vocabulary tables of another size or order have their
    rows matched by token string; a token that the model lacks takes the base's row.

    Args:
        base: decides names, shapes and vocabulary; model: is matched with it; names: the base's tensors to be found.
        new_rows: `mean` gives a token that the model lacks the mean of the model's own rows instead.
        advice: the last sentence of a refusal.
    """
    match = Matched(advice=advice)
    source, tables = _align_vocabulary(base, model, names, match, new_rows)
    ours, theirs = base.weights.tensors, source.tensors
    missing = [name for name in names if name not in theirs]
    wanted = set(names)  # fewer than the base's where the base itself stores a tied head, which then is extra here too
    extra = [name for name in theirs if name not in wanted and (name not in ours or name in base.architecture.tied)]
    for name in missing:
        _explain_missing(base, model, source, name, match)
    for name in extra:
        _explain_extra(base, model, name, match)
    for name in names:
        if name not in theirs:
            continue
        if theirs[name].shape != ours[name].shape:
            if name in tables:  # refused already, as a vocabulary
                continue
            match.refuse(
                name,
                f"expected shape {list(ours[name].shape)} as in {base.label}, got {list(theirs[name].shape)}. {advice}",
            )
        elif theirs[name].dtype.is_floating_point != ours[name].dtype.is_floating_point:
            match.refuse(
                name,
                f"expected {dtype_name(ours[name].dtype)} as in {base.label}, got {dtype_name(theirs[name].dtype)}. "
                f"{advice}",
            )
        else:
            match.tensors[name] = TensorRef(source, name)
    match.sum_up(model.label)
    return match


def _explain_missing(base: Model, model: Model, source: Source, name: str, match: Matched) -> None:
    twin = model.architecture.tied.get(name)
    if twin is not None and twin in source.tensors and source.tensors[twin].shape == base.weights.tensors[name].shape:
        # A token that the model lacks takes the base's row of this very tensor, not of the twin.
        match.tensors[name] = TensorRef(
            source.renamed({twin: name}) if isinstance(source, AlignedRows) else source, twin
        )
        match.notes.append(f"{model.label}: {name} is tied to {twin} there; that is used for it.")
    elif name in base.architecture.buffers or not base.weights.tensors[name].dtype.is_floating_point:
        match.notes.append(f"{model.label}: the buffer {name} is not stored there; the base's is kept.")
    else:
        match.refuse(name, f"expected as in {base.label}, got no such tensor. {match.advice}")


def _explain_extra(base: Model, model: Model, name: str, match: Matched) -> None:
    architecture = model.architecture
    if name in architecture.ignored:
        match.notes.append(f"{model.label}: {name} is left out, as loading ignores or recomputes it.")
        return
    twin = architecture.tied.get(name) or base.architecture.tied.get(name)
    if twin is not None and twin in model.weights.tensors:
        if equal_tensors(model.weights, name, twin):
            match.notes.append(
                f"{model.label}: {name} is left out, as it equals {twin}, to which {base.label} ties it."
            )
        else:
            match.refuse(
                name,
                f"expected equal to {twin}, to which {base.label} ties it, got other numbers. Merge models whose heads are tied alike.",
            )
        return
    match.refuse(name, f"expected no such tensor, as {base.label} has none, got one. {match.advice}")


def _align_vocabulary(
    base: Model, model: Model, names: Sequence[str], match: Matched, new_rows: Literal["base", "mean"]
) -> tuple[Source, set[str]]:
    """The model's weights with vocabulary rows in the base's order, and the names of the tables that were looked at."""
    same_tokens = base.vocabulary_digest == model.vocabulary_digest
    same_shapes = all(
        model.weights.tensors[name].shape == base.weights.tensors[name].shape
        for name in names
        if name in model.weights.tensors
    )
    if same_tokens and same_shapes:
        return model.weights, set()
    ours, theirs = base.vocabulary, model.vocabulary
    if ours is not None and theirs is not None and ours.ids == theirs.ids and same_shapes:
        return model.weights, set()
    tables = [name for name in vocabulary_tables(base) if name in model.weights.tensors]
    lost = [name for name in _ends(base) if base.architecture.stored_name(name) not in base.weights.tensors]
    if lost and ours is not None and theirs is not None and ours.ids != theirs.ids:
        match.problems.append(
            f"{base.label}: expected {lost[0]}, in which to match the other tokens of {model.label}, by config.json, got no such tensor. "
            "Use matching files."
        )
        return model.weights, set(tables)
    if not tables or not model.weights.tensors[tables[0]].shape:  # without rows: refused as any other shape is
        return model.weights, set()
    out_rows, rows = (one.weights.tensors[tables[0]].shape[0] for one in (base, model))
    if ours is None or theirs is None:
        nameless = (base if ours is None else model).label
        if out_rows == rows:
            match.notes.append(
                f"{nameless}: has no tokenizer; vocabulary rows of {model.label} are matched by position."
            )
            return model.weights, set()
        match.problems.append(
            f"{model.label}: {tables[0]}: expected {out_rows} rows as in {base.label}, got {rows}, and {nameless} has no tokenizer to match them by. "
            "Add its tokenizer files."
        )
        return model.weights, set(tables)
    uneven = [name for name in tables if not _is_table(base, model, name, out_rows, rows)]
    for name in uneven:
        match.refuse(
            name,
            f"expected {rows} rows like {tables[0]}, of a shape as in {base.label}, got {list(model.weights.tensors[name].shape)} for "
            f"{list(base.weights.tensors[name].shape)} there. {match.advice}",
        )
    if uneven:
        return model.weights, set(tables)
    row_of = match_rows(ours, out_rows, theirs, rows)
    used = int((row_of != MISSING).sum())
    unused = rows - used
    if used == out_rows and unused == 0 and torch.equal(row_of, torch.arange(out_rows)):
        return model.weights, set()
    if not used:
        match.problems.append(f"{model.label}: its tokenizer shares no token with that of {base.label}. {match.advice}")
        return model.weights, set(tables)
    match.notes.append(
        f"{model.label}: vocabulary rows are matched by token: {used} matched, {unused} of the model left out, "
        f"{out_rows - used} {'taken from ' + base.label if new_rows == 'base' else 'set to the mean row'}."
    )
    fallback = MeanRows(model.weights, tables) if new_rows == "mean" and used < out_rows else base.weights
    return AlignedRows(model.weights, fallback, row_of, {name: name for name in tables}), set()


def _is_table(base: Model, model: Model, name: str, out_rows: int, rows: int) -> bool:
    """Whether a tensor has a row for each token in both models, `out_rows` and `rows` of them, alike but for their number."""
    ours, theirs = base.weights.tensors[name], model.weights.tensors[name]
    alike = ours.dtype.is_floating_point and theirs.dtype.is_floating_point and ours.shape[1:] == theirs.shape[1:]
    return alike and ours.shape[:1] == (out_rows,) and theirs.shape[:1] == (rows,)


def _ends(model: Model) -> list[str]:
    """The embedding and the head, as far as the model has them, stored or not."""
    return [name for name in (model.architecture.input_embedding, model.architecture.output_head) if name is not None]


def vocabulary_tables(model: Model) -> list[str]:
    """The stored tensors whose rows belong to tokens: embedding, head, and what else is as long in their modules."""
    architecture = model.architecture
    stored = [name for name in _ends(model) if name in model.weights.tensors and model.weights.tensors[name].shape]
    if not stored:
        return []
    rows = model.weights.tensors[stored[0]].shape[0]
    modules = {architecture.placements[name].module for name in stored if name in architecture.placements}
    beside = [
        name
        for name, placement in architecture.placements.items()
        if placement.module in modules and name not in stored and model.weights.tensors[name].shape[:1] == (rows,)
    ]
    return stored + beside


def check_plain(model: Model) -> list[InputError]:
    """Refuse weights that are no plain floating-point numbers: quantised ones cannot be merged by arithmetic."""
    quantisation = model.config.get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "an unnamed method") if isinstance(quantisation, dict) else quantisation
        return [
            InputError(
                f"{model.label}: its weights are quantised ({kind}), which cannot be merged. Use the unquantised model."
            )
        ]
    tensors = model.weights.tensors
    packed = [
        name
        for name in tensors
        if re.search(r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\..*|weight_format)$", name)
    ]
    if packed:
        return [
            InputError(
                f"{model.label}: {packed[0]}: its weights are quantised (as GPTQ, AWQ or bitsandbytes store them), which cannot be merged. Use the unquantised model."
            )
        ]
    return [
        InputError(
            f"{model.label}: {name}: expected one of {', '.join(FLOAT_DTYPES)}, got {dtype_name(info.dtype)}. Use the unquantised model."
        )
        for name, info in tensors.items()
        if info.dtype not in FLOAT_DTYPES.values() and (name.endswith("weight") or info.dtype.is_floating_point)
    ][:1]


def left_out(model: Model) -> list[str]:
    """Tensors of a model that loading ignores or recomputes, and a head stored although it is tied: not written."""
    # Most checkpoints hold nothing of the kind, and building the model class to find out takes seconds.
    tensors = model.weights.tensors
    suspects = [name for name in tensors if not name.endswith(("weight", "bias"))]
    dropped = [name for name in suspects if name in model.architecture.ignored]
    tables = [name for name, info in tensors.items() if info.shape[:1] == (model.config.get("vocab_size"),)]
    if len(tables) > 1 and model.config.get("tie_word_embeddings") is not False:
        tied = model.architecture.tied
        dropped += [
            name for name in tables if tied.get(name) in tensors and equal_tensors(model.weights, name, tied[name])
        ]
    return dropped


def list_kinds(names: Sequence[str]) -> str:
    """The names, or their kinds with a count where there are many."""
    kinds = Counter(kind_of(name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
