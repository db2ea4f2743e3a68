"""Summarise the statistics per kind of layer, so that omegas can be compared between models; and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpoints.tensor_names import kind_of

OUTLIER = 10.0
"""A channel is an outlier where its s is this many times the median of its tensor."""
MEAN_ENERGY = "|mean|²/E|x|²"
NAMED = 3
"""Outlier channels named for a kind of layer; the others are counted."""


@dataclass(frozen=True)
class Outlier:
    """A channel that stands out: in how many tensors of its kind, and how many times the median s it has at most."""

    channel: int
    tensors: int
    times: float


@dataclass(frozen=True)
class KindSummary:
    """s over the channels of all tensors of one kind.

    tensors: how many.
    mean, median: of s; active: share of channels with s > 0.5.
    outlier: the largest channel against the median s, in the tensor where that is largest; infinite where the median is 0.
    outliers: channels of at least `OUTLIER` times the median of a tensor, the largest first.
    mean_energy: |mean|^2 / E|x|^2 of the input, the mean over tensors; None where the signed means were not kept.
    """

    tensors: int
    mean: float
    median: float
    active: float
    outlier: float
    outliers: tuple[Outlier, ...] = ()
    mean_energy: float | None = None


def summarise(
    importance: Mapping[str, torch.Tensor], mean_energy: Mapping[str, float] | None = None
) -> dict[str, KindSummary]:
    """Summaries by kind of layer, `all` last.

    Args:
        importance: checkpoint tensor -> s, `[in]` or `[experts, in]` float32 in [0, 1]; an expert of zeros saw no token
            and is left out.
        mean_energy: checkpoint tensor -> |mean|^2 / E|x|^2 of its input, where that is known.
    """
    by_kind: dict[str, list[torch.Tensor]] = {}
    for name, s in importance.items():
        rows = s.reshape(-1, s.shape[-1])
        by_kind.setdefault(kind_of(name), []).append(rows[rows.amax(dim=-1) > 0])
    summaries = {kind: _summarise_kind(tensors) for kind, tensors in sorted(by_kind.items())}
    if summaries:
        together = _summarise_kind([rows for tensors in by_kind.values() for rows in tensors], name_outliers=False)
        summaries["all"] = together
    shares: dict[str, list[float]] = {}
    for name, share in (mean_energy or {}).items():
        for kind in (kind_of(name), "all"):
            shares.setdefault(kind, []).append(share)
    return {
        kind: replace(summary, mean_energy=sum(shares[kind]) / len(shares[kind]) if kind in shares else None)
        for kind, summary in summaries.items()
    }


def _summarise_kind(tensors: Sequence[torch.Tensor], *, name_outliers: bool = True) -> KindSummary:
    """Summarise s of several tensors, `[experts or 1, in]` each."""
    values = torch.cat([s.flatten() for s in tensors])
    # Infinite (0 where s is 0 as well) in a tensor that is mostly silent; the largest of its experts' for each channel.
    times = [
        (s / s.median(dim=-1, keepdim=True).values).nan_to_num(0.0, posinf=float("inf")).amax(dim=0) for s in tensors
    ]
    outliers: dict[int, Outlier] = {}
    for ratio in times if name_outliers else ():
        for channel in (ratio >= OUTLIER).nonzero().flatten().tolist():
            outlier = outliers.get(channel, Outlier(channel, 0, 0.0))
            outliers[channel] = Outlier(channel, outlier.tensors + 1, max(outlier.times, float(ratio[channel])))
    return KindSummary(
        len(tensors),
        values.double().mean().item(),
        values.median().item(),
        (values > 0.5).double().mean().item(),
        max(float(ratio.max()) for ratio in times),
        tuple(sorted(outliers.values(), key=lambda outlier: (-outlier.tensors, -outlier.times))),
    )


def as_json(summaries: Mapping[str, KindSummary]) -> dict[str, Any]:
    """The summaries for merge_recipe.json, numbers to 4 digits; of the outlier channels those that are named to people."""
    return {
        kind: {
            "tensors": summary.tensors,
            "mean_s": digits(summary.mean),
            "median_s": digits(summary.median),
            "share_above_half": digits(summary.active),
            "largest_against_median": digits(summary.outlier),
            "mean_energy": None if summary.mean_energy is None else digits(summary.mean_energy),
            "outlier_channels": [
                {
                    "channel": outlier.channel,
                    "tensors": outlier.tensors,
                    "largest_against_median": digits(outlier.times),
                }
                for outlier in summary.outliers[:NAMED]
            ],
        }
        for kind, summary in summaries.items()
    }


def digits(number: float) -> float | None:
    """4 significant digits; None for an infinity, which JSON cannot say."""
    return float(f"{number:.4g}") if abs(number) < float("inf") else None


def format_summaries(summaries: Mapping[str, KindSummary], *, means: bool = False) -> str:
    """A table for people, and the outlier channels of each kind.

    Args:
        means: show how much of the inputs is their mean, too.
    """
    rows = [("layer", "tensors", "mean s", "median s", "s > 0.5", "largest/median", *([MEAN_ENERGY] if means else []))]
    for kind, summary in summaries.items():
        numbers = [
            f"{summary.mean:.3f}",
            f"{summary.median:.3f}",
            f"{100 * summary.active:.1f} %",
            f"{summary.outlier:.1f}",
        ]
        numbers += ["-" if summary.mean_energy is None else f"{summary.mean_energy:.3f}"] if means else []
        rows.append((kind.removesuffix(".weight"), str(summary.tensors), *numbers))
    lines = ["Channel importance s = mean |x| of an input channel / the largest of its tensor:", *align(rows)]
    return "\n".join([*lines, *_format_outliers(summaries)])


def _format_outliers(summaries: Mapping[str, KindSummary]) -> list[str]:
    """Lines that name outlier channels; kinds that share an input (q, k and v) share a line."""
    by_text: dict[str, list[str]] = {}
    for kind, summary in summaries.items():
        if summary.outliers:
            named = [
                f"{outlier.channel} ({outlier.times:.0f} times the median"
                + (f", in {outlier.tensors} of {summary.tensors} tensors)" if summary.tensors > 1 else ")")
                for outlier in summary.outliers[:NAMED]
            ]
            more = len(summary.outliers) - NAMED
            by_text.setdefault(", ".join(named) + (f" and {more} more" if more > 0 else ""), []).append(
                kind.removesuffix(".weight")
            )
    if not by_text:
        return [f"outlier channels: none has {OUTLIER:g} times the median s of its tensor"]
    return [f"outlier channels of {', '.join(kinds)}: {text}" for text, kinds in by_text.items()]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
