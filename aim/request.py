"""What a user asks of AIM, as values: what to relax, where the statistics of the base come from, what to keep of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aim.activations import Activations, is_activations_file
from aim.choices import Calibration, Kept, Relaxing
from checkpoints.errors import ArgumentError, InputError
from checkpoints.problems import Problems
from checkpoints.save_path import existing_ancestor, is_writable, partial_folder
from checkpoints.settings import setting

if TYPE_CHECKING:
    from aim.step import AimStep
    from streaming.output import RunOptions


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
            save_path: of the output.
            options: of the run.
            dry_run: fetch no texts.

        Raises: Refusals: files to be kept that could not be written.
        """
        from aim.step import AimStep

        self.check_kept(save_path)
        kept = Kept(self.save_activations, self.figures)
        return AimStep(self.relaxing, self.statistics, options, kept, self.places, dry_run=dry_run)

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
