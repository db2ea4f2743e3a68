"""Activation-informed merging: pull merged weights back to the base on the input channels that the base relies on.

from aim import CalibrationData, Omega, Relaxing, relax_checkpoint
from aim.calibrate import calibrate
from checkpoints import open_model

base, merged = open_model("./base"), open_model("./added")
activations = calibrate(base, CalibrationData("texts.jsonl", n_samples=64))
relax_checkpoint(merged, base, activations, "./relaxed", Relaxing((Omega(0.4),)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from aim.activations import Activations as Activations
    from aim.activations import load_activations as load_activations
    from aim.calibrate import CalibrationOptions as CalibrationOptions
    from aim.calibration_text import CalibrationData as CalibrationData
    from aim.choices import Calibration as Calibration
    from aim.choices import Relaxing as Relaxing
    from aim.omegas import Omega as Omega
    from aim.reading import read_request as read_request
    from aim.relax_work import perform_aim as perform_aim
    from aim.relax_work import relax_checkpoint as relax_checkpoint
    from aim.request import AimRequest as AimRequest
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "Activations": "aim.activations",
            "AimRequest": "aim.request",
            "Calibration": "aim.choices",
            "CalibrationData": "aim.calibration_text",
            "CalibrationOptions": "aim.calibrate",
            "Omega": "aim.omegas",
            "Relaxing": "aim.choices",
            "load_activations": "aim.activations",
            "read_request": "aim.reading",
            "perform_aim": "aim.relax_work",
            "relax_checkpoint": "aim.relax_work",
        },
    )

__all__ = [
    "Activations",
    "AimRequest",
    "Calibration",
    "CalibrationData",
    "CalibrationOptions",
    "Omega",
    "Relaxing",
    "load_activations",
    "perform_aim",
    "read_request",
    "relax_checkpoint",
]
