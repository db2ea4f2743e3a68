"""Turn statistics into transforms for a stream: one for each omega, with what is to be said of it."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aim.activations import Activations
from aim.calibrate import select
from aim.choices import DRAWN, Relaxing
from aim.formula import AFTER_FIRST
from aim.omegas import Omega
from aim.relaxation import ChannelFactors, Pull, Relaxation, has_rows, importance_of, make_pulls, mean_energy_of
from aim.summary import KindSummary, align, as_json, digits, summarise
from aim.targets import Origins, Selection
from checkpoints.errors import InputError
from checkpoints.escaping import markdown_code, markdown_inside
from checkpoints.model import Model
from checkpoints.pieces import Origin
from checkpoints.provenance import fingerprint
from checkpoints.settings import Show, as_in_python, setting, shown
from checkpoints.source import TensorInfo
from checkpoints.tensor_names import kind_of
from streaming.stream import PlannedTensor
from streaming.work import Variant, joined


@dataclass(frozen=True)
class Reach:
    """How far one omega goes.

    omega: which; label: how people know it; column: its name in a table; tensors: that it changes.
    share_kept: of their task vectors, the mean factor of their weights; None where the mean input is protected, as it takes the
        weights to tell.
    """

    omega: Omega
    label: str
    column: str
    tensors: tuple[str, ...]
    share_kept: float | None


@dataclass
class Relaxations:
    """The transforms of one base's statistics, ready for a stream, and what is to be said of them.

    variants, transforms, reaches: one for each omega of each merge; summaries: see `summarise`; importance: tensor -> s; mean_energy: tensor -> |mean|^2 / E|x|^2 of its input.
    kept: output tensor that stays as merged, whatever the omega, or in part -> why; warnings: what a user should look at.
    draw: draws what the weights show of each tensor, |D u|^2 / |D|^2, when they are written.
    """

    variants: list[Variant]
    summaries: dict[str, KindSummary]
    kept: Mapping[str, str]
    importance: Mapping[str, torch.Tensor]
    mean_energy: Mapping[str, float] = field(default_factory=dict)
    transforms: list[Relaxation] = field(default_factory=list)
    reaches: list[Reach] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    draw: Callable[[Mapping[str, float]], Sequence[Path]] | None = None

    def summary(self, show: Show = as_in_python) -> str:
        """Lines for people, when the weights are written: mean |change| per kind of layer; for each omega how many tensors
        were relaxed, how many copied and why."""
        changes = [transform.mean_changes() for transform in self.transforms]
        along = next((shares for transform in self.transforms if (shares := transform.along_mean())), {})
        counts = [Counter(kind_of(name) for name in reach.tensors) for reach in self.reaches]
        kinds: Counter[str] = functools.reduce(operator.or_, counts)
        columns = [reach.column for reach in self.reaches] if len(self.reaches) > 1 else ["mean |change|"]
        rows = [("layer", "tensors", *columns, *(["along the mean"] if along else []))]
        for kind, count in sorted(kinds.items()):
            cells = [f"{change[kind]:.3g}" if kind in change else "-" for change in changes]
            cells += [f"{100 * along[kind]:.1f} %" if kind in along else "-"] if along else []
            rows.append((kind.removesuffix(".weight"), str(count), *cells))
        lines = ["Mean |change| of a weight, relaxed minus merged:", *align(rows)] if kinds else []
        copied = [self.copied(reach) for reach in self.reaches]
        mean_s = f"mean s {self.summaries['all'].mean:.3f}, " if self.summaries else ""
        for reach, transform, names in zip(self.reaches, self.transforms, copied, strict=True):
            kept = f"{mean_s}{_kept(reach, transform)}" if reach.tensors else "as merged"
            lines.append(f"{reach.label}: {len(reach.tensors)} tensors relaxed, {len(names)} copied; {kept}")
        # An omega of 1 for all says enough in its line above; the others of a sweep copy the same.
        shown_kept = next(
            (names for reach, names in zip(self.reaches, copied, strict=True) if reach.tensors), self.kept
        )
        lines += ["copied as merged:"] if shown_kept else []
        lines += [
            f"  {count:5d} x {kind} ({shown(why, show)})" for (kind, why), count in group_kept(shown_kept).items()
        ]
        relaxed = {name for reach in self.reaches for name in reach.tensors}
        partly = {name: why for name, why in self.kept.items() if name in relaxed}
        lines += [
            f"relaxed but for {shown(why, show)}: {count} x {kind}" for (kind, why), count in group_kept(partly).items()
        ]
        if self.draw is not None:
            energies = next((energy for transform in self.transforms if (energy := transform.energies())), {})
            drawn = self.draw({name: part / whole for name, (part, whole) in energies.items()})
            lines += [f"{path}: written" for path in drawn]
        return "\n".join(lines)

    def copied(self, reach: Reach) -> dict[str, str]:
        """The output tensors that an omega leaves as merged -> why."""
        names = set(reach.tensors)
        omega_1 = {name: "omega 1" for name in self.importance if name not in names and name not in self.kept}
        return {name: why for name, why in {**self.kept, **omega_1}.items() if name not in names}


def _kept(reach: Reach, transform: Relaxation) -> str:
    """How much of the task vectors an omega has left, for people; when the weights are written."""
    if reach.share_kept is not None:
        return f"{100 * reach.share_kept:.1f} % of their task vectors kept"
    return f"{100 * energy_kept(reach.omega, transform):.1f} % of their task vectors' squared length kept"


def energy_kept(omega: Omega, transform: Relaxation) -> float:
    """The share of the task vectors' squared length that is left where their answers to the mean input are taken back."""
    energies = transform.energies()
    taken = sum((1 - omega.of(name) ** 2) * along for name, (along, _) in energies.items())
    return 1 - taken / max(sum(total for _, total in energies.values()), 1e-300)


def group_kept(kept: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many tensors of each kind stay as merged, by reason."""
    return Counter((kind_of(name), why) for name, why in kept.items())


def check_activations(activations: Activations, base: Model, selection: Selection, how: Relaxing, source: str) -> None:
    """Raise InputError where statistics belong to another base, do not fit its shapes, were taken otherwise, or lack what is needed."""
    if activations.base != fingerprint(base.weights):
        raise InputError(
            f"{source}: were taken with another base model than {base.label}. Calibrate with this one, or name that one."
        )
    taken = activations.calibration.get("numerics")
    if (taken == "reference") != (how.numerics == "reference"):
        raise InputError(f"{source}: were taken with {setting('numerics', taken)}. Use the same here.")
    dims = {**selection.input_dims, **activations.input_dims}
    for name, statistics in activations.statistics.items():
        got, shape = list(statistics.mean_abs.shape), selection.targets[name].shape if name in selection.targets else ()
        behind = shape[dims[name] :] if name in dims else ()
        widths = [
            math.prod(behind[:count]) for count in range(1, len(behind) + 1)
        ]  # several dimensions may be one input
        expected = [*([width] for width in widths[:1]), *([shape[0], width] for width in widths[:1] if len(shape) > 2)]
        groups = got[0] if len(got) == len(shape) == 2 and got[0] and shape[0] % got[0] == 0 else 0
        if got not in [*expected, *([width] for width in widths[1:]), *([groups, width] for width in widths if groups)]:
            raise InputError(
                f"{source}: {name}: expected {f'shape {expected[-1]}' if expected else 'no statistics'} as in {base.label}, "
                f"got {got}. Calibrate again."
            )
        if how.scaling.startswith(AFTER_FIRST) and statistics.after_first is None:
            raise InputError(
                f"{source}: {name}: expected the mean |x| without the first token of each block, which {setting('scaling', how.scaling)} needs, got "
                f"none, as in files of schema 1 and of models that do not read from left to right. Calibrate again, or use {setting('scaling', 'identity')}."
            )
        if how.protect == "mean" and statistics.mean is None:
            raise InputError(
                f"{source}: {name}: expected the signed mean of its input, which {setting('protect', 'mean')} needs, got none, as in "
                f"files of schema 1. Calibrate again, or use {setting('protect', 'channels')}."
            )


def make_relaxations(
    base: Model,
    activations: Activations,
    how: Relaxing,
    *,
    device: torch.device,
    outputs: Mapping[str, str] | None = None,
    names: Origins | None = None,
    source: str = "the statistics",
    merges: Sequence[Variant] = (Variant(),),
) -> Relaxations:
    """Turn statistics into one transform for each omega, and each merge that is relaxed.

    Args:
        base: the model that the statistics are of.
        activations: from `calibrate` or a file.
        source: how messages name them.
        how: omegas and the rest.
        device: where blocks will be.
        outputs: output tensor -> why it is copied instead of merged, empty for most; None for the base's tensors.
        names: see `names_of`.
        merges: in the order of the variants to be, each with all omegas.

    Raises: InputError: statistics of another base or other shapes; numerics that differ from the statistics'.
    """
    selection, warnings = select(base, how.numerics)
    check_activations(activations, base, selection, how, source)
    selection, activations = selection.renamed(names or {}), activations.renamed(names or {})
    importance = {
        name: importance_of(activations, name, how.scaling)
        for name in selection.targets
        if name in activations.statistics and (outputs is None or name in outputs)
    }
    if outputs is None:
        outputs = dict.fromkeys([*selection.targets, *selection.skipped], "")
    energy = {name: mean_energy_of(activations.statistics[name]) for name in importance}
    mean_energy = {name: share for name, share in energy.items() if share is not None}
    kept = {**why_kept(selection, outputs, activations), **idle_experts(importance)}
    if how.protect == "mean":
        kept |= without_mean(activations, selection)
    relaxations = Relaxations(
        [], summarise(importance, mean_energy, activations.statistics), kept, importance, mean_energy, warnings=warnings
    )
    each = [_merged_pulls(make_pulls(activations, selection, how, omega), outputs) for omega in how.omegas]
    for merge in merges:
        for omega, folder, pulls in zip(how.omegas, how.folders, each, strict=True):
            stored = base.weights.tensors
            weights = {name: _numel((names or {}).get(name, (Origin(name),)), stored) for name in pulls}
            relaxations.transforms.append(Relaxation(pulls, device))
            label = ", ".join(filter(None, (merge.folder, f"omega {omega}{_words(how)}")))
            share_kept = _share_kept(pulls, weights) if how.protect == "channels" else None
            column = joined(merge.folder, folder) if merge.folder else f"omega {omega}"
            relaxations.reaches.append(Reach(omega, label, column, tuple(pulls), share_kept))
            change = Variant(
                folder=folder,
                transform=relaxations.transforms[-1],
                details=_details(activations, how, len(relaxations.reaches) - 1, relaxations),
                card=_card(how, activations, relaxations.reaches[-1], relaxations),
            )
            relaxations.variants.append(merge.changed_as(change))
    return relaxations


def make_transforms(
    base: Model, activations: Activations, how: Relaxing, tensors: Sequence[PlannedTensor], device: torch.device
) -> list[Relaxation]:
    """The transforms alone, one for each omega, without what reports and cards say of the statistics.

    Args:
        base, activations, how, device: see `make_relaxations`, which raises the same.
        tensors: of the output.
    """
    selection, _ = select(base, how.numerics)
    check_activations(activations, base, selection, how, "the statistics")
    names, outputs = names_of(tensors), outputs_of(tensors)
    selection, activations = selection.renamed(names), activations.renamed(names)
    return [
        Relaxation(_merged_pulls(make_pulls(activations, selection, how, omega), outputs), device)
        for omega in how.omegas
    ]


def _merged_pulls(pulls: Mapping[str, Pull], outputs: Mapping[str, str]) -> dict[str, Pull]:
    """Those of tensors that are merged, not copied."""
    return {name: pull for name, pull in pulls.items() if outputs.get(name) == ""}


def _words(how: Relaxing) -> str:
    """What is unusual of it, for people."""
    words = ["mean input"] if how.protect == "mean" else []
    words += [f"{how.control} control"] if how.control != "none" else []
    return "".join(f", {word}" for word in words)


def _share_kept(pulls: Mapping[str, Pull], weights: Mapping[str, int]) -> float:
    """The mean factor over all weights of the tensors."""
    factors = {name: pull.values for name, pull in pulls.items() if isinstance(pull, ChannelFactors)}
    share = sum(float(values.double().mean()) * weights[name] for name, values in factors.items())
    return share / sum(weights.values()) if pulls else 1.0


def _numel(origins: Sequence[Origin], stored: Mapping[str, TensorInfo]) -> int:
    """Elements of the tensor that is made of them."""
    infos = [(stored[origin.name], origin.expert) for origin in origins]
    return sum(info.numel if expert is None else info.numel // info.shape[0] for info, expert in infos)


def outputs_of(tensors: Sequence[PlannedTensor]) -> dict[str, str]:
    """Planned tensor -> why it is copied instead of merged, empty for those that are merged."""
    return {tensor.spec.name: "" if tensor.method is not None else tensor.note or "copied" for tensor in tensors}


def names_of(tensors: Sequence[PlannedTensor]) -> Origins:
    """The output's tensor -> what it is in the base's files, where that is no tensor of its name."""
    return {tensor.spec.name: tensor.origins for tensor in tensors if tensor.origins}


def why_kept(selection: Selection, outputs: Mapping[str, str], activations: Activations | None) -> dict[str, str]:
    """Output tensor that stays as merged, whatever the omega -> why.

    Args:
        selection: what the base offers.
        outputs: see `make_relaxations`.
        activations: its statistics; None before they are taken.
    """
    kept = {}
    for name, copied in outputs.items():
        if copied:
            kept[name] = copied
        elif name not in selection.targets:
            kept[name] = selection.skipped.get(name, "not stored in the base")
        elif activations is not None and name not in activations.statistics:
            kept[name] = activations.silent.get(name, "no statistics")
    return kept


def idle_experts(importance: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensor with the weights of several experts of which some saw no token, and stay as merged -> which part of it."""
    idle = {name: int((s.amax(dim=-1) == 0).sum()) for name, s in importance.items() if s.ndim > 1}
    return {
        name: f"{count} of its {len(importance[name])} experts, which saw no token"
        for name, count in idle.items()
        if count
    }


def without_mean(activations: Activations, selection: Selection) -> dict[str, str]:
    """Matrix whose mean input is 0, in all of its experts or in some -> why it, or which part of it, stays as merged."""
    lacking = {}
    for name in selection.targets:
        mean = activations.statistics[name].mean if name in activations.statistics else None
        if mean is None or selection.targets[name].is_vector:
            continue
        dim = activations.input_dims.get(name, selection.input_dims.get(name, 0))
        if not has_rows(selection.targets[name].shape, dim, mean):
            lacking[name] = (
                "its rows have different inputs"
                if mean.ndim == len(selection.targets[name].shape)
                else "its input channels run along neither its rows nor its columns"
            )
            continue
        rows = mean.reshape(-1, mean.shape[-1])
        zero = int((~rows.any(dim=-1)).sum())
        if zero == len(rows):
            lacking[name] = "its mean input is 0"
        elif zero:
            lacking[name] = f"{zero} of its {len(rows)} experts, which saw no token or have a mean input of 0"
    return lacking


def _details(
    activations: Activations, how: Relaxing, index: int, relaxations: Relaxations
) -> Callable[[], dict[str, Any]]:
    """The `aim:` block of merge_recipe.json, complete once the weights are written."""

    def details() -> dict[str, Any]:
        reach = relaxations.reaches[index]
        kept = {**relaxations.kept, **relaxations.copied(reach)}
        return {
            "aim": {
                "omega": reach.omega.as_json(),
                **how.protected,
                "scaling": how.scaling,
                "control": how.control,
                "seed": how.seed if how.control in DRAWN else None,
                "numerics": how.numerics,
                "calibration": dict(sorted(activations.calibration.items())),
                "base_fingerprint": activations.base,
                "statistics": as_json(relaxations.summaries),
                "relaxed": len(reach.tensors),
                **_kept_as_json(reach, relaxations.transforms[index]),
                "kept": [
                    {"tensors": kind, "count": count, "why": why} for (kind, why), count in group_kept(kept).items()
                ],
                "mean_change": relaxations.transforms[index].mean_changes(),
            }
        }

    return details


def _kept_as_json(reach: Reach, transform: Relaxation) -> dict[str, Any]:
    """How much of the task vectors an omega has left."""
    if reach.share_kept is not None:
        return {"share_kept": digits(reach.share_kept)}
    return {"energy_kept": digits(energy_kept(reach.omega, transform)), "along_mean": transform.along_mean()}


def _card(how: Relaxing, activations: Activations, reach: Reach, relaxations: Relaxations) -> str:
    calibration = activations.calibration
    dataset = str(calibration.get("source"))
    control = (
        ""
        if how.control == "none"
        else f" This is the `{how.control}` control, {'which leaves the most active channels out' if how.control == 'without_top' else 'which knows nothing of the channels'}."
    )
    mean_s = f", mean s {relaxations.summaries['all'].mean:.3f}" if relaxations.summaries else ""
    text = (
        f"from {markdown_inside(str(calibration.get('blocks')))} blocks of "
        f"{markdown_inside(str(calibration.get('block_size')))} tokens of {markdown_code(dataset)}.{control} {len(reach.tensors)} tensors were relaxed{mean_s}."
    )
    omega = markdown_inside(str(reach.omega))
    if how.protect == "mean":
        return (
            f"Relaxed along the base's mean input (`protect: mean`) with omega {omega}: "
            f"`W = W_merged - (1 - omega) (D u) u^T`, `D = W_merged - W_base`, where u is the mean of the weight's input in the base, of length 1, {text}"
        )
    return (
        f"Relaxed by activation-informed merging (AIM, [arXiv:2502.02421](https://arxiv.org/abs/2502.02421)) with omega {omega}, "
        f"scaling {how.scaling}: `W = W_base + (W_merged - W_base) * (1 - s * (1 - omega))`, where s is the mean absolute activation "
        f"of an input channel in the base model over that of the tensor's most active one, {text}"
    )
