"""What a model's files hold: plain numbers or not, tensors that loading ignores, a head stored although it is tied."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.reader import equal_tensors
from checkpoints.source import FLOAT_DTYPES, TensorInfo, dtype_name

_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\..*|weight_format|weight_packed|weight_zero_point|SCB|bitmask)$"
)


def check_plain(model: Model) -> Problems:
    """Refuse weights that are no plain floating-point numbers: quantised ones cannot be merged by arithmetic."""
    problem = _not_plain(model)
    return Problems([] if problem is None else [problem])


def _not_plain(model: Model) -> InputError | None:
    if model.quantisation is not None:
        return InputError(
            f"{model.label}: its weights are quantised ({model.quantisation}), which cannot be merged. Use the unquantised model."
        )
    for name in model.weights.tensors:
        if _PACKED.search(name):
            return InputError(
                f"{model.label}: {name}: its weights are quantised (as GPTQ, AWQ, bitsandbytes or compressed-tensors store them), "
                "which cannot be merged. Use the unquantised model."
            )
    for name, info in (*model.weights.tensors.items(), *model.weights.modules.tensors.items()):
        if info.dtype not in FLOAT_DTYPES.values() and (name.endswith("weight") or info.dtype.is_floating_point):
            return InputError(
                f"{model.label}: {name}: expected one of {', '.join(FLOAT_DTYPES)}, got {dtype_name(info.dtype)}. Use the unquantised model."
            )
    return None


def left_out(model: Model, stored: Mapping[str, TensorInfo]) -> list[str]:
    """Stored tensors that loading ignores or recomputes, and a head stored although it is tied: not written."""
    # Most checkpoints hold nothing of the kind, and building the model class to find out takes seconds.
    suspects = [
        name
        for name, info in stored.items()
        if not name.endswith("weight") and not (name.endswith("bias") and len(info.shape) == 1)
    ]
    dropped = [name for name in suspects if name in model.known_architecture.ignored]
    dropped += [name for name, twin in _stored_twice(model, stored) if equal_tensors(model.weights, name, twin)]
    return dropped


def unties_itself(model: Model, stored: Mapping[str, TensorInfo], dropped: Collection[str]) -> bool:
    """Whether a model's config ties its head to its embedding, and its files hold another one: loading compares them.

    Args:
        dropped: from `left_out`.
    """
    return any(name not in dropped for name, _ in _stored_twice(model, stored))


def _stored_twice(model: Model, stored: Mapping[str, TensorInfo]) -> list[tuple[str, str]]:
    """Stored tensors that the config ties to other stored ones, and those."""
    tables = [name for name, info in stored.items() if info.shape[:1] == (model.config.get("vocab_size"),)]
    if len(tables) < 2 or model.config.get("tie_word_embeddings") is False:
        return []
    tied = model.known_architecture.tied
    return [(name, tied[name]) for name in tables if tied.get(name) in stored]
