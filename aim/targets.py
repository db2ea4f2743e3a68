"""Which tensors of a checkpoint are relaxed, and where their inputs show up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aim.activations import Target
from checkpoints.errors import InputError
from checkpoints.model import Model
from checkpoints.placements import Placement
from checkpoints.reader import equal_tensors
from checkpoints.settings import Remark, setting

REASONS = {
    "embedding": "an embedding",
    "bias": "a bias",
    "other": "no module multiplies its input with it",
}


@dataclass(frozen=True)
class Selection:
    """What a model offers to be relaxed.

    targets: checkpoint tensor -> where its input shows up.
    input_dims: checkpoint tensor -> its dimension that runs over input channels.
    skipped: every other tensor -> why it stays as merged.
    """

    targets: Mapping[str, Target]
    input_dims: Mapping[str, int]
    skipped: Mapping[str, str]

    def renamed(self, names: Mapping[str, str]) -> Selection:
        """The same under other tensor names: old -> new; the rest keep theirs."""
        return Selection(
            {names.get(key, key): value for key, value in self.targets.items()},
            {names.get(key, key): value for key, value in self.input_dims.items()},
            {names.get(key, key): value for key, value in self.skipped.items()},
        )


def select_targets(base: Model) -> Selection:
    """Every weight of the base that a module multiplies its input with: linear layers, an untied head, norms, experts."""
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
    for name, info in tensors.items():
        placement = architecture.placements.get(name)
        if name in tied:
            skipped[name] = "tied to an embedding"
            continue
        if placement is None or placement.input_dim is None:
            skipped[name] = REASONS.get(placement.kind, REASONS["other"]) if placement else "no parameter of the model"
            continue
        targets[name] = _target(placement, info.shape)
        input_dims[name] = placement.input_dim
    return Selection(targets, input_dims, skipped)


def _target(placement: Placement, shape: tuple[int, ...]) -> Target:
    assert placement.input_dim is not None
    leaf = placement.parameter.rpartition(".")[2]
    experts = shape[0] if placement.kind == "experts" and placement.expert is None else None
    return Target(placement.module, leaf, shape[placement.input_dim], placement.expert, experts)


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
                targets[stored], input_dims[stored] = Target(module, "weight", tensors[twin].shape[1]), 1
                skipped.pop(stored, None)
    return Selection(targets, input_dims, skipped), warnings
