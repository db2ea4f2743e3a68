"""The benchmarks, one per file. A name is enough to know that one exists; its module is imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.benchmarks.contract import Benchmark

BENCHMARKS = {
    "humaneval": "evaluation.benchmarks.humaneval:HumanEval",
    "mbpp": "evaluation.benchmarks.mbpp:Mbpp",
    "mmlu": "evaluation.benchmarks.mmlu:Mmlu",
    "math": "evaluation.benchmarks.math:Math",
    "gsm8k": "evaluation.benchmarks.gsm8k:Gsm8k",
    "ifeval": "evaluation.benchmarks.ifeval:IfEval",
    "mmlu_pro": "evaluation.benchmarks.mmlu_pro:MmluPro",
}
# The six columns of the AIM paper's table, in its order; mmlu_pro is the option that its program has besides.
PAPER = ("humaneval", "mbpp", "mmlu", "math", "gsm8k", "ifeval")
MATHS = ("math", "gsm8k")


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, a key of BENCHMARKS."""
    module, _, attribute = BENCHMARKS[name].partition(":")
    benchmark: Benchmark = getattr(importlib.import_module(module), attribute)()
    return benchmark
