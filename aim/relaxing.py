"""From statistics to transforms for a stream: one for each omega, with what is to be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aim.calibrate import Numerics, select
from aim.omegas import Omega
from aim.relax import SCALINGS, Control, Scaling
from aim.relaxation import Relaxation, importance_of, make_channels
from aim.statistics import Activations
from aim.summary import KindSummary, as_json, kind_of, summarise
from aim.targets import Selection
from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.model import Model
from checkpoints.provenance import fingerprint
from streaming.output import Variant


@dataclass(frozen=True)
class Relaxing:
    """How merged weights are relaxed.

    Attributes:
        omegas: one checkpoint for each.
        scaling: of s: identity, sqrt or square.
        control: none, or one of the controls that carry no channel information.
        seed: of the permuted control.
        numerics: `reference` rounds as the published program does.
    """

    omegas: tuple[Omega, ...] = (Omega(0.4),)
    scaling: Scaling = "identity"
    control: Control = "none"
    seed: int = 0
    numerics: Numerics = "float32"

    def __post_init__(self) -> None:
        allowed: list[tuple[str, str, Sequence[str]]] = [
            ("--scaling", self.scaling, list(SCALINGS)),
            ("--control", self.control, ["none", "uniform", "permuted"]),
            ("--numerics", self.numerics, ["float32", "reference"]),
        ]
        for flag, value, known in allowed:
            if value not in known:
                raise ArgumentError(f"{flag}: {unknown('value', value, known)}")


@dataclass
class Relaxations:
    """The transforms of one base's statistics, ready for a stream, and what is to be said of them.

    variants: one for each omega; summaries: see `summarise`; kept: tensor that stays as merged -> why.
    """

    variants: list[Variant]
    summaries: dict[str, KindSummary]
    kept: Mapping[str, str]
    importance: Mapping[str, torch.Tensor]
    transforms: list[Relaxation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Lines for people: tensors relaxed and mean |change| per kind of layer, then what stays as merged, and why."""
        changes = [transform.mean_changes() for transform in self.transforms]
        names = [variant.folder or "mean |change|" for variant in self.variants]
        kinds = Counter(kind_of(name) for name in self.importance)
        width = max((len(kind) for kind in kinds), default=0)
        lines = [f"{'relaxed'.ljust(width)}  tensors  " + "  ".join(name.rjust(13) for name in names)]
        for kind, count in sorted(kinds.items()):
            cells = (f"{change[kind]:13.3g}" if kind in change else "-".rjust(13) for change in changes)
            lines.append(f"{kind.ljust(width)}  {count:7d}  " + "  ".join(cells))
        total = sum(kinds.values())
        lines.append(
            f"{total} tensors with statistics; relaxed: "
            + ", ".join(str(transform.relaxed) for transform in self.transforms)
        )
        lines += [f"stays as merged: {count} x {kind} ({why})" for (kind, why), count in group_kept(self.kept).items()]
        return "\n".join(lines)


def group_kept(kept: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many tensors of each kind stay as merged, by reason."""
    return Counter((kind_of(name), why) for name, why in kept.items())


def check_activations(activations: Activations, base: Model, selection: Selection, source: str) -> None:
    """Raise InputError where statistics belong to another base, or do not fit its shapes."""
    if activations.base != fingerprint(base.weights):
        raise InputError(
            f"{source}: were taken with another base model than {base.label}. Calibrate with this one, or name that one."
        )
    for name, statistics in activations.statistics.items():
        target = selection.targets.get(name)
        width = None if target is None else target.width
        if statistics.mean_abs.shape[-1] != width:
            raise InputError(
                f"{source}: {name}: expected {width or 'no'} channels as in {base.label}, got {statistics.mean_abs.shape[-1]}. Calibrate again."
            )


def make_relaxations(
    base: Model, activations: Activations, how: Relaxing, *, device: torch.device, source: str = "the statistics"
) -> Relaxations:
    """Turn statistics into one transform for each omega.

    Args:
        base: the model that the statistics are of; outputs have its tensor names.
        activations: from `calibrate` or a file; source: how messages name them.
        how: omegas and the rest; device: where blocks will be.

    Raises: InputError: statistics of another base or other shapes; numerics that differ from the statistics'.
    """
    selection, warnings = select(base, how.numerics)
    check_activations(activations, base, selection, source)
    if (activations.calibration.get("numerics") == "reference") != (how.numerics == "reference"):
        raise InputError(
            f"{source}: were taken with --numerics {activations.calibration.get('numerics')}. Use the same here."
        )
    importance = {
        name: importance_of(activations, name, how.scaling)
        for name in selection.targets
        if name in activations.statistics
    }
    kept = {
        **selection.skipped,
        **{name: activations.silent.get(name, "no statistics") for name in selection.targets if name not in importance},
    }
    summaries = summarise(importance)
    found = Relaxations([], summaries, kept, importance, warnings=warnings)
    for omega in how.omegas:
        channels = make_channels(activations, selection, omega, scaling=how.scaling, control=how.control, seed=how.seed)
        transform = Relaxation(channels, device, like_the_reference=how.numerics == "reference")
        found.transforms.append(transform)
        found.variants.append(
            Variant(
                folder=f"omega_{omega}" if len(how.omegas) > 1 else "",
                transform=transform,
                details=_details(activations, how, omega, transform, found),
                card=_card(how, omega, activations),
            )
        )
    return found


def _details(
    activations: Activations, how: Relaxing, omega: Omega, transform: Relaxation, found: Relaxations
) -> Callable[[], dict[str, Any]]:
    """The `aim:` block of merge_recipe.json, complete once the weights are written."""

    def details() -> dict[str, Any]:
        return {
            "aim": {
                "omega": omega.rest if not omega.filters else str(omega),
                "scaling": how.scaling,
                "control": how.control,
                "seed": how.seed if how.control == "permuted" else None,
                "numerics": how.numerics,
                "calibration": dict(activations.calibration),
                "base_fingerprint": activations.base,
                "statistics": as_json(found.summaries),
                "relaxed": transform.relaxed,
                "kept": [
                    {"tensors": kind, "count": count, "why": why}
                    for (kind, why), count in group_kept(found.kept).items()
                ],
                "mean_change": transform.mean_changes(),
            }
        }

    return details


def _card(how: Relaxing, omega: Omega, activations: Activations) -> str:
    calibration = activations.calibration
    control = (
        "" if how.control == "none" else f" This is the `{how.control}` control, which knows nothing of the channels."
    )
    return (
        f"Relaxed by activation-informed merging ([arXiv:2502.02421](https://arxiv.org/abs/2502.02421)), omega {omega}, "
        f"scaling {how.scaling}: W = W_base + (W_merged - W_base) * (1 - s * (1 - omega)), s from {calibration.get('blocks')} blocks of "
        f"{calibration.get('block_size')} tokens of {calibration.get('source')}.{control}"
    )
