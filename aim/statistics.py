"""Activation statistics per input channel, and the file they are kept in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError
from checkpoints.safetensors_format import load_tensors, pack_tensors, read_metadata, save_tensors, unpack_tensors
from checkpoints.settings import setting

SCHEMA = "aim-activations/1"


@dataclass(frozen=True)
class ChannelStatistics:
    """What the input of one weight looked like over the calibration text.

    mean_abs: `[in]` float32 (`[experts, in]` for experts that are stored fused), mean |x| per input channel; the published
        sums of block means under `reference` numerics.
    mean_sq: the same shape, mean x².
    tokens: `[]` int64 (`[experts]`): rows of the input that were counted; a per-head norm sees tokens times heads.
    """

    mean_abs: torch.Tensor
    mean_sq: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Activations:
    """The statistics of a base model.

    statistics: checkpoint tensor -> what its module's input looked like.
    silent: checkpoint tensor -> why it has no statistics.
    base: fingerprint of the base's weights; calibration: how they were taken (`CalibrationData`, dtype, numerics, versions).
    """

    statistics: Mapping[str, ChannelStatistics]
    base: str
    calibration: Mapping[str, Any]
    silent: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of all numbers, with their names."""
        found = hashlib.sha256()
        for name, one in sorted(self.statistics.items()):
            for key in ("mean_abs", "mean_sq", "tokens"):
                found.update(f"{name}.{key}\0".encode())
                found.update(getattr(one, key).contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def renamed(self, names: Mapping[str, str]) -> Activations:
        """The same under other tensor names: old -> new; the rest keep theirs."""
        statistics = {names.get(key, key): value for key, value in self.statistics.items()}
        silent = {names.get(key, key): why for key, why in self.silent.items()}
        return Activations(statistics, self.base, self.calibration, silent)

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all. Raises InputError: it cannot be written."""
        save_tensors(path, *self._as_tensors())

    def pack(self) -> list[bytes | memoryview]:
        """What `save` writes, in pieces."""
        return pack_tensors(*self._as_tensors())

    def _as_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """As safetensors: `NAME.mean_abs`, `NAME.mean_sq`, `NAME.tokens`; the rest as metadata."""
        tensors = {
            f"{name}.{key}": getattr(statistics, key)
            for name, statistics in self.statistics.items()
            for key in ("mean_abs", "mean_sq", "tokens")
        }
        metadata = {
            "schema": SCHEMA,
            "base": self.base,
            "calibration": json.dumps(dict(self.calibration), sort_keys=True),
            "silent": json.dumps(dict(self.silent), sort_keys=True),
        }
        return tensors, metadata


def is_activations_file(path: Path, label: str) -> bool:
    """Whether `Activations.save` wrote a safetensors file, by its header. Raises InputError: not one; it cannot be read."""
    try:
        return read_metadata(path, label).get("schema") == SCHEMA
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
        names = [key.removesuffix(".mean_abs") for key in tensors if key.endswith(".mean_abs")]
        statistics = {
            name: ChannelStatistics(tensors[f"{name}.mean_abs"], tensors[f"{name}.mean_sq"], tensors[f"{name}.tokens"])
            for name in names
        }
        calibration, silent = dict(json.loads(metadata["calibration"])), dict(json.loads(metadata["silent"]))
        activations = Activations(statistics, metadata["base"], calibration, silent)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where}: is damaged: {error}. Take the statistics again.") from None
    for name, one in statistics.items():
        if not _is_plausible(one):
            raise InputError(f"{where}: {name}: expected finite means >= 0 in float32. Take the statistics again.")
    return activations


def _is_plausible(one: ChannelStatistics) -> bool:
    means = (one.mean_abs, one.mean_sq)
    return (
        all(mean.dtype == torch.float32 and bool(((mean >= 0) & mean.isfinite()).all()) for mean in means)
        and one.mean_sq.shape == one.mean_abs.shape
        and one.mean_abs.ndim in (1, 2)
        and bool(one.mean_abs.any())
    )
