"""Which tensor of a model stands for each tensor of the output: by name, or by the parameter that it becomes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.reader import equal_tensors
from checkpoints.source import FLOAT_DTYPES, TensorRef, dtype_name
from streaming.blocks import kind_of

MODELS_OF_THIS_BASE = "Give models fine-tuned from this base."


@dataclass
class Matched:
    """One model against the output's tensors.

    tensors: output tensor -> the model's; a buffer that the model does not store is not in it.
    own_names: output tensor -> its name in the model.
    refused: kind of tensor and what is wrong -> the tensors, in order; advice: what to do about it.
    """

    advice: str
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    own_names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str | InputError] = field(default_factory=list)
    refused: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def refuse(self, name: str, problem: str) -> None:
        """Note what is wrong with a tensor; what is wrong with forty layers alike becomes one problem."""
        self.refused.setdefault((kind_of(name), problem), []).append(name)

    def sum_up(self, label: str) -> None:
        """Turn what was refused into problems of the model `label`."""
        for (kind, problem), names in self.refused.items():
            more = f" and {len(names) - 1} more {kind}" if len(names) > 1 else ""
            self.problems.append(f"{label}: {names[0]}{more}: {problem}")


def match_names(
    primary: Model,
    model: Model,
    wanted: Mapping[str, TensorRef],
    tied: Mapping[str, str],
    *,
    advice: str = MODELS_OF_THIS_BASE,
    optional: Callable[[str], bool] = lambda name: False,
) -> Matched:
    """Find each tensor of the output in a model.

    By its name; else by the parameter that it becomes in the primary model's class, which a prefix of names may hide; a
    head that the model ties is its embedding. Refused: a tensor that is missing or extra. Left out with a note: what
    loading ignores or recomputes, and a head equal to the embedding it is tied to.

    Args:
        primary: gave the names; model: is matched with it; wanted: the output's tensors, in the primary model.
        tied: head -> embedding, where the user had the output tie them.
        advice: the last sentence of a refusal; optional: see `arrange`.
    """
    match = Matched(advice)
    ours, theirs = primary.weights.tensors, model.weights.tensors
    own = {name: name for name in wanted if name in theirs}
    missing = [name for name in wanted if name not in theirs]
    extra = [name for name in theirs if name not in wanted and (name not in ours or _is_head(primary, tied, name))]
    if missing and extra:
        aliases = _same_parameters(primary, model, missing, extra)
        if aliases:
            first = next(iter(aliases.items()))
            match.notes.append(
                f"{model.label}: {len(aliases)} tensors have other names there, such as {first[1]} for {first[0]}."
            )
        own |= aliases
        missing = [name for name in missing if name not in aliases]
        extra = [name for name in extra if name not in aliases.values()]
    for name in missing:
        if not optional(name):
            _explain_missing(primary, model, name, own, match)
    for name in extra:
        if not optional(name):
            _explain_extra(primary, model, name, own, tied, match)
    match.own_names = {name: own[name] for name in wanted if name in own}
    match.tensors = {name: TensorRef(model.weights, there) for name, there in match.own_names.items()}
    return match


def _is_head(primary: Model, tied: Mapping[str, str], name: str) -> bool:
    """Whether a tensor of the primary model that the output lacks is a head that it ties."""
    return name in tied or name in primary.architecture.tied


def _same_parameters(primary: Model, model: Model, missing: Sequence[str], extra: Sequence[str]) -> dict[str, str]:
    """Output tensor -> the model's tensor of another name that becomes the same parameter of the primary model's class."""
    shapes = {name: info.shape for name, info in model.weights.tensors.items()}
    found = primary.find_same(shapes)
    own = {found[name]: name for name in extra if name in found}
    return {name: own[name] for name in missing if name in own}


def check_shapes(
    primary: Model,
    model: Model,
    wanted: Mapping[str, TensorRef],
    tables: Collection[str],
    match: Matched,
    optional: Callable[[str], bool],
) -> None:
    """Refuse a model's tensors whose shape or kind of number is another than the output's; then sum up what was refused.

    Args:
        wanted: the output's tensors; tables: those that were refused already, as vocabularies.
    """
    for name, ref in wanted.items():
        if name not in match.tensors:
            continue
        expected, got = ref.info, match.tensors[name].info
        fits = got.shape == expected.shape and got.dtype.is_floating_point == expected.dtype.is_floating_point
        if not fits and optional(name):
            del match.tensors[name]
        elif got.shape != expected.shape and name not in tables:
            match.refuse(
                name,
                f"expected shape {list(expected.shape)} as in {primary.label}, got {list(got.shape)}. {match.advice}",
            )
        elif got.dtype.is_floating_point != expected.dtype.is_floating_point:
            match.refuse(
                name,
                f"expected {dtype_name(expected.dtype)} as in {primary.label}, got {dtype_name(got.dtype)}. {match.advice}",
            )
    match.sum_up(model.label)


def _explain_missing(primary: Model, model: Model, name: str, own: dict[str, str], match: Matched) -> None:
    twin = model.architecture.tied.get(name)
    if twin is not None and twin in model.weights.tensors:
        own[name] = twin
        match.notes.append(f"{model.label}: {name} is tied to {twin} there; that is used for it.")
    elif name in primary.architecture.buffers or (
        name in primary.weights.tensors and not primary.weights.tensors[name].dtype.is_floating_point
    ):
        match.notes.append(f"{model.label}: the buffer {name} is not stored there; that of {primary.label} is kept.")
    else:
        match.refuse(name, f"expected as in {primary.label}, got no such tensor. {match.advice}")


def _explain_extra(
    primary: Model, model: Model, name: str, own: Mapping[str, str], tied: Mapping[str, str], match: Matched
) -> None:
    architecture = model.architecture
    if name in architecture.ignored:
        match.notes.append(f"{model.label}: {name} is left out, as loading ignores or recomputes it.")
        return
    by_request = tied.get(name)
    twin = by_request or architecture.tied.get(name) or primary.architecture.tied.get(name)
    twin = own.get(twin, twin) if twin is not None else None
    if twin is not None and twin in model.weights.tensors:
        whose = "the output" if by_request else primary.label
        if equal_tensors(model.weights, name, twin):
            match.notes.append(f"{model.label}: {name} is left out, as it equals {twin}, to which {whose} ties it.")
        else:
            match.refuse(
                name,
                f"expected equal to {twin}, to which {whose} ties it, got other numbers. Use --tie_word_embeddings no, "
                "which gives the output a head of its own.",
            )
        return
    match.refuse(name, f"expected no such tensor, as {primary.label} has none, got one. {match.advice}")


def check_plain(model: Model) -> list[InputError]:
    """Refuse weights that are no plain floating-point numbers: quantised ones cannot be merged by arithmetic."""
    quantisation = model.side_files().read_json("config.json").get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "an unnamed method") if isinstance(quantisation, dict) else quantisation
        return [
            InputError(
                f"{model.label}: its weights are quantised ({kind}), which cannot be merged. Use the unquantised model{' under the adapter, as BASE+ADAPTER' if model.adapters else ''}."
            )
        ]
    tensors = model.weights.tensors
    packed = [
        name
        for name in tensors
        if re.search(
            r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\..*|weight_format|weight_packed|weight_zero_point|SCB|bitmask)$",
            name,
        )
    ]
    if packed:
        return [
            InputError(
                f"{model.label}: {packed[0]}: its weights are quantised (as GPTQ, AWQ, bitsandbytes or compressed-tensors store them), which cannot be merged. Use the unquantised model."
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
    suspects = [
        name
        for name, info in tensors.items()
        if not name.endswith("weight") and not (name.endswith("bias") and len(info.shape) == 1)
    ]
    dropped = [name for name in suspects if name in model.architecture.ignored]
    dropped += [name for name, twin in _stored_twice(model) if equal_tensors(model.weights, name, twin)]
    return dropped


def unties_itself(model: Model, dropped: Collection[str]) -> bool:
    """Whether a model's config ties its head to its embedding, and its files hold another one: loading compares them.

    Args:
        dropped: from `left_out`.
    """
    return any(name not in dropped for name, _ in _stored_twice(model))


def _stored_twice(model: Model) -> list[tuple[str, str]]:
    """Stored tensors that the config ties to other stored ones, and those."""
    tensors = model.weights.tensors
    tables = [name for name, info in tensors.items() if info.shape[:1] == (model.config.get("vocab_size"),)]
    if len(tables) < 2 or model.config.get("tie_word_embeddings") is False:
        return []
    tied = model.architecture.tied
    return [(name, tied[name]) for name in tables if tied.get(name) in tensors]


def list_kinds(names: Sequence[str]) -> str:
    """The names, or their kinds with a count where there are many."""
    kinds = Counter(kind_of(name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
