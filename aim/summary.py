"""Summarise the statistics per kind of layer, so that omegas can be compared between models; and what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aim.activations import ChannelStatistics
from aim.formula import OUTLIER
from checkpoints.tensor_names import kind_of

MASSIVE = 100.0
"""An activation is massive where it is this many times the largest |x| of the median channel."""
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
class Massive:
    """The largest activation of a kind of layer.

    Attributes:
        largest: |x|.
        channel: where.
        token: its position in its block; -1 where that cannot be told.
        median: the median channel's largest |x|, in that tensor.
        rest: the largest channel's mean |x| without the first token of each block against its mean with it; None where that is not known.
    """

    largest: float
    channel: int
    token: int
    median: float
    rest: float | None = None

    @property
    def times(self) -> float:
        """The largest against the median."""
        return self.largest / self.median if self.median > 0 else float("inf")


@dataclass(frozen=True)
class KindSummary:
    """s over the channels of all tensors of one kind.

    tensors: how many.
    mean, median: of s; active: share of channels with s > 0.5.
    outlier: the largest channel against the median s, in the tensor where that is largest; infinite where the median is 0.
    outliers: channels of at least `OUTLIER` times the median of a tensor, the largest first.
    mean_energy: |mean|^2 / E|x|^2 of the input, the mean over tensors; None where the signed means were not kept.
    massive: of the tensor with the largest activation against its median; None where the largest were not kept.
    """

    tensors: int
    mean: float
    median: float
    active: float
    outlier: float
    outliers: tuple[Outlier, ...] = ()
    mean_energy: float | None = None
    massive: Massive | None = None


def summarise(
    importance: Mapping[str, torch.Tensor],
    mean_energy: Mapping[str, float] | None = None,
    statistics: Mapping[str, ChannelStatistics] | None = None,
) -> dict[str, KindSummary]:
    """Summaries by kind of layer, `all` last.

    Args:
        importance: checkpoint tensor -> s, `[in]` or `[experts, in]` float32 in [0, 1]; an expert of zeros saw no token
            and is left out.
        mean_energy: checkpoint tensor -> |mean|^2 / E|x|^2 of its input, where that is known.
        statistics: checkpoint tensor -> what its input looked like, for the largest activations.
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
    massive: dict[str, list[Massive]] = {}
    for name, channels in (statistics or {}).items():
        if name in importance and (one := massive_of(channels)) is not None:
            for kind in (kind_of(name), "all"):
                massive.setdefault(kind, []).append(one)
    return {
        kind: replace(
            summary,
            mean_energy=sum(shares[kind]) / len(shares[kind]) if kind in shares else None,
            massive=max(massive[kind], key=lambda one: one.times) if kind in massive else None,
        )
        for kind, summary in summaries.items()
    }


def massive_of(statistics: ChannelStatistics) -> Massive | None:
    """The largest activation of one tensor's input, of all its experts; None where the largest were not kept."""
    if statistics.max_abs is None or statistics.max_at is None:
        return None
    largest, width = statistics.max_abs.reshape(-1), statistics.max_abs.shape[-1]
    at = int(largest.argmax())
    row = statistics.max_abs.reshape(-1, width)[at // width]
    rest = None
    if statistics.after_first is not None and bool(whole := statistics.mean_abs.reshape(-1)[at]):
        rest = float(statistics.after_first.mean_abs.reshape(-1)[at] / whole)
    return Massive(float(largest[at]), at % width, int(statistics.max_at.reshape(-1)[at]), float(row.median()), rest)


def times_of(statistics: Mapping[str, ChannelStatistics], names: Iterable[str]) -> dict[str, float]:
    """Tensor -> its largest activation against the median channel's, of those where it is known and finite."""
    found = {name: one.times for name in names if (one := massive_of(statistics[name])) is not None}
    return {name: times for name, times in found.items() if times < float("inf")}


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
            **_massive_as_json(summary.massive),
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


def _massive_as_json(massive: Massive | None) -> dict[str, Any]:
    if massive is None:
        return {}
    numbers = {"largest": digits(massive.largest), "channel": massive.channel, "token": massive.token}
    rest = {} if massive.rest is None else {"mean_after_first_against_mean": digits(massive.rest)}
    return {"largest_abs": {**numbers, "median_channel": digits(massive.median), **rest}}


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
    return "\n".join([*lines, *_format_outliers(summaries), *_format_massive(summaries)])


def _format_massive(summaries: Mapping[str, KindSummary]) -> list[str]:
    """A table of the kinds that have massive activations, or that none has; nothing where the largest were not kept."""
    known = {kind: summary.massive for kind, summary in summaries.items() if summary.massive and kind != "all"}
    found = {kind: one for kind, one in known.items() if one.times >= MASSIVE}
    if not found:
        none = f"massive activations: none is {MASSIVE:g} times the largest |x| of its tensor's median channel"
        return [none] if known else []
    rows = [("layer", "largest |x|", "channel", "token", "median channel's", "mean without first token / with")]
    for kind, one in found.items():
        rest = "-" if one.rest is None else f"{one.rest:.3f}"
        token = "-" if one.token < 0 else str(one.token)
        rows.append((kind.removesuffix(".weight"), f"{one.largest:,.1f}", str(one.channel), token, f"{one.median:.3g}", rest))  # fmt: skip
    return [f"Massive activations, {MASSIVE:g} times the largest |x| of the median channel or more:", *align(rows)]


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
