"""What a merge_recipe.json says of a checkpoint: which merge it is, and how it was relaxed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reports.entries import CONTROLS, UNKNOWN_METHOD, Aim, Merge, ModelId

# What a run leaves beside the keys that decide the output's bytes.
_OUTCOME = {
    *("schema", "outputs", "side_files", "notes", "warnings", "report", "inputs", "versions", "command", "identity"),
    *("aim", "merged_recipe"),
}
_AIM_SETTINGS = ("scaling", "seed", "numerics")
_CALIBRATION_SETTINGS = ("source", "text_field", "n_samples", "block_size", "seed", "dtype")


def read_recipe(recipe: Mapping[str, Any]) -> tuple[Merge, Aim | None]:
    """The merge and its relaxation, of one run (`merge.py --omega`) or of two (`performAIM.py` on a merge).

    Args:
        recipe: a merge_recipe.json.

    Raises: KeyError, TypeError, ValueError, IndexError: it is none of ours.
    """
    inputs = [_model_id(entry) for entry in recipe["inputs"]]
    in_two_runs = "merged_recipe" in recipe
    aim = _aim(recipe, "performAIM.py" if in_two_runs else "merge.py") if "aim" in recipe else None
    if not in_two_runs:
        return _merge(recipe, inputs), aim
    if recipe["merged_recipe"] is None:
        merged = inputs[1]
        return Merge(UNKNOWN_METHOD, (merged,), {}, checkpoint_key(merged)), aim
    merge, earlier = read_recipe(recipe["merged_recipe"])
    if earlier is not None:  # relaxed twice: the merge without it is the one that was relaxed once
        before = {"relaxed before": " ".join(filter(None, (earlier.control, f"omega {earlier.omega}")))}
        key = f"{merge.key} {_canonical(recipe['merged_recipe']['aim'])}"
        merge = Merge(merge.method, merge.models, {**merge.settings, **before}, key)
    return merge, aim


def checkpoint_key(model: ModelId) -> str:
    """The key of a merge of which nothing is known but the checkpoint."""
    return f"checkpoint {model.key}"


def _model_id(entry: Mapping[str, Any]) -> ModelId:
    return model_id(entry["model"], entry.get("folder"), entry.get("revision"), entry.get("fingerprint"))


def model_id(name: object, folder: object, revision: object, fingerprint: object) -> ModelId:
    """A model as a file describes it. Raises ValueError: it has no name; what else is no text is not known."""
    if not isinstance(name, str) or not name:
        raise ValueError("a model without a name")
    known = [value if isinstance(value, str) else None for value in (folder, revision, fingerprint)]
    return ModelId(name, *known)


def _merge(recipe: Mapping[str, Any], inputs: Sequence[ModelId]) -> Merge:
    deciding = {key: value for key, value in recipe.items() if key not in _OUTCOME}
    keys = {model.name: model.key for model in inputs}
    base = recipe.get("base_model")
    models = tuple(inputs[1:] if inputs[0].name == base else inputs)
    settings: dict[str, str] = {"base": str(base)}
    for name, value in deciding.items():
        if name == "models":
            parameters = [entry.get("parameters", {}) for entry in value]
            for key in dict.fromkeys(key for own in parameters for key in own):
                values = [_text(own.get(key)) for own in parameters]
                settings[key] = values[0] if len(set(values)) == 1 else ",".join(values)
        elif name == "parameters":
            settings |= {key: _text(given) for key, given in value.items()}
        elif name not in ("merge_method", "base_model"):
            settings[name] = _text(value)
    return Merge(str(recipe["merge_method"]), models, settings, _canonical(_renamed(deciding, keys)))


def _aim(recipe: Mapping[str, Any], command: str) -> Aim:
    block = recipe["aim"]
    settings = {"made by": command, "out_dtype": _text(recipe["out_dtype"])}
    settings |= {key: _text(block.get(key)) for key in _AIM_SETTINGS}
    settings |= {f"calibration {key}": _text(block.get("calibration", {}).get(key)) for key in _CALIBRATION_SETTINGS}
    if block["control"] not in ("none", *CONTROLS):
        raise ValueError("an unknown control of AIM")
    control = "" if block["control"] == "none" else str(block["control"])
    return Aim(_text(block["omega"]), control, settings)


def _renamed(value: Any, keys: Mapping[str, str]) -> Any:
    """A recipe with models under their keys, whatever a user called them."""
    if isinstance(value, dict):
        return {name: _renamed(entry, keys) for name, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, keys) for entry in value]
    return keys.get(value, value) if isinstance(value, str) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else value if isinstance(value, str) else _canonical(value)
