"""Benchmarks: a checkpoint in, graded answers out; programs that a model wrote run only in a sandbox.

from evaluation import evaluate, make_request

outcome = evaluate(make_request(model="OUT", benchmarks="gsm8k,humaneval", data_dir="DATA", limit=50))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.lazy import lazy_exports

if TYPE_CHECKING:
    from evaluation.benchmarks import BENCHMARKS as BENCHMARKS
    from evaluation.request import Request as Request
    from evaluation.request import make_request as make_request
    from evaluation.run import Outcome as Outcome
    from evaluation.run import evaluate as evaluate
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "evaluate": "evaluation.run",
            "Outcome": "evaluation.run",
            "make_request": "evaluation.request",
            "Request": "evaluation.request",
            "BENCHMARKS": "evaluation.benchmarks",
        },
    )

__all__ = ["BENCHMARKS", "Outcome", "Request", "evaluate", "make_request"]
