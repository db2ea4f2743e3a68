"""Activation statistics per input channel, and the file they are kept in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError
from checkpoints.pieces import Origin
from checkpoints.safetensors_format import load_tensors, pack_tensors, read_metadata, save_tensors, unpack_tensors
from checkpoints.settings import setting

SCHEMA = "aim-activations/2"
SCHEMAS = ("aim-activations/1", SCHEMA)
AFTER_FIRST = "after_first."


@dataclass(frozen=True)
class Means:
    """Means over rows of an input.

    Attributes:
        mean_abs: `[in]` float32 (`[experts, in]` for experts that are stored fused), mean |x| per input channel; the published
            sums of block means under `reference` numerics.
        mean_sq: the same shape, mean x².
        tokens: `[]` int64 (`[experts]`): rows of the input that were counted; a per-head norm sees tokens times heads.
        mean: the same shape as `mean_abs`, mean x; None in statistics that did not keep it.
    """

    mean_abs: torch.Tensor
    mean_sq: torch.Tensor
    tokens: torch.Tensor
    mean: torch.Tensor | None = None


@dataclass(frozen=True)
class ChannelStatistics(Means):
    """What the input of one weight looked like over the calibration text.

    Attributes:
        max_abs: the same shape as `mean_abs`, the largest |x|.
        max_at: the same shape int64, the position of its token in its
            block, -1 where that cannot be told. None in statistics that did not keep them.
        after_first: means over all rows but those of the first token of each block, which takes massive activations on itself.
    """

    max_abs: torch.Tensor | None = None
    max_at: torch.Tensor | None = None
    after_first: Means | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is there, under the keys of the statistics file."""
        kept = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        after = vars(self.after_first) if self.after_first else {}
        return kept | {AFTER_FIRST + key: value for key, value in after.items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> ChannelStatistics:
        """What `tensors` gave. Raises KeyError where what schema 1 has is missing."""
        after = {key.removeprefix(AFTER_FIRST): value for key, value in tensors.items() if key.startswith(AFTER_FIRST)}
        own = {key: value for key, value in tensors.items() if not key.startswith(AFTER_FIRST)}
        own = {key.name: own[key.name] for key in fields(cls) if key.name in own}
        if missing := {"mean_abs", "mean_sq", "tokens"} - own.keys():
            raise KeyError(sorted(missing)[0])
        return cls(**own, after_first=Means(**after) if after else None)

    def of_expert(self, expert: int) -> ChannelStatistics:
        """Those of one of several experts."""
        return ChannelStatistics.of({key: value[expert] for key, value in self.tensors().items()})


def stack_statistics(ones: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """Of experts `[in]` each to those of all, `[experts, in]`. What an expert that saw no token lacks is 0 there."""
    whole = [statistics.tensors() for statistics in ones]
    keys = {key for statistics, tensors in zip(ones, whole, strict=True) if bool(statistics.tokens) for key in tensors}
    keys -= {
        key
        for statistics, tensors in zip(ones, whole, strict=True)
        if bool(statistics.tokens)
        for key in keys - tensors.keys()
    }
    empty = {key: torch.zeros_like(ones[0].tokens if key.endswith("tokens") else ones[0].mean_abs) for key in keys}
    return ChannelStatistics.of(
        {key: torch.stack([statistics.get(key, empty[key]) for statistics in whole]) for key in sorted(keys)}
    )


def _without_gaps(experts: Sequence[ChannelStatistics | None]) -> list[ChannelStatistics]:
    """Those of several experts; zero for one that has none, as it saw no token."""
    some = next(expert for expert in experts if expert is not None)
    none = ChannelStatistics.of({key: torch.zeros_like(value) for key, value in some.tensors().items()})
    return [none if expert is None else expert for expert in experts]


@dataclass(frozen=True)
class Activations:
    """The statistics of a base model.

    Attributes:
        statistics: checkpoint tensor -> what its input looked like.
        base: fingerprint of the base's weights.
        calibration: how they were taken (`CalibrationData`, dtype, numerics, versions).
        silent: checkpoint tensor -> why it has no statistics.
        input_dims: checkpoint tensor -> its dimension that runs over input channels, as the forward pass showed it; empty in
            statistics that did not keep it.
    """

    statistics: Mapping[str, ChannelStatistics]
    base: str
    calibration: Mapping[str, Any]
    silent: Mapping[str, str] = field(default_factory=dict)
    input_dims: Mapping[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of all numbers, with their names."""
        digest = hashlib.sha256()
        for name, statistics in sorted(self.statistics.items()):
            for key, value in statistics.tensors().items():
                digest.update(f"{name}.{key}\0".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def renamed(self, origins: Mapping[str, Sequence[Origin]]) -> Activations:
        """The same for output tensors that are other ones in the base's files; see `Selection.renamed`."""
        used = {origin.name for parts in origins.values() for origin in parts}
        statistics = {name: origin for name, origin in self.statistics.items() if name not in used}
        silent = {name: why for name, why in self.silent.items() if name not in used}
        dims = {name: dim for name, dim in self.input_dims.items() if name not in used}
        for name, parts in origins.items():
            first = parts[0]
            known = [self.statistics.get(origin.name) for origin in parts]
            if first.name in self.input_dims:
                packed = int(len(parts) > 1) - int(first.expert is not None)
                dims[name] = self.input_dims[first.name] + packed
            if all(origin is None for origin in known):
                silent[name] = self.silent.get(first.name, "no statistics")
            elif len(parts) == 1:
                assert known[0] is not None
                statistics[name] = known[0] if first.expert is None else known[0].of_expert(first.expert)
            else:
                statistics[name] = stack_statistics(_without_gaps(known))
        return Activations(statistics, self.base, self.calibration, silent, dims)

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all. Raises InputError: it cannot be written."""
        save_tensors(path, *self._as_tensors())

    def pack(self) -> list[bytes | memoryview]:
        """What `save` writes, in pieces."""
        return pack_tensors(*self._as_tensors())

    def _as_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """As safetensors: `NAME.mean_abs`, `NAME.mean_sq`, `NAME.tokens`; the rest as metadata."""
        tensors = {
            f"{name}.{key}": value
            for name, statistics in self.statistics.items()
            for key, value in statistics.tensors().items()
        }
        metadata = {
            "schema": SCHEMA,
            "base": self.base,
            "calibration": json.dumps(dict(self.calibration), sort_keys=True),
            "silent": json.dumps(dict(self.silent), sort_keys=True),
            "input_dims": json.dumps(dict(self.input_dims), sort_keys=True),
        }
        return tensors, metadata


def is_activations_file(path: Path, label: str) -> bool:
    """Whether `Activations.save` wrote a safetensors file, by its header. Raises InputError: not one; it cannot be read."""
    try:
        return read_metadata(path, label).get("schema") in SCHEMAS
    except OSError as error:
        raise InputError(f"{label} {path}: cannot be read: {error.strerror}. Check the path.") from None


def load_activations(path: Path) -> Activations:
    """Read what `Activations.save` wrote. Raises InputError: no such file, another kind of file, numbers that cannot be."""
    if not is_activations_file(path, setting("statistics")):
        raise InputError(
            f"{setting('statistics', path)}: expected a file written by {setting('save_activations')} ({SCHEMA}), got another."
        )
    return _as_activations(*load_tensors(path, setting("statistics")), setting("statistics", path))


def unpack_activations(content: bytes, where: str) -> Activations:
    """What `Activations.pack` gave. Raises InputError: something else; `where` names it."""
    return _as_activations(*unpack_tensors(content, where), where)


def _as_activations(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], where: str) -> Activations:
    try:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(f".{AFTER_FIRST}") if f".{AFTER_FIRST}" in key else key.rpartition(".")
            parts.setdefault(name, {})[(AFTER_FIRST if f".{AFTER_FIRST}" in key else "") + part] = tensor
        statistics = {name: ChannelStatistics.of(found) for name, found in parts.items()}
        calibration, silent = dict(json.loads(metadata["calibration"])), dict(json.loads(metadata["silent"]))
        dims = {str(name): int(dim) for name, dim in json.loads(metadata.get("input_dims", "{}")).items()}
        activations = Activations(statistics, metadata["base"], calibration, silent, dims)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where}: is damaged: {error}. Take the statistics again.") from None
    for name, channels in statistics.items():
        if not _is_plausible(channels):
            raise InputError(f"{where}: {name}: expected finite means >= 0 in float32. Take the statistics again.")
    return activations


def _is_plausible(statistics: ChannelStatistics) -> bool:
    tensors = statistics.tensors()
    return (
        all(
            value.isfinite().all() and value.dtype == torch.float32 and value.shape == statistics.mean_abs.shape
            for key, value in tensors.items()
            if not key.endswith(("tokens", "max_at"))
        )
        and all(bool((value >= 0).all()) for key, value in tensors.items() if key.endswith(("_abs", "_sq", "tokens")))
        and statistics.mean_abs.ndim in (1, 2)
        and bool(statistics.mean_abs.any())
    )
