"""What a user chooses of AIM, value by value: how weights are relaxed, how statistics are taken, what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aim.calibrate import CalibrationOptions, Numerics
from aim.calibration_text import CalibrationData
from aim.formula import AFTER_FIRST, CONTROLS, SCALINGS, Control, Protect, Scaling
from aim.omegas import Omega
from checkpoints.errors import ArgumentError, unknown
from checkpoints.problems import Problems
from checkpoints.save_path import SWEEP_PREFIX
from checkpoints.settings import setting

DRAWN = ("permuted", "random")
"""The controls that draw, by the seed."""


@dataclass(frozen=True)
class Relaxing:
    """How merged weights are relaxed.

    Attributes:
        omegas: one checkpoint for each.
        sweep: in folders of their own, `omega_0.2`, even where there is only one.
        protect: `channels`: the base's weights of busy input channels, as published; `mean`: its answer to the mean input.
        scaling: of s: identity, sqrt or square; after_first, after_first_sqrt or after_first_square without the first token of each block.
        control: none, or one of the controls that know nothing of the base's inputs; `without_top` leaves the top channels as merged.
        seed: of the permuted and the random control.
        numerics: `reference` rounds as the published program does.
    """

    omegas: tuple[Omega, ...] = (Omega(0.4),)
    protect: Protect = "channels"
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
        return {
            "omegas": [str(omega) for omega in self.omegas],
            **self.protected,
            **{key: getattr(self, key) for key in fields},
        }

    @property
    def protected(self) -> dict[str, str]:
        """`protect` for JSON, left out where it is what it was before there was another: such files stay the same."""
        return {} if self.protect == "channels" else {"protect": self.protect}

    def __post_init__(self) -> None:
        allowed: list[tuple[str, str, Sequence[str]]] = [
            ("protect", self.protect, list(CONTROLS)),
            ("scaling", self.scaling, list(SCALINGS)),
            ("control", self.control, list(dict.fromkeys(name for names in CONTROLS.values() for name in names))),
            ("numerics", self.numerics, ["float32", "reference"]),
        ]
        problems = Problems()
        for name, value, known in allowed:
            if value not in known:
                problems.add(ArgumentError(f"{setting(name)}: {unknown('value', value, known)}"))
        problems.raise_if_any()
        mean, channels = setting("protect", "mean"), setting("protect", "channels")
        if self.control == "without_top" and self.protect == "mean":
            problems.add(
                ArgumentError(
                    f"{setting('control', 'without_top')}: {mean} knows no channels, of which the top ones could be left out. Use "
                    f"{setting('control', 'permuted')}, or {channels}."
                )
            )
        elif self.control not in CONTROLS[self.protect]:
            problems.add(
                ArgumentError(
                    f"{setting('control', self.control)}: {channels} has no direction that could be drawn. Use {setting('control', 'permuted')}, or {mean}."
                )
            )
        if self.protect == "mean" and self.scaling != "identity":
            problems.add(
                ArgumentError(f"{setting('scaling')}: {mean} has no s to scale. Leave it out, or use {channels}.")
            )
        if self.protect == "mean" and self.numerics == "reference":
            problems.add(
                ArgumentError(
                    f"{setting('numerics', 'reference')}: the published program has no {mean}. Use {setting('numerics', 'float32')}, or {channels}."
                )
            )
        if self.scaling.startswith(AFTER_FIRST) and self.numerics == "reference":
            problems.add(
                ArgumentError(
                    f"{setting('numerics', 'reference')}: the published program has no {setting('scaling', self.scaling)}. Use "
                    f"{setting('numerics', 'float32')}, or {setting('scaling', 'identity')}."
                )
            )
        problems.raise_if_any()


@dataclass(frozen=True)
class Calibration:
    """Statistics that are taken in the run.

    Attributes:
        data: the text that the base is run on.
        options: how it is run.
    """

    data: CalibrationData = field(default_factory=CalibrationData)
    options: CalibrationOptions = field(default_factory=CalibrationOptions)


@dataclass(frozen=True)
class Kept:
    """What a run keeps beside its output.

    Attributes:
        save_activations: the file in which the statistics are kept; None keeps none.
        figures: the folder into which the importance of channels is drawn; None draws nothing.
    """

    save_activations: Path | None = None
    figures: Path | None = None
