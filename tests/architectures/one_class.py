"""One class: merged, run, relaxed, and compared."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aim import Omega, Relaxing, relax_checkpoint
from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData, TokenBlocks
from checkpoints import open_model
from checkpoints.errors import InputError, first_line
from merging import make_recipe, merge
from streaming.output import RunOptions
from tests.architectures.measured import Measured
from tests.architectures.tiny import Tiny, tokens

OMEGA, LAMBDA, NOISE = 0.4, 0.5, 0.03
TOLERANCE = 2e-3
"""Between two ways to compute attention, of the largest channel."""
READS_TEXT = ("causal", "image")
"""Kinds of classes that AIM relaxes; of the others it says that it does not."""


@dataclass
class Outcome:
    """What came of a class.

    Attributes:
        right: merged as the formula says; and relaxed by the measured means wherever a product has it, or refused in words where it
            cannot be run on plain text.
        built: why its tiny model cannot be built here; empty where it can.
        merged: what is wrong with the merge; empty where nothing is.
        runs: whether it runs on plain text; else the error of its forward pass.
        refusal: what AIM said instead.
        relaxed: tensors relaxed by the measured means.
        wrong: what differs from the measurement.
        left: tensors that products have and that stay as merged, with the reason.
        unmeasured: tensors with statistics that no product is seen to have: norms.
        notes: warnings of the merge.
        seconds: taken.
    """

    kind: str
    model_type: str
    name: str
    right: bool = False
    built: str = ""
    merged: str = ""
    runs: str = ""
    refusal: str = ""
    relaxed: int = 0
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unmeasured: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def look_at(tiny: Tiny, folder: Path) -> Outcome:
    """Build a class's tiny model in a folder, merge two fine-tunes of it, relax the merge, and hold everything against the measurement."""
    started = time.monotonic()
    outcome = Outcome(tiny.kind, tiny.model_type, tiny.name)
    base, merged = folder / "base", folder / "merged"
    try:
        model = tiny.build()
    except Exception as error:  # a library that is not there, a config of a class that has changed
        outcome.built = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return outcome
    model.save_pretrained(base)
    for seed, name in enumerate(("one", "two")):
        _fine_tune(base, folder / name, seed)
    outcome.merged = _merge(folder, outcome)
    if not outcome.merged:
        _relax(tiny, base, merged, outcome)
    is_refused = bool(outcome.refusal) and (outcome.runs != "yes" or tiny.kind not in READS_TEXT)
    outcome.right = not outcome.merged and (is_refused or not (outcome.wrong or outcome.left or outcome.refusal))
    outcome.seconds = round(time.monotonic() - started, 2)
    return outcome


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _fine_tune(base: Path, folder: Path, seed: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(100 + seed)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        changed = {
            name: one + NOISE * torch.randn(one.shape, generator=generator) if one.is_floating_point() else one
            for name, one in tensors.items()
        }
        save_file(changed, folder / path.name, {"format": "pt"})


def _merge(folder: Path, outcome: Outcome) -> str:
    """Merge; what is wrong with the result."""
    names = f"{folder / 'one'},{folder / 'two'}"
    recipe = make_recipe("task_arithmetic", str(folder / "base"), names, parameters={"lambda": LAMBDA})
    try:
        result = merge(recipe, folder / "merged", RunOptions(report="none", digest="none"))
    except InputError as error:
        return f"refused: {error}"
    outcome.notes = [*result.plan.notes, *result.plan.warnings]
    base, one, two, merged = (_stored(folder / name) for name in ("base", "one", "two", "merged"))
    if base.keys() != merged.keys():
        return f"other tensors than the base: {sorted(base.keys() ^ merged.keys())[:3]}"
    for name, stored in base.items():
        if not stored.is_floating_point():
            continue
        b = stored.double()
        wanted = b + LAMBDA * ((one[name].double() - b) + (two[name].double() - b))
        if not torch.allclose(merged[name].double(), wanted, rtol=1e-6, atol=1e-7):
            return f"{name}: differs from the formula"
    return ""


def _relax(tiny: Tiny, base: Path, merged: Path, outcome: Outcome) -> None:
    import transformers

    text = tokens()
    model = getattr(transformers, tiny.name).from_pretrained(base, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(Exception):  # a class without experts says so in its own way
            model.set_experts_implementation("eager")
    measured = Measured(model)
    try:
        with torch.no_grad(), measured:
            for block in text:
                model(input_ids=block[None], use_cache=False)
        outcome.runs = "yes"
    except Exception as error:  # in every way there is
        outcome.runs = f"{type(error).__name__}: {first_line(error)}"
    opened = [open_model(str(path)) for path in (merged, base)]
    try:
        data = CalibrationData("ids", block_size=text.shape[1])
        options = CalibrationOptions(dtype="float32", mode="whole", tolerance=0.0)
        activations = calibrate(opened[1], data, options, blocks=TokenBlocks(text, len(text), 0, 0, 0))
    except InputError as error:
        outcome.refusal = str(error)
        return
    relax_checkpoint(opened[0], opened[1], activations, base.parent / "relaxed", Relaxing((Omega(OMEGA),)), RunOptions(report="none", digest="none"))  # fmt: skip
    _compare(measured, activations, base, merged, outcome)


def _compare(measured: Measured, activations: Any, base: Path, merged: Path, outcome: Outcome) -> None:
    before, after, relaxed = (_stored(path) for path in (base, merged, base.parent / "relaxed"))
    for name, stored in before.items():
        if not stored.is_floating_point() or not stored.numel():
            continue
        statistics = activations.statistics.get(name)
        if statistics is None:
            if measured.is_multiplied(stored):
                outcome.left.append(f"{name}: {activations.silent.get(name, 'not selected')}")
            if not torch.equal(relaxed[name], after[name]):
                outcome.wrong.append(f"{name}: changed without statistics")
            continue
        got = statistics.mean_abs.double()
        first, by_matrix = activations.input_dims[name], got.ndim > 1
        if stored.ndim == got.ndim == 2:  # groups of rows
            got = got.repeat_interleave(len(stored) // len(got), dim=0)
        dims = _dims(first, got.shape[-1], stored.shape)
        want = measured.means(stored, dims, by_matrix=by_matrix)
        if want is None:
            outcome.unmeasured += 1
            continue
        off = float((want - got).abs().max() / want.max()) if want.shape == got.shape else float("inf")
        if off > TOLERANCE:
            outcome.wrong.append(f"{name}: mean |x| off by {100 * off:.2g} % of the largest channel")
            continue
        largest = want.amax(dim=-1, keepdim=True)
        factor = 1 - torch.where(largest > 0, want / largest, 0.0) * (1 - OMEGA)
        kept = {*dims, *([0] if by_matrix else [])}
        factor = factor.reshape([size if axis in kept else 1 for axis, size in enumerate(stored.shape)])
        change = after[name].double() - stored.double()
        error = (relaxed[name].double() - stored.double() - change * factor).abs()
        if bool((error > 1e-6 + 2 * TOLERANCE * change.abs()).any()):
            outcome.wrong.append(f"{name}: relaxed otherwise than by the formula")
            continue
        outcome.relaxed += 1


def _dims(first: int, width: int, shape: Sequence[int]) -> list[int]:
    """The dimensions that run over `width` input channels: the first, and those behind it until they are so many."""
    dims = [first]
    while math.prod(shape[dim] for dim in dims) < width:
        dims.append(dims[-1] + 1)
    return dims
