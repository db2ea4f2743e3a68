"""Check whether models of equal shapes compute alike: compare configs by what they mean, not by how they spell it.

The output has the first model's config. A fine-tune that another config was meant for computes something else with it: with
other rotary frequencies or another activation a little, with other heads nothing sensible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.problems import Problems
from checkpoints.settings import setting

LONGEST_KEY = 100
"""Characters of an entry's name; no class has a longer one, and a stranger's may have millions."""

_COMPUTES_NOTHING = re.compile(
    r"(^|\.)(_.*|transformers_version|architectures|torch_dtype|dtype|model_type|auto_map|id2label|label2id|problem_type|use_cache"
    r"|vocab_size|.*token_ids?|.*token_index|tie_word_embeddings|initializer.*|.*dropout.*|.*pdrop|pretraining_tp|output_\w+|return_dict"
    r"|.*_loss\w*|.*_coef|.*jitter.*|summary_.*|chunk_size.*|num_hidden_layers|n_layers?|num_layers|max_window_layers|use_sliding_window"
    r"|quantization_config|num_nextn_predict_layers|original_max_position_embeddings|use_mems.*"
    r"|gradient_checkpointing|max_length|min_length)($|\.)"
)
"""Entries that decide nothing of what a forward pass computes from tensors of given shapes, or that are compared elsewhere."""
_HEADS = re.compile(r"(^|\.)(n_heads?|num_heads|num_\w*heads|num_kv_heads|n_head_kv|multi_query|(\w+_)?head_dim)$")
_LENGTHS = re.compile(
    r"(^|\.)(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|seq_length|max_seq_length)$"
)
_FUNCTIONS = re.compile(r"act|function|rope_type|norm_type|embedding_type|scoring")
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
}
"""Names of one and the same function."""


def check_configs(models: Sequence[Model], allowed: str | None, problems: Problems, *, is_base: bool = True) -> None:
    """Compare what the others' configs have a model compute with what the first one's does.

    Refused: heads of another number or width, unless they are allowed. Warned of: everything else that computes otherwise.
    Noted: other window lengths.

    Args:
        models: the one whose config the output has first; all others have tensors of its shapes.
        allowed: entries, separated by commas, that may differ: noted and no more.
        problems: gets refusals, warnings and notes.
        is_base: whether the first one is the base of the others.
    """
    models = [] if models[0].is_file else [model for model in models if not model.is_file]  # files have no config
    if not models:
        return
    first, *others = models
    free = {key.strip() for key in (allowed or "").split(",") if key.strip()}
    differences = {model.label: different for model in others if (different := _differences(first, model))}
    for label, different in differences.items():
        heads: dict[str, str] = {}
        serious = []
        for key, (ours, theirs) in different.items():
            said = f"{key} {_text(theirs)} ({_text(ours)} in {first.label})"
            if key in free or key.rpartition(".")[2] in free:
                problems.note(
                    f"{label}: config.json has {said}, which was allowed; the output has that of {first.label}."
                )
            elif _HEADS.search(key):
                heads[key] = said
            elif _LENGTHS.search(key):
                problems.note(f"{label}: config.json has {said}; the output has that of {first.label}.")
            else:
                serious.append(said)
        if heads:
            problems.add(
                f"{label}: config.json: expected the heads of {first.label}, got {', '.join(heads.values())}: matrices of the same shapes mean "
                f"something else. Merge models with the same heads, or let it through with {setting('allow_config_difference', ','.join(heads))}."
            )
        if serious:
            problems.warn(
                f"{label}: its config.json has {', '.join(serious)}: it computes otherwise than with the config of {first.label}, which the "
                f"output gets."
            )
    if is_base:
        _suspect_base(first, others, differences, free, problems)
    _note_lengths(models, differences, problems)


def _suspect_base(
    first: Model,
    others: Sequence[Model],
    differences: Mapping[str, Mapping[str, tuple[Any, Any]]],
    free: set[str],
    problems: Problems,
) -> None:
    """Warn where all models agree against the one whose config the output has."""
    if not others or any(model.label not in differences for model in others):
        return
    each = [differences[model.label] for model in others]
    shared = [
        key
        for key in each[0]
        if not _LENGTHS.search(key)
        and not {key, key.rpartition(".")[2]} & free
        and all(key in different and different[key][1] == each[0][key][1] for different in each)
    ]
    if shared:
        agree = ", ".join(f"{key} {_text(each[0][key][1])}" for key in shared)
        whose = f"{others[0].label} has" if len(others) == 1 else "all models have"
        problems.warn(
            f"{whose} {agree}, and {first.label} has not: it is probably not the base that they were fine-tuned from. Name that one. To "
            f"keep this one with their config, copy the config.json of {others[0].label} over that in the output."
        )


def _note_lengths(
    models: Sequence[Model], differences: Mapping[str, Mapping[str, tuple[Any, Any]]], problems: Problems
) -> None:
    """Note the longest window that a model offers, where the output's is shorter."""
    longest: dict[str, tuple[int, str]] = {}
    for label, different in differences.items():
        for key, (ours, theirs) in different.items():
            if _LENGTHS.search(key) and isinstance(theirs, int) and isinstance(ours, int):
                longest[key] = max(longest.get(key, (ours, models[0].label)), (theirs, label), key=lambda one: one[0])
    for key, (length, label) in longest.items():
        if label != models[0].label:
            problems.note(
                f"the largest {key} is {length:,}, that of {label}; the output's config.json can be given it."
            )


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else f"{json.dumps(value, default=str):.80}"


def _differences(first: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """Entry -> the first model's value, and the other's, where they mean different things."""
    ours, theirs = (dict(_entries(_plain(model.config))) for model in (first, other))
    if ours == theirs:
        return {}
    with suppress(InputError):  # of a class that is not known; else what a config leaves out is filled in
        ours, theirs = (dict(_entries(config)) for config in _resolved(first, other))
    return {
        key: (ours[key], theirs[key])
        for key in ours
        if key in theirs and ours[key] != theirs[key] and _decides(key, ours[key], theirs[key])
    }


def _decides(key: str, *values: Any) -> bool:
    """Whether an entry is no text, such as a version or a date, or names a function."""
    return not any(isinstance(value, str) for value in values) or _FUNCTIONS.search(key) is not None


def _resolved(first: Model, other: Model) -> list[dict[str, Any]]:
    """Both configs with what their classes fill in; of models of two types, those of their text parts."""
    from checkpoints.meta_model import load_config

    configs = [
        load_config(model.folder, label=model.label, trust_remote_code=model.trust_remote_code)
        for model in (first, other)
    ]
    if configs[0].model_type != configs[1].model_type:
        configs = [config.get_text_config() for config in configs]
    return [_with_head_dim(config.to_dict()) for config in configs]


def _with_head_dim(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which nothing stands for what the rest says: a width of heads, key heads."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is int and type(hidden) is int and heads > 0 and config.get("head_dim") is None:
        config["head_dim"] = hidden // heads
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    return config


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the spelling of transformers 5, as far as that needs no class: where rotary frequencies stand."""
    plain = {
        key: _plain(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    scaling = plain.pop("rope_scaling", None)
    theta = plain.pop("rope_theta", None)
    if "rope_parameters" not in plain and (scaling or theta is not None):
        given = {"rope_type" if key == "type" else key: value for key, value in (scaling or {}).items()}
        plain["rope_parameters"] = (
            {"rope_type": "default"} | ({"rope_theta": theta} if theta is not None else {}) | given
        )
    return plain


def _entries(config: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """What decides a forward pass, by dotted name; functions by one name each."""
    for key, value in config.items():
        name = f"{parent}{key}"
        if len(key) > LONGEST_KEY or _COMPUTES_NOTHING.search(key):
            continue
        if isinstance(value, dict):
            yield from _entries(value, f"{name}.")
        elif isinstance(value, str):
            yield name, _ACTIVATIONS.get(value, value)
        elif not (key == "partial_rotary_factor" and value == 1):
            yield name, value
