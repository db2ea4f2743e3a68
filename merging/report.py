"""The merge report: how large the task vectors are, how alike, how often they disagree, how far the result is from the base."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from streaming.blocks import GRID_ELEMENTS, Block, Region, kind_of

SAMPLE_EVERY = 16
DIGITS = 4


@dataclass
class _Sums:
    """Sums over the sampled elements of one kind of layer."""

    models: int
    elements: int = 0
    changed: int = 0
    conflicts: int = 0
    base: float = 0.0
    merged: float = 0.0
    gram: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.models, self.models, dtype=torch.float64)

    def add(self, other: _Sums) -> None:
        self.elements += other.elements
        self.changed += other.changed
        self.conflicts += other.conflicts
        self.base += other.base
        self.merged += other.merged
        self.gram += other.gram


class DeltaReport:
    """Collects the report while the merge streams by.

    Args:
        models: names of the fine-tuned models, in order.
        full: look at every element rather than at one grid block in 16 (the first of each tensor among them).
    """

    def __init__(self, models: Sequence[str], *, full: bool = False):
        self.models = list(models)
        self.full = full
        self._sums: dict[str, _Sums] = {}
        self._lock = threading.Lock()

    def sampled(self, region: Region) -> list[slice]:
        """The parts of a region that are looked at, as slices of it."""
        if self.full:
            return [slice(0, region.numel)]
        first = -(-(region.start // GRID_ELEMENTS) // SAMPLE_EVERY) * SAMPLE_EVERY
        begins = range(first * GRID_ELEMENTS, region.stop, SAMPLE_EVERY * GRID_ELEMENTS)
        return [
            slice(max(begin, region.start) - region.start, min(begin + GRID_ELEMENTS, region.stop) - region.start)
            for begin in begins
        ]

    def observe(self, block: Block, sampled: Sequence[slice]) -> _Sums:
        """Look at a block before the method overwrites it; pass the result on to `record`."""
        assert block.base is not None
        sums = _Sums(len(self.models))
        for part in sampled:
            base = block.base[part]
            vectors = torch.stack(
                [v[part] for v in block.task_vectors] or [w[part] - base for w in block.weights]
            )  # [models, n]
            # By the extremes: `any` over the models costs twenty times as much, a quarter of a whole merge.
            up, down = vectors.amax(dim=0) > 0, vectors.amin(dim=0) < 0
            sums.elements += base.numel()
            sums.changed += count_true(up | down)
            sums.conflicts += count_true(up & down)
            sums.base += float(base.dot(base))
            sums.gram += (vectors @ vectors.T).double().cpu()
        return sums

    def record(self, block: Block, merged: torch.Tensor, sampled: Sequence[slice], sums: _Sums) -> None:
        """Add a block, now that it is merged: `merged` is `[region.numel]` float32, `sums` what `observe` returned."""
        assert block.base is not None
        for part in sampled:
            delta = merged[part] - block.base[part]
            sums.merged += float(delta.dot(delta))
        with self._lock:
            self._sums.setdefault(kind_of(block.region.tensor.name), _Sums(len(self.models))).add(sums)

    def _total(self) -> _Sums:
        total = _Sums(len(self.models))
        for sums in self._sums.values():
            total.add(sums)
        return total

    def as_json(self) -> dict[str, Any]:
        """The report for merge_recipe.json: `all` and one entry per kind of layer, numbers to 4 digits.

        Per entry: `relative_norm` |d_i| / |b| per model; `cosine` of each pair of task vectors; `sign_conflicts`, the share of
        the changed elements that two models pull in opposite directions; `merged_relative_norm` |merged - b| / |b|.
        """
        layers = {kind: self._entry(sums) for kind, sums in sorted(self._sums.items())}
        return {
            "sample": "full" if self.full else f"1/{SAMPLE_EVERY}",
            "all": self._entry(self._total()),
            "layers": layers,
        }

    def _entry(self, sums: _Sums) -> dict[str, Any]:
        norms = sums.gram.diagonal().sqrt().tolist()
        base = math.sqrt(sums.base)
        cosines = {
            f"{self.models[i]} ~ {self.models[j]}": _rounded(float(sums.gram[i, j]), norms[i] * norms[j])
            for i in range(len(norms))
            for j in range(i + 1, len(norms))
        }
        return {
            "relative_norm": {model: _rounded(norm, base) for model, norm in zip(self.models, norms, strict=True)},
            "cosine": cosines,
            "sign_conflicts": _rounded(sums.conflicts, sums.changed),
            "merged_relative_norm": _rounded(math.sqrt(sums.merged), base),
        }


def count_true(flags: torch.Tensor) -> int:
    """How many of at most 2^24 flags are set: `[n]` bool. Added as float32, exactly, which is faster than as bool."""
    return int(flags.to(torch.float32).sum())


def _rounded(numerator: float, denominator: float) -> float | None:
    """The quotient to 4 significant digits; None where there is nothing to divide by."""
    return float(f"{numerator / denominator:.{DIGITS}g}") if denominator else None


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people: one line per kind of layer, models numbered in order."""
    models = list(report["all"]["relative_norm"])
    pairs = [(i + 1, j + 1) for i in range(len(models)) for j in range(i + 1, len(models))]
    header = [
        "layer",
        *(f"|d{i + 1}|/|b|" for i in range(len(models))),
        *(f"cos{i},{j}" for i, j in pairs),
        "conflicts",
        "|merge|/|b|",
    ]
    rows = [header]
    for kind, entry in {**report["layers"], "all": report["all"]}.items():
        numbers = [
            *entry["relative_norm"].values(),
            *entry["cosine"].values(),
            entry["sign_conflicts"],
            entry["merged_relative_norm"],
        ]
        rows.append([kind.removesuffix(".weight"), *("-" if number is None else f"{number:.4f}" for number in numbers)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    names = "\n".join(f"  d{i}: {model}" for i, model in enumerate(models, 1))
    sample = "every element" if report["sample"] == "full" else f"a fixed sample of {report['sample']} of the blocks"
    return f"Merge report (d = fine-tuned minus base b; {sample}):\n{names}\n" + "\n".join(lines)
