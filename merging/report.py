"""The merge report: how large the task vectors are, how alike, how often they disagree, how far the result is from the base."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch

from streaming.blocks import Block, Region
from streaming.elements import Number
from streaming.tally import SAMPLE_EVERY, Tally, sample_of

DIGITS = 4
ALIKE = 0.9
FAR = 0.1
MOSTLY = 0.8
"""Of the changed matrices, the share on which the task vectors are alike (mean cosine above `ALIKE`) and far (|d|/|b| above `FAR`)
that asks for another base: what models share is then mostly what sets the base apart from theirs."""


class DeltaReport:
    """Collects the report while the merge streams by.

    Args:
        models: names of the fine-tuned models, in order.
        full: look at every element rather than at one grid cell in 16 (the first of each tensor among them).

    Attributes:
        tally: numbers of elements, of changed and of contested ones, |b|², |merged - b|², and the Gram matrix of the task
            vectors, row by row.
    """

    def __init__(self, models: Sequence[str], *, full: bool = False):
        self.models = list(models)
        self.full = full
        self.tally = Tally(5 + len(models) ** 2, self._norms)

    def sampled(self, region: Region) -> list[slice]:
        """The parts of a region that are looked at, as slices of it."""
        return sample_of(region, 1 if self.full else SAMPLE_EVERY)

    def conditions(self, vectors: Sequence[Number]) -> list[Number]:
        """Whether some model changes an element, and whether two change it in opposite directions, from its task vectors."""
        up, down = ([vector > 0.0 for vector in vectors], [vector < 0.0 for vector in vectors])
        some_up, some_down = functools.reduce(operator.or_, up), functools.reduce(operator.or_, down)
        return [some_up | some_down, some_up & some_down]

    def observe(
        self, block: Block, sampled: Sequence[slice], counts: Sequence[Sequence[int]] | None = None
    ) -> list[list[float]]:
        """Look at a block before the method overwrites it; pass the result on to `record`.

        Args:
            counts: for each part for how many elements each of `conditions` holds, where that is known.
        """
        assert block.base is not None
        sums = []
        for number, part in enumerate(sampled):
            base = block.base[part]
            vectors = torch.stack(
                [v[part] for v in block.task_vectors] or [w[part] - base for w in block.weights]
            )  # [models, n]
            sums.append(
                [
                    base.numel(),
                    *(counts[number] if counts else map(count_true, self.conditions(list(vectors)))),
                    float(base.dot(base)),
                    *(vectors @ vectors.T).double().flatten().tolist(),
                ]
            )
        return sums

    def record(self, block: Block, merged: torch.Tensor, sampled: Sequence[slice], seen: list[list[float]]) -> None:
        """Add a block, now that it is merged: `merged` is `[region.numel]` float32, `seen` what `observe` returned."""
        assert block.base is not None
        for part, numbers in zip(sampled, seen, strict=True):
            delta = merged[part] - block.base[part]
            region = block.region
            numbers.insert(4, float(delta.dot(delta)))
            self.tally.add(region.tensor.name, region.start + part.start, numbers)

    def _norms(self, sums: Sequence[float]) -> dict[str, Any]:
        """The sizes of one tensor's sample, for logs."""
        count = len(self.models)
        norms = [math.sqrt(sums[5 + i * count + i]) for i in range(count)]
        return {
            "sampled": int(sums[0]),
            "base_norm": math.sqrt(sums[3]),
            "task_vector_norms": dict(zip(self.models, norms, strict=True)),
            "change_norm": math.sqrt(sums[4]),
        }

    def as_json(self) -> dict[str, Any]:
        """The report for merge_recipe.json: `all` and one entry per kind of layer, numbers to 4 digits.

        Per entry: `relative_norm` |d_i| / |b| per model; `cosine` of each pair of task vectors; `sign_conflicts`, the share of
        the changed elements that two models pull in opposite directions; `merged_relative_norm` |merged - b| / |b|.
        """
        kinds = self.tally.by_kind()
        layers = {kind: self._entry(sums) for kind, sums in kinds.items()}
        return {
            "sample": "full" if self.full else f"1/{SAMPLE_EVERY}",
            "all": self._entry([sum(column) for column in zip(*kinds.values(), strict=True)]),
            "layers": layers,
        }

    def suspects_base(self, matrices: Collection[str]) -> bool:
        """Whether the task vectors of two or more models are so alike and so far from the base that it is hardly theirs.

        Two checkpoints of one fine-tuning run are alike, too, and not far.

        Args:
            matrices: the tensors that have rows and columns: vectors are too short to tell.
        """
        count = len(self.models)
        looked_at = alike_and_far = 0
        for name, sums in self.tally.by_tensor().items():
            _, changed, _, base, _, *gram = sums
            if count < 2 or name not in matrices or not changed or not base:
                continue
            norms = [math.sqrt(gram[i * count + i]) for i in range(count)]
            pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
            cosines = [gram[i * count + j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for i, j in pairs]
            looked_at += 1
            alike_and_far += sum(cosines) > ALIKE * len(pairs) and min(norms) > FAR * math.sqrt(base)
        return bool(looked_at) and alike_and_far >= MOSTLY * looked_at

    def _entry(self, sums: Sequence[float]) -> dict[str, Any]:
        count = len(self.models)
        _, changed, conflicts, base, merged, *gram = sums or [0.0] * (5 + count * count)
        norms = [math.sqrt(gram[i * count + i]) for i in range(count)]
        cosines = {
            f"{self.models[i]} ~ {self.models[j]}": _rounded(gram[i * count + j], norms[i] * norms[j])
            for i in range(count)
            for j in range(i + 1, count)
        }
        size = math.sqrt(base)
        return {
            "relative_norm": {model: _rounded(norm, size) for model, norm in zip(self.models, norms, strict=True)},
            "cosine": cosines,
            "sign_conflicts": _rounded(conflicts, changed),
            "merged_relative_norm": _rounded(math.sqrt(merged), size),
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
