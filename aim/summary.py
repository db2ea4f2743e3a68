"""What the statistics look like per kind of layer, so that omegas can be compared between models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

OUTLIER = 10.0
"""A channel is named as an outlier where its s is this many times the median of its tensor."""


@dataclass(frozen=True)
class KindSummary:
    """s over the channels of all tensors of one kind.

    mean, median: of s; active: share of channels with s > 0.5.
    outlier: the largest channel against the median s, in the tensor where that is largest; outlier_tensor, outlier_channel.
    """

    tensors: int
    mean: float
    median: float
    active: float
    outlier: float
    outlier_tensor: str
    outlier_channel: int


def kind_of(tensor: str) -> str:
    """A tensor's name with every number replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor)


def summarise(importance: Mapping[str, torch.Tensor]) -> dict[str, KindSummary]:
    """Summaries by kind of layer, `all` last.

    Args:
        importance: checkpoint tensor -> s, `[in]` or `[experts, in]` float32 in [0, 1].
    """
    by_kind: dict[str, dict[str, torch.Tensor]] = {}
    for name, s in importance.items():
        by_kind.setdefault(kind_of(name), {})[name] = s
    summaries = {kind: _summarise_kind(tensors) for kind, tensors in sorted(by_kind.items())}
    if importance:
        summaries["all"] = _summarise_kind(importance)
    return summaries


def _summarise_kind(tensors: Mapping[str, torch.Tensor]) -> KindSummary:
    values = torch.cat([s.flatten() for s in tensors.values()])
    ratios = {name: (s.max() / s.median()).item() if s.median() > 0 else float("inf") for name, s in tensors.items()}
    widest = max(ratios, key=lambda name: ratios[name])
    return KindSummary(
        len(tensors),
        values.double().mean().item(),
        values.median().item(),
        (values > 0.5).double().mean().item(),
        ratios[widest],
        widest,
        int(tensors[widest].flatten().argmax()),
    )


def as_json(summaries: Mapping[str, KindSummary]) -> dict[str, Any]:
    """The summaries for merge_recipe.json, numbers to 4 digits."""
    return {
        kind: {
            "tensors": one.tensors,
            "mean_s": float(f"{one.mean:.4g}"),
            "median_s": float(f"{one.median:.4g}"),
            "share_above_half": float(f"{one.active:.4g}"),
            "largest_against_median": float(f"{one.outlier:.4g}") if one.outlier < float("inf") else None,
        }
        for kind, one in summaries.items()
    }


def format_summaries(summaries: Mapping[str, KindSummary]) -> str:
    """A table for people, and a line for each kind with an outlier channel."""
    width = max(len(kind) for kind in summaries)
    lines = [f"{'layer'.ljust(width)}  tensors  mean s  median s  s > 0.5  largest/median"]
    for kind, one in summaries.items():
        lines.append(
            f"{kind.ljust(width)}  {one.tensors:7d}  {one.mean:6.3f}  {one.median:8.3f}  {one.active:7.3f}  {one.outlier:14.1f}"
        )
    outliers = [one for kind, one in summaries.items() if kind != "all" and one.outlier >= OUTLIER]
    lines += [
        f"outlier channel: {one.outlier_tensor}[{one.outlier_channel}], {one.outlier:.0f} times the median"
        for one in outliers
    ]
    return "Channel importance s (activation against the largest of its tensor):\n" + "\n".join(lines)
