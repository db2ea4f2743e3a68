"""Benchmarks: a checkpoint in, graded answers out; programs that a model wrote run only in a sandbox.

from evaluation import evaluate, make_request

outcome = evaluate(make_request(model="OUT", benchmarks="gsm8k,humaneval", data_dir="DATA", limit=50))
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "evaluate": "evaluation.run",
    "Outcome": "evaluation.run",
    "make_request": "evaluation.request",
    "Request": "evaluation.request",
    "BENCHMARKS": "evaluation.benchmarks",
}
__all__ = ["BENCHMARKS", "Outcome", "Request", "evaluate", "make_request"]


def __getattr__(name: str) -> Any:
    """Import on first use: the sandbox and the graders need neither torch nor lm_eval."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'evaluation' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
