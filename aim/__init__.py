"""Activation-informed merging: pull merged weights back to the base on the input channels that the base relies on.

from aim import CalibrationData, Omega, Relaxing, relax_checkpoint
from aim.calibrate import calibrate
from checkpoints import open_model

base, merged = open_model("BASE"), open_model("MERGED")
activations = calibrate(base, CalibrationData("texts.jsonl"))
relax_checkpoint(merged, base, activations, "OUT", Relaxing((Omega(0.4),)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from aim.calibrate import CalibrationOptions as CalibrationOptions
    from aim.calibration import CalibrationData as CalibrationData
    from aim.choices import Calibration as Calibration
    from aim.choices import Relaxing as Relaxing
    from aim.omegas import Omega as Omega
    from aim.reading import read_request as read_request
    from aim.request import AimRequest as AimRequest
    from aim.run import perform_aim as perform_aim
    from aim.run import relax_checkpoint as relax_checkpoint
    from aim.statistics import Activations as Activations
    from aim.statistics import load_activations as load_activations
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "Activations": "aim.statistics",
            "AimRequest": "aim.request",
            "Calibration": "aim.choices",
            "CalibrationData": "aim.calibration",
            "CalibrationOptions": "aim.calibrate",
            "Omega": "aim.omegas",
            "Relaxing": "aim.choices",
            "load_activations": "aim.statistics",
            "read_request": "aim.reading",
            "perform_aim": "aim.run",
            "relax_checkpoint": "aim.run",
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
