"""Select the tensors of a checkpoint that are relaxed, and say where their inputs show up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aim.watcher import Target
from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.pieces import Origin
from checkpoints.placements import Placement
from checkpoints.reader import equal_tensors
from checkpoints.settings import Remark, setting

Origins = Mapping[str, Sequence[Origin]]
"""Output tensor -> what it is in the base's files: one tensor, or one for each expert that is packed in it."""

REASONS = {
    "embedding": "an embedding",
    "bias": "a bias",
    "convolution": "a convolution",
    "other": "takes part in no matrix product",
}


@dataclass(frozen=True)
class Selection:
    """What a model offers to be relaxed.

    Attributes:
        targets: checkpoint tensor -> where its input shows up.
        input_dims: checkpoint tensor -> its dimension that runs over input channels, where its module tells; of the others only
            a run of the model shows it, or that nothing is multiplied with them.
        skipped: every other tensor -> why it stays as merged.
    """

    targets: Mapping[str, Target]
    input_dims: Mapping[str, int]
    skipped: Mapping[str, str]

    def renamed(self, origins: Origins) -> Selection:
        """The same for output tensors that are other ones in the base's files; the rest keep their names.

        Args:
            origins: output tensor -> what it is there.
        """
        targets, dims, skipped = dict(self.targets), dict(self.input_dims), dict(self.skipped)
        for name in {origin.name for parts in origins.values() for origin in parts}:
            targets.pop(name, None)
            dims.pop(name, None)
            skipped.pop(name, None)
        for name, parts in origins.items():
            first = parts[0]
            if first.name not in self.targets:
                skipped[name] = self.skipped.get(first.name, "not stored in the base")
                continue
            target, dim = self.targets[first.name], self.input_dims.get(first.name)
            more = 0
            if first.expert is not None:  # one of those that are packed there
                axes = tuple(None if axis in (None, 0) else axis - 1 for axis in target.axes)
                target, more = replace(target, axes=axes, shape=target.shape[1:], expert=first.expert), -1
            elif len(parts) > 1:
                axes = tuple(0 if axis is None else axis + 1 for axis in target.axes)
                target, more = replace(target, axes=axes, shape=(len(parts), *target.shape), expert=None), 1
            targets[name] = target
            if dim is not None:
                dims[name] = dim + more
        return Selection(targets, dims, skipped)


def select_targets(base: Model) -> Selection:
    """Every weight of the base that something may be multiplied with: linear layers, an untied head, norms, experts, bare matrices."""
    architecture, tensors = base.architecture, base.weights.tensors
    # A head that is stored beside the embedding it is tied to is an embedding, unless the two differ.
    tied = {
        name
        for name, twin in architecture.tied.items()
        if name in tensors and twin in tensors and equal_tensors(base.weights, name, twin)
    }
    targets: dict[str, Target] = {}
    input_dims: dict[str, int] = {}
    skipped: dict[str, str] = {}
    skipped |= dict.fromkeys(base.weights.modules.tensors, "outside of the model, which calibration runs")
    for name, info in tensors.items():
        placement = architecture.placements.get(name)
        if placement is None:
            skipped[name] = "a buffer" if name in architecture.buffers else "no parameter of the model"
        elif name in tied:
            skipped[name] = "tied to an embedding"
        elif placement.input_dim is None and not _may_be_multiplied(placement, info.shape):
            skipped[name] = REASONS[placement.kind]
        else:
            targets[name] = _target(placement, info.shape)
            if placement.input_dim is not None:
                input_dims[name] = placement.input_dim
    return Selection(targets, input_dims, skipped)


def _may_be_multiplied(placement: Placement, shape: tuple[int, ...]) -> bool:
    """Whether a product may have a tensor of which its module does not tell."""
    return placement.kind == "other" and bool(placement.axes) and len(shape) > 1 and all(shape)


def _target(placement: Placement, shape: tuple[int, ...]) -> Target:
    return Target(placement.parameter, placement.axes, tuple(shape), placement.expert, placement.input_dim is not None)


def select_like_the_reference(base: Model) -> tuple[Selection, list[str]]:
    """What the published program relaxes: every module with a weight and without "embed" in its name, tied heads included.

    Returns: the selection, and a warning for each way in which it differs from ours.
    Raises: InputError: a model on which that program fails or computes nonsense, or that no longer has the modules it had.
    """
    ours = select_targets(base)
    architecture, tensors = base.architecture, base.weights.tensors
    targets, input_dims, skipped = {}, {}, dict(ours.skipped)
    warnings: list[str] = []
    for name, placement in architecture.placements.items():
        if placement.kind == "experts":
            raise InputError(
                f"{setting('numerics', 'reference')}: {name}: the published program had a module for each expert; here all experts of a layer are one. Use {setting('numerics', 'float32')}."
            )
        if not placement.parameter.endswith(".weight"):
            if name in ours.targets:
                skipped[name] = "the published program looks at no parameter but `weight`"
            continue
        # The name on disk, which modules had in that program's transformers: a head `embed_out` is `lm_head` today.
        if "embed" in name.removesuffix(".weight"):
            if placement.kind != "embedding":
                warnings.append(
                    Remark(
                        f"{setting('numerics', 'reference')}: {name} is not relaxed, as its module's name contains 'embed'."
                    )
                )
                skipped[name] = "the published program passes over names that contain 'embed'"
            continue
        if placement.kind not in ("linear", "norm"):
            raise InputError(
                f"{setting('numerics', 'reference')}: {name}: the published program cannot relax it ({placement.kind}). Use {setting('numerics', 'float32')}."
            )
        if name in ours.targets:
            targets[name], input_dims[name] = ours.targets[name], ours.input_dims[name]
    for name, twin in architecture.tied.items():
        module = name.removesuffix(".weight")
        is_tied = twin in tensors and name not in ours.targets  # a head that is stored with numbers of its own is not
        if is_tied and "embed" not in module and name == architecture.output_head:
            warnings.append(
                Remark(
                    f"{setting('numerics', 'reference')}: the embedding {twin} is relaxed too, as {name} is tied to it."
                )
            )
            for stored in [twin, name] if name in tensors else [twin]:
                targets[stored], input_dims[stored] = Target(f"{module}.weight", (0, 1), tuple(tensors[twin].shape)), 1
                skipped.pop(stored, None)
    return Selection(targets, input_dims, skipped), warnings
