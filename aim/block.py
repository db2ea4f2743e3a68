"""The `aim:` block of a recipe file: the same as AIM's flags, under keys of its own; importing this imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from checkpoints.errors import ArgumentError, InputError, Refusals, unknown

# Key of the block -> flag. What merge_recipe.json says under `calibration` uses the second names.
FLAGS = {
    "omega": "omega",
    "omegas": "omegas",
    "scaling": "scaling",
    "control": "control",
    "numerics": "numerics",
    "seed": "seed",
    "statistics": "activations",
}
CALIBRATION_FLAGS = {
    "source": "calibration_data",
    "text_field": "text_field",
    "n_samples": "n_samples",
    "block_size": "block_size",
    "seed": "calibration_seed",
    "batch_size": "batch_size",
    "dtype": "calibration_dtype",
    "tolerance": "calibration_tolerance",
    "mode": "calibration_mode",
    "max_memory": "max_memory",
}
RESULTS = ("base_fingerprint", "merged_fingerprint", "relaxed", "share_kept", "kept", "mean_change")
"""What merge_recipe.json has in the block besides: it says what came of it, and is passed over."""
CALIBRATION_RESULTS = (
    *("numerics", "texts", "too_long", "empty", "blocks", "dropped_tokens", "tokens", "difference"),
    *("threads", "attention", "passes", "transformers", "torch"),
)


def add_block(block: Mapping[str, Any], arguments: argparse.Namespace, where: str) -> None:
    """Set AIM's flags in `arguments` as a recipe's block says.

    Args:
        block: what the file holds under `aim`.
        arguments: with the flags of `add_aim_flags` and `--seed`; changed.
        where: the file, for messages.

    Raises: Refusals: an unknown key, a value that is no text and no number, a flag that says something else.
    """
    problems: list[str | InputError] = []
    texts = _read("aim", block, FLAGS, (*RESULTS, "calibration"), where, problems)
    calibration = block.get("calibration") or {}
    if isinstance(calibration, Mapping) and "activations" not in texts:
        texts |= _read("aim.calibration", calibration, CALIBRATION_FLAGS, CALIBRATION_RESULTS, where, problems)
    elif not isinstance(calibration, Mapping):
        problems.append(ArgumentError(f"{where}: aim.calibration: expected keys such as source, got {calibration!r}."))
    if "omega" not in texts and "omegas" not in texts and arguments.omega is None and arguments.omegas is None:
        problems.append(ArgumentError(f"{where}: aim: expected omega, got none. Add it, such as omega: 0.4."))
    for flag, text in texts.items():
        given = getattr(arguments, flag)
        if given is not None and str(given) != text:
            problems.append(ArgumentError(f"--{flag}: {where} says {text} under aim. Leave one of the two out."))
        setattr(arguments, flag, int(text) if flag == "seed" else text)
    if problems:
        raise Refusals(problems)


def block_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The block that says what AIM's flags say; None where none is given."""
    block = {key: _shortest(getattr(arguments, flag)) for key, flag in FLAGS.items() if key != "seed"}
    block["seed"] = arguments.seed if arguments.control == "permuted" else None
    calibration = {key: _shortest(getattr(arguments, flag)) for key, flag in CALIBRATION_FLAGS.items()}
    block["calibration"] = {key: value for key, value in calibration.items() if value is not None} or None
    return {key: value for key, value in block.items() if value is not None} or None


def _read(
    place: str,
    content: Mapping[str, Any],
    flags: Mapping[str, str],
    passed_over: tuple[str, ...],
    where: str,
    problems: list[str | InputError],
) -> dict[str, str]:
    """Flag -> the text that would be typed behind it."""
    texts = {}
    for key, value in content.items():
        if key in passed_over or value is None or (key == "statistics" and isinstance(value, Mapping)):
            continue
        if key not in flags:
            problems.append(ArgumentError(f"{where}: {place}: {unknown('key', str(key), [*flags, 'calibration'])}"))
            continue
        text = _text(value)
        if text is None or (key == "seed" and type(value) is not int):
            problems.append(ArgumentError(f"{where}: {place}.{key}: expected text or a number, got {value!r:.100}."))
        else:
            texts[flags[key]] = text
    return texts


def _text(value: Any) -> str | None:
    """What would be typed: `0.4`; `0,0.2` of a list of numbers; `mlp=0.2,0.4` of filters."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if not isinstance(value, list) or not value:
        return None
    parts = []
    for one in value:
        if isinstance(one, Mapping) and set(one) <= {"filter", "value"}:
            number, part = _text(one.get("value")), one.get("filter")
            parts.append(number if number is None or part is None or part == "*" else f"{part}={number}")
        else:
            parts.append(None if isinstance(one, list) else _text(one))
    return None if None in parts else ",".join(str(part) for part in parts)


def _shortest(text: str | None) -> Any:
    """A flag's text as a file has it: a number where it is one."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
