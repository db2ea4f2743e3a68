"""Activation-informed merging: pull merged weights back to the base on the input channels that the base relies on.

from aim import CalibrationData, calibrate, relax_checkpoint

activations = calibrate("BASE", CalibrationData("texts.jsonl"))
relax_checkpoint("MERGED", "BASE", activations, "OUT", omegas=[0.4])
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Activations": "aim.statistics",
    "CalibrationData": "aim.calibration",
    "calibrate": "aim.calibrate",
    "relax": "aim.relax",
    "relax_checkpoint": "aim.run",
}
__all__ = ["Activations", "CalibrationData", "calibrate", "relax", "relax_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` needs no torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'aim' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
