"""What benchmarks grade with: math-verify's workers, IFEval's workers, the sandbox. Started when first used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from evaluation.benchmarks.settings import Advance, Settings
from evaluation.grading.answers import Answer
from evaluation.grading.maths import OVERRUN_S
from evaluation.grading.pool import Outcome, WorkerPool

if TYPE_CHECKING:
    from evaluation.sandbox import Program, Sandbox, Verdict

IFEVAL_TIMEOUT_S = 60.0


@dataclass
class Tools:
    """Graders that cost something to start; use it as a context manager.

    Attributes:
        settings: the run's, for extraction that depends on them.
        workers: processes; by default one per core that we may use.
        sandbox: runs programs; None where no benchmark needs it.
        punkt_folder: folder for NLTK_DATA with punkt's data; None uses the simple splitter.
    """

    settings: Settings
    workers: int = 0
    sandbox: Sandbox | None = None
    punkt_folder: str | None = None

    def __post_init__(self) -> None:
        self.workers = self.workers or usable_cores()
        self._stack = ExitStack()
        self._pools: dict[str, WorkerPool] = {}

    def __enter__(self) -> Tools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._pools.clear()

    def compare_answers(
        self, pairs: Sequence[tuple[str, Answer]], advance: Advance
    ) -> list[Literal["right", "wrong", "timeout", "error"]]:
        """Compare (reference, answer) pairs by math-verify; an answer without forms is wrong."""
        asked = [index for index, (_, answer) in enumerate(pairs) if answer.forms]
        verdicts: list[Literal["right", "wrong", "timeout", "error"]] = ["wrong"] * len(pairs)
        advance(len(pairs) - len(asked))
        items = [[pairs[index][0], list(pairs[index][1].forms)] for index in asked]
        outcomes = self._pool("evaluation.grading.maths:compare", OVERRUN_S).map(items, advance)
        for index, outcome in zip(asked, outcomes, strict=True):
            verdicts[index] = ("right" if outcome.result else "wrong") if outcome.status == "done" else outcome.status
        return verdicts

    def check_instructions(self, items: Sequence[tuple[Mapping[str, Any], str]], advance: Advance) -> list[Outcome]:
        """IFEval's checks of (row, response) pairs; results as `ifeval_checks.check`."""
        arguments = [[dict(row), response, self.punkt_folder] for row, response in items]
        return self._pool("evaluation.grading.ifeval_checks:check", IFEVAL_TIMEOUT_S).map(arguments, advance)

    def run_programs(self, programs: Sequence[Program], advance: Advance) -> list[Verdict]:
        """Run programs in the sandbox."""
        assert self.sandbox is not None, "a benchmark that runs code needs a sandbox"
        return self.sandbox.run(programs, progress=lambda done, count: advance(1))

    def _pool(self, target: str, timeout_s: float) -> WorkerPool:
        if target not in self._pools:
            pool = WorkerPool(target, workers=self.workers, timeout_s=timeout_s)
            self._pools[target] = self._stack.enter_context(pool)
        return self._pools[target]


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
