"""What a recipe file merges: its `models`, or its `slices`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints.errors import ArgumentError
from checkpoints.location import ModelName
from merging.methods.contract import Method
from merging.recipe import ModelInput, Slice, check_count, source_key, twice
from merging.recipe_pieces import Pieces
from streaming.values import Value, describe


def read_slices(
    file: Pieces, content: Mapping[str, Any], cls: type[Method] | None, base: ModelName | None
) -> tuple[Slice, ...]:
    """What is merged: `models`, or `slices`."""
    models, slices = content.get("models"), content.get("slices")
    if (models is None) == (slices is None):
        file.refuse("", f"expected models or slices, got {'neither' if models is None else 'both'}. Give one of them.")
        return ()
    if models is not None:
        sources = [
            _read_source(file, place, entry, ("model", "parameters", "data"), cls)
            for place, entry in file.entries("models", models)
        ]
        known = [source for source in sources if source is not None]
        return (_make_slice(file, "models", known, {}, cls, base),) if len(known) == len(sources) and known else ()
    parts = []
    for place, entry in file.entries("slices", slices):
        if not isinstance(entry, dict):
            file.refuse(place, f"expected the key sources, got {describe(entry)}.")
            continue
        file.check_keys(place, entry, ("sources", "parameters"))
        keys = ("model", "layer_range", "parameters")
        listed = file.entries(f"{place}.sources", entry.get("sources"))
        sources = [_read_source(file, inner, one, keys) for inner, one in listed]
        own = file.read_values(f"{place}.parameters", entry.get("parameters"), shared=True)
        known = [source for source in sources if source is not None]
        if known and len(known) == len(sources):
            parts.append(_make_slice(file, place, known, own, cls, base))
    return tuple(parts)


def _read_source(
    file: Pieces, place: str, entry: Any, keys: Sequence[str], cls: type[Method] | None = None
) -> ModelInput | None:
    """One model with its parameters, its layers in a slice, and its text where the method `cls` needs it."""
    if not isinstance(entry, dict) or "model" not in entry:
        file.refuse(
            place,
            f"expected the key model, got {', '.join(map(str, entry)) if isinstance(entry, dict) else describe(entry)}.",
        )
        return None
    file.check_keys(place, entry, (*keys, "revision"))
    name = file.read_model(f"{place}.model", entry["model"])
    if entry.get("revision") is not None and name is not None:
        name = file.with_revision(f"{place}.revision", name, entry["revision"])
    parameters = file.read_values(f"{place}.parameters", entry.get("parameters"), shared=False)
    layers = None
    if "layer_range" in keys:
        layers = _read_layers(file, f"{place}.layer_range", entry.get("layer_range"))
    data = file.read_text(f"{place}.data", entry.get("data"))
    if data is not None and cls is not None and not cls.needs_data:
        file.note(f"{place}.data has no effect: {file.method} does not use it.")
        data = None
    return None if name is None else ModelInput(name, parameters, layers, data)


def _read_layers(file: Pieces, place: str, content: Any) -> tuple[int, int] | None:
    """`[first, one after the last]`."""
    is_pair = isinstance(content, list) and len(content) == 2 and all(type(part) is int for part in content)
    if is_pair and 0 <= content[0] < content[1] <= 1_000_000:
        return content[0], content[1]
    file.refuse(place, f"expected [FIRST, END], the first layer and the one after the last, got {describe(content)}.")
    return None


def _make_slice(
    file: Pieces,
    place: str,
    listed: Sequence[ModelInput],
    own: Mapping[str, Value],
    cls: type[Method] | None,
    base: ModelName | None,
) -> Slice:
    """A slice of what the file lists: the base is no model of its own where the method works against it."""
    for name in twice(source.name for source in listed):
        file.refuse(place, f"{name} is named twice. Give it once, with the sum of its weights.")
    is_sliced = place != "models"
    lengths = {source.layers[1] - source.layers[0] for source in listed if source.layers}
    if len(lengths) > 1:
        file.refuse(
            place,
            f"expected as many layers of each model, got {', '.join(map(str, sorted(lengths)))}. Name equally many.",
        )
    if cls is None:
        return Slice(tuple(listed), own)
    bases = [source for source in listed if base is not None and source_key(source.name) == source_key(base)]
    against_base = base is not None and cls.reads_base
    if is_sliced and len(listed) == 1 and ((cls.space == "weights" and not cls.additive) or (against_base and bases)):
        return Slice(tuple(listed), own, as_is=True)
    sources = [source for source in listed if not (against_base and source in bases)]
    base_layers = None
    if against_base and is_sliced:
        ranges = {source.layers for source in (bases or sources)}
        base_layers = ranges.pop() if len(ranges) == 1 else None
        if base_layers is None:
            file.refuse(place, f"expected {base} among the sources, to know which of its layers belong here. Add it.")
    if cls.needs_data:
        if is_sliced:
            file.refuse(place, f"{file.method} merges whole models, which it runs. Name them under models.")
        for source in sources:
            if source.data is None and not is_sliced:
                file.refuse(
                    place,
                    f"{source.name}: {file.method} needs text of the model's own task. Add the key data, a file.",
                )
    try:
        check_count(cls, file.method, len(sources))
    except ArgumentError as error:
        file.refuse(place, error.marked)
    return Slice(tuple(sources), own, base_layers, bool(bases) and against_base)
