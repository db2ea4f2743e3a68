"""s of each layer and its outlier channels, as a Markdown table, from the base's statistics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from aim.activations import ChannelStatistics, load_activations

LOUD = 10.0
"""A channel whose mean |x| is so many times the median channel's is an outlier."""
NAMED = 5
"""Outlier channels that are named, the commonest or the loudest ones."""
_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)\.weight$")


def write(activations: Path, folder: Path) -> Path:
    """Write outliers.md. Returns: it."""
    path = folder / "outliers.md"
    path.write_text(as_markdown(load_activations(activations).statistics.items()))
    return path


def as_markdown(statistics: Iterable[tuple[str, ChannelStatistics]]) -> str:
    """A table of the kinds of layers, and one of each layer's residual stream (the input of q, k and v).

    Args:
        statistics: pairs of a tensor's name and what its input looked like.
    """
    kinds: dict[str, list[ChannelStatistics]] = {}
    rows = []
    for name, own in statistics:
        place = _LAYER.search(name)
        if place and own.mean_abs.ndim == 1:
            kinds.setdefault(place[2], []).append(own)
            if place[2] == "self_attn.q_proj":
                rows.append((int(place[1]), _cells(own)))
    lines = ["| inputs of | layers | mean s | s > 0.5 | loudest / median | mean^2 / mean of x^2 | outlier channels |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for kind, members in kinds.items():
        shares = [one.mean_abs / one.mean_abs.max() for one in members]
        loudest = [float(one.mean_abs.max() / one.mean_abs.median()) for one in members]
        common = Counter(channel for one in members for channel in outliers(one))
        named = ", ".join(f"{channel} ({count})" for channel, count in common.most_common(NAMED))
        lines.append(
            f"| {kind} | {len(members)} | {_mean([float(s.mean()) for s in shares]):.3f} | "
            f"{100 * _mean([float((s > 0.5).float().mean()) for s in shares]):.1f} % | {_mean(loudest):.0f} | {_share(members)} | {named} |"
        )
    lines += ["", "The input of q, k and v, layer by layer:", ""]
    lines += ["| layer | mean s | s > 0.5 | loudest / median | mean^2 / mean of x^2 | largest abs(x) | outlier channels, loudest first |"]  # fmt: skip
    lines += ["|---:|---:|---:|---:|---:|---:|---|"]
    lines += [f"| {layer} | {cells} |" for layer, cells in sorted(rows)]
    return "\n".join(lines) + "\n"


def outliers(statistics: ChannelStatistics) -> list[int]:
    """Channels that are `LOUD` times as loud as the median one, loudest first."""
    loud = statistics.mean_abs / statistics.mean_abs.median()
    return [int(channel) for channel in torch.argsort(loud, descending=True) if float(loud[channel]) >= LOUD]


def _cells(own: ChannelStatistics) -> str:
    s = own.mean_abs / own.mean_abs.max()
    loudest = float(own.mean_abs.max() / own.mean_abs.median())
    largest = "" if own.max_abs is None else f"{float(own.max_abs.max()):,.1f}"
    channels = outliers(own)
    named = ", ".join(map(str, channels[:NAMED])) + (f" and {len(channels) - NAMED} more" if len(channels) > NAMED else "")  # fmt: skip
    return f"{float(s.mean()):.3f} | {100 * float((s > 0.5).float().mean()):.1f} % | {loudest:.0f} | {_share([own])} | {largest} | {named}"


def _share(members: Sequence[ChannelStatistics]) -> str:
    """How much of the energy of the inputs is the square of their mean; empty where the mean was not kept."""
    shares = [float(one.mean.square().sum() / one.mean_sq.sum()) for one in members if one.mean is not None]
    return f"{100 * _mean(shares):.0f} %" if shares else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
