"""What a user asks of AIM, as values: what to relax, where the statistics of the base come from, what to keep of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.calibrate import CalibrationOptions, Numerics
from aim.calibration import CalibrationData
from aim.omegas import Omega
from aim.relax import SCALINGS, Control, Scaling
from aim.statistics import Activations, is_activations_file
from checkpoints.errors import ArgumentError, InputError, unknown
from checkpoints.problems import Problems
from checkpoints.settings import setting
from checkpoints.staging import SWEEP_PREFIX, existing_ancestor, is_writable, partial_folder

if TYPE_CHECKING:
    from aim.step import AimStep
    from streaming.output import RunOptions


@dataclass(frozen=True)
class Relaxing:
    """How merged weights are relaxed.

    Attributes:
        omegas: one checkpoint for each; sweep: in folders of their own, `omega_0.2`, even where there is only one.
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
    sweep: bool = False

    @property
    def is_sweep(self) -> bool:
        """Whether each omega gets a folder of its own."""
        return self.sweep or len(self.omegas) > 1

    @property
    def folders(self) -> list[str]:
        """Of the checkpoints, below the output; the output itself where there is only one."""
        return [f"{SWEEP_PREFIX}{omega}" if self.is_sweep else "" for omega in self.omegas]

    def as_json(self) -> dict[str, Any]:
        """Its fields, every omega as it is typed."""
        fields = ("scaling", "control", "seed", "numerics")
        return {"omegas": [str(omega) for omega in self.omegas], **{key: getattr(self, key) for key in fields}}

    def __post_init__(self) -> None:
        allowed: list[tuple[str, str, Sequence[str]]] = [
            ("scaling", self.scaling, list(SCALINGS)),
            ("control", self.control, ["none", "uniform", "permuted"]),
            ("numerics", self.numerics, ["float32", "reference"]),
        ]
        problems = Problems()
        for name, value, known in allowed:
            if value not in known:
                problems.add(ArgumentError(f"{setting(name)}: {unknown('value', value, known)}"))
        problems.raise_if_any()


@dataclass(frozen=True)
class Calibration:
    """Statistics that are taken in the run.

    Attributes:
        data: the text that the base is run on; options: how it is run.
    """

    data: CalibrationData = field(default_factory=CalibrationData)
    options: CalibrationOptions = field(default_factory=CalibrationOptions)


@dataclass(frozen=True)
class AimRequest:
    """AIM as a user asks for it; the same from flags, from a recipe file and from Python.

        merge(recipe, "OUT", aim=AimRequest(Relaxing((Omega(0.4),)), Calibration(CalibrationData("texts.jsonl"))))

    Attributes:
        relaxing: what is relaxed how far.
        statistics: taken in the run; or a file of them; or those that a program has at hand.
        save_activations: the file in which the statistics are kept; None keeps none.
        figures: the folder into which the importance of channels is drawn; None draws nothing.
        places: setting -> where a file gives it, `recipe.yml: aim.omega`, for messages.

    Raises: Refusals: values that exclude each other.
    """

    relaxing: Relaxing = field(default_factory=Relaxing)
    statistics: Calibration | Path | Activations = field(default_factory=Calibration)
    save_activations: Path | None = None
    figures: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.statistics, Calibration):  # one decides for both how numbers are rounded
            options = replace(self.statistics.options, numerics=self.relaxing.numerics)
            object.__setattr__(self, "statistics", replace(self.statistics, options=options))
            return
        problems = Problems()
        if isinstance(self.statistics, Path) and not self.statistics.is_file():
            problems.add(
                ArgumentError(
                    f"{setting('statistics', self.statistics)}: no such file. Make one with {setting('save_activations')}."
                )
            )
        if self.save_activations is not None:
            problems.add(
                ArgumentError(
                    f"{setting('save_activations')}: {setting('statistics')} brings statistics that are kept already. Leave one out."
                )
            )
        problems.raise_if_any()

    def step(self, save_path: Path, options: RunOptions, *, dry_run: bool = False) -> AimStep:
        """What carries it out; see `streaming.job.Request`.

        Args:
            save_path: of the output; options: of the run; dry_run: fetch no texts.

        Raises: Refusals: files to be kept that could not be written.
        """
        from aim.step import AimStep

        self.check_kept(save_path)
        return AimStep(self, options, dry_run=dry_run)

    def check_kept(self, save_path: Path) -> None:
        """Raise Refusals: all that keeps statistics and figures from being written, known before the base is run for them."""
        problems = Problems()
        if self.save_activations is not None:
            problems.extend(_check_kept("save_activations", self.save_activations, save_path, "file"))
        if self.figures is not None:
            problems.extend(_check_kept("figures", self.figures, save_path, "folder"))
        problems.raise_if_any()


def _check_kept(name: str, given: Path, save_path: Path, kind: str) -> list[InputError]:
    """Why a file or folder cannot be written beside the output; nothing where it can."""
    path, out, is_file = given.resolve(), save_path.resolve(), kind == "file"
    where = setting(name, given)
    if path.exists() and path.is_dir() == is_file:
        other = "folder" if is_file else "file"
        return [ArgumentError(f"{where}: expected a {kind}, got a {other}. Name another.")]
    if {out, partial_folder(out)} & {path, *path.parents}:
        return [
            ArgumentError(f"{where}: lies in {setting('save_path')}, which appears whole. Name a {kind} elsewhere.")
        ]
    if is_file and path.exists() and not _is_replaceable(path):
        return [ArgumentError(f"{where}: is no activations file, and is not replaced by one. Name another.")]
    if not is_writable(path if path.is_dir() else existing_ancestor(path)):
        return [InputError(f"{where}: cannot be written. Name another {kind} or change permissions.")]
    return []


def _is_replaceable(path: Path) -> bool:
    """Whether an activations file may take the place of this one, which it may only if it is one."""
    try:
        return is_activations_file(path, str(path))
    except InputError:
        return False
