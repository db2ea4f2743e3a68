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
    from aim.calibration import CalibrationData as CalibrationData
    from aim.omegas import Omega as Omega
    from aim.relaxing import Relaxing as Relaxing
    from aim.run import relax_checkpoint as relax_checkpoint
    from aim.statistics import Activations as Activations
    from aim.statistics import load_activations as load_activations
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "Activations": "aim.statistics",
            "CalibrationData": "aim.calibration",
            "Omega": "aim.omegas",
            "Relaxing": "aim.relaxing",
            "load_activations": "aim.statistics",
            "relax_checkpoint": "aim.run",
        },
    )

__all__ = ["Activations", "CalibrationData", "Omega", "Relaxing", "load_activations", "relax_checkpoint"]
