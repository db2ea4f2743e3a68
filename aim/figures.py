"""Pictures of the channel importance s."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from checkpoints.errors import InputError
from checkpoints.escaping import visible
from checkpoints.settings import setting
from checkpoints.tensor_names import kind_of


def draw_importance(importance: Mapping[str, torch.Tensor], folder: Path, *, title: str = "") -> list[Path]:
    """Draw s, sorted, per kind of layer, and a heat map over layers, as PNG and SVG.

    Args:
        importance: tensor -> s, `[in]` or `[experts, in]`.
        folder: made where it is missing.
        title: of what; a second line of each figure's title.

    Returns: the files written. Raises: InputError: the folder cannot be written to.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name with two `$` is no formula
    matplotlib.rcParams["svg.hashsalt"] = "aim"  # the same picture gives the same bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = visible(title)
        return [*_draw_sorted(importance, folder, title), *_draw_layers(importance, folder, title)]
    except OSError as error:
        raise InputError(
            f"{setting('figures', folder)}: cannot be written: {error.strerror}. Choose another folder."
        ) from error


def _by_kind(importance: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Kind of layer -> tensor -> s, without experts that saw no token."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, s in importance.items():
        rows = s.reshape(-1, s.shape[-1])
        kinds.setdefault(kind_of(name), {})[name] = rows[rows.amax(dim=-1) > 0]
    return kinds


def _short(kind: str) -> str:
    """Without what all layers share: `self_attn.q_proj` of `model.layers.*.self_attn.q_proj.weight`."""
    name = kind.removesuffix(".weight")
    return visible(name.partition("*.")[2] or name)


def _save(figure: object, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)  # type: ignore[attr-defined]
    return paths


def _draw_sorted(importance: Mapping[str, torch.Tensor], folder: Path, title: str) -> list[Path]:
    """One line per kind: s of all its channels, largest first, against the share of channels."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    curves: dict[bytes, tuple[list[str], torch.Tensor]] = {}
    for kind, tensors in sorted(_by_kind(importance).items()):
        s = torch.cat([one.flatten() for one in tensors.values()]).sort(descending=True).values
        # Layers that share an input (q, k and v) share a curve.
        curves.setdefault(s.numpy().tobytes(), ([], s))[0].append(_short(kind))
    colours = pyplot.get_cmap("tab20")(np.linspace(0, 1, max(len(curves), 2)))
    for colour, (kinds, s) in zip(colours, curves.values(), strict=False):
        axes.plot(
            np.linspace(0, 100, len(s)), s.numpy(), label=f"{', '.join(kinds)} (mean {s.mean():.2f})", color=colour
        )
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="channels, most active first (%)",
        ylabel="s = activation / largest of its tensor",
        ylim=(0, 1.02),
        xlim=(0, 100),
    )
    axes.set_title("\n".join(filter(None, ("Channel importance by kind of layer", title))))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    paths = _save(figure, folder, "importance_sorted")
    pyplot.close(figure)
    return paths


def _draw_layers(importance: Mapping[str, torch.Tensor], folder: Path, title: str) -> list[Path]:
    """Heat map: mean s of each kind in each layer; tensors outside the layers are left out."""
    from matplotlib import pyplot

    kinds = {kind: tensors for kind, tensors in sorted(_by_kind(importance).items()) if "*" in kind}
    if not kinds:
        return []
    layers = 1 + max(_layer_of(name) for tensors in kinds.values() for name in tensors)
    means = np.full((len(kinds), layers), np.nan)
    for row, tensors in enumerate(kinds.values()):
        for layer in range(layers):
            found = [float(s.mean()) for name, s in tensors.items() if _layer_of(name) == layer]
            if found:
                means[row, layer] = np.mean(found)
    figure, axes = pyplot.subplots(figsize=(max(4.0, 0.35 * layers + 3), 0.4 * len(kinds) + 1.5))
    image = axes.imshow(means, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.1, float(np.nanmax(means))))
    axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=8)
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set(xlabel="layer", title="\n".join(filter(None, ("Mean channel importance s", title))))
    figure.colorbar(image, ax=axes, label="mean s")
    paths = _save(figure, folder, "importance_layers")
    pyplot.close(figure)
    return paths


def _layer_of(name: str) -> int:
    """The first number in a tensor's name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0
