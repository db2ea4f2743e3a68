"""Pictures of the channel importance s, and of mean inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from checkpoints.errors import InputError
from checkpoints.escaping import visible
from checkpoints.settings import setting
from checkpoints.tensor_names import kind_of, split_name


def draw_importance(importance: Mapping[str, torch.Tensor], folder: Path, *, title: str = "") -> list[Path]:
    """Draw s, sorted, per kind of layer, and a heat map over layers, as PNG and SVG.

    Args:
        importance: tensor -> s, `[in]` or `[experts, in]`.
        folder: made where it is missing.
        title: of what; a second line of each figure's title.

    Returns: the files written. Raises: InputError: the folder cannot be written to.
    """
    with _drawing(folder):
        title = visible(title)
        means = {name: float(rows.mean()) for kind in _by_kind(importance).values() for name, rows in kind.items()}
        layers = _draw_layers(means, folder, "importance_layers", "Mean channel importance s", title, "mean s")
        return [*_draw_sorted(importance, folder, title), *layers]


def draw_mean_input(mean_energy: Mapping[str, float], folder: Path, *, title: str = "") -> list[Path]:
    """Draw how much of each weight's input is its mean, over layers; as `draw_importance`.

    Args:
        mean_energy: tensor -> |mean|^2 / E|x|^2.
    """
    with _drawing(folder):
        heading, label = "How much of the inputs is their mean", "|mean|\u00b2 / E|x|\u00b2"
        return _draw_layers(mean_energy, folder, "mean_input", heading, visible(title), label)


def draw_mean_direction(along: Mapping[str, float], folder: Path, *, title: str = "") -> list[Path]:
    """Draw how much of each task vector lies along the mean input, over layers; as `draw_importance`.

    Args:
        along: tensor -> |D u|^2 / |D|^2.
    """
    with _drawing(folder):
        heading, label = "How much of the task vectors lies along the mean input", "|D u|\u00b2 / |D|\u00b2"
        return _draw_layers(along, folder, "mean_direction", heading, visible(title), label)


def draw_massive(times: Mapping[str, float], folder: Path, *, title: str = "") -> list[Path]:
    """Draw how far the largest activation of each weight's input stands out, over layers; as `draw_importance`.

    Args:
        times: tensor -> largest |x| / that of the median channel.
    """
    with _drawing(folder):
        powers = {name: float(np.log10(max(value, 1.0))) for name, value in times.items()}
        heading, label = "Largest |x| against the median channel's", "powers of 10"
        return _draw_layers(powers, folder, "massive_activations", heading, visible(title), label)


@contextmanager
def _drawing(folder: Path) -> Iterator[None]:
    """Set matplotlib up and make the folder. Raises InputError: it cannot be written to."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name with two `$` is no formula
    matplotlib.rcParams["svg.hashsalt"] = "aim"  # the same picture gives the same bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
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
        s = torch.cat([tensor.flatten() for tensor in tensors.values()]).sort(descending=True).values
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


def _draw_layers(
    values: Mapping[str, float], folder: Path, name: str, heading: str, title: str, label: str
) -> list[Path]:
    """Heat map: a number of each kind in each layer; tensors outside the layers are left out.

    Args:
        values: tensor -> its number, >= 0.
        name: of the files.
    """
    from matplotlib import pyplot

    kinds = sorted({kind_of(tensor) for tensor in values if split_name(tensor)})
    if not kinds:
        return []
    by_layer: dict[tuple[int, int], list[float]] = {}
    for tensor, value in values.items():
        if parts := split_name(tensor):
            by_layer.setdefault((kinds.index(kind_of(tensor)), parts.layer), []).append(value)
    layers = 1 + max(layer for _, layer in by_layer)
    means = np.full((len(kinds), layers), np.nan)
    for place, numbers in by_layer.items():
        means[place] = np.mean(numbers)
    figure, axes = pyplot.subplots(figsize=(max(4.0, 0.35 * layers + 3), 0.4 * len(kinds) + 1.5))
    image = axes.imshow(means, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.1, float(np.nanmax(means))))
    axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=8)
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set(xlabel="layer", title="\n".join(filter(None, (heading, title))))
    figure.colorbar(image, ax=axes, label=label)
    paths = _save(figure, folder, name)
    pyplot.close(figure)
    return paths
