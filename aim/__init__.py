"""Activation-informed merging: pull merged weights back to the base on the input channels that the base relies on.

from aim import CalibrationData, Omega, Relaxing, relax_checkpoint
from aim.calibrate import calibrate
from checkpoints.model import open_model

base, merged = open_model("BASE"), open_model("MERGED")
activations = calibrate(base, CalibrationData("texts.jsonl"))
relax_checkpoint(merged, base, activations, "OUT", Relaxing((Omega(0.4),)))
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Activations": "aim.statistics",
    "AimRequest": "aim.request",
    "Calibration": "aim.request",
    "CalibrationData": "aim.calibration",
    "CalibrationOptions": "aim.calibrate",
    "Omega": "aim.omegas",
    "Relaxing": "aim.request",
    "load_activations": "aim.statistics",
    "read_request": "aim.reading",
    "perform_aim": "aim.run",
    "relax_checkpoint": "aim.run",
}
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


def __getattr__(name: str) -> Any:
    """Import on first use, so that the package is imported without torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'aim' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
