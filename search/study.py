"""The trials of a search: chosen by Optuna, noted in a journal that several processes and later runs share."""

from __future__ import annotations

import fcntl
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, Interrupted
from checkpoints.settings import setting
from checkpoints.work_folder import differences
from search.goals import Goal
from search.space import Free, Space

if TYPE_CHECKING:
    import optuna

JOURNAL, LOCK = "journal.log", "lock"
NAME = "tune_merge"
IDENTITY, RECIPE, LOSSES, SECONDS, REASON = "identity", "recipe", "losses", "seconds", "reason"
RUNGS = ((1, 0.25), (2, 0.5), (4, 1.0))
"""Steps of successive halving, and the share of the documents that a candidate has been scored on by then."""
STARTUP = 10
"""Trials that are drawn at random before what they gave is looked at."""
MOST_FAILURES = 20
"""Candidates one after the other that no recipe could be made of, after which the space is at fault."""

Progress = Callable[[int], bool]
"""Told which step a candidate has come to; whether it may stop there."""
Values = Sequence[float]


@dataclass(frozen=True)
class Evaluation:
    """What came of a candidate.

    Attributes:
        values: of the goals.
        losses: task -> of each document; empty where a problem has none.
    """

    values: Values
    losses: Mapping[str, Sequence[float]]


Evaluate = Callable[[Mapping[str, Any], Callable[[int, float], bool]], Evaluation | None]
"""Makes and scores a candidate: its recipe, and what is told a step and the goal by then, and says whether to stop; None where it did."""


def import_optuna() -> Any:
    """The library. Raises InputError: it is not installed."""
    try:
        import optuna
    except ImportError:
        raise InputError(
            "a search needs the package optuna, which is not installed. Run: pip install -r requirements-search.txt"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass(frozen=True)
class Budget:
    """When a search ends: whichever comes first.

    Attributes:
        trials: that are finished, of all processes and runs together; None for any number.
        minutes: of this run; None for any time.

    Raises: ArgumentError: neither, or not above 0.
    """

    trials: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.trials is None and self.minutes is None:
            raise ArgumentError(
                f"{setting('trials')}: expected a budget, got none. Give trials or {setting('minutes')}."
            )
        if self.trials is not None and self.trials < 1:
            raise ArgumentError(f"{setting('trials')}: expected a whole number above 0, got {self.trials}.")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ArgumentError(f"{setting('minutes')}: expected a number above 0, got {self.minutes}.")

    def as_text(self) -> str:
        """For people."""
        parts = [f"{self.trials} trials"] if self.trials is not None else []
        parts += [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        return " or ".join(parts)


class Study:
    """A search's trials in a folder, which may be there from before, and other processes may work on.

    Args:
        folder: made where it is missing.
        space, goals: what is searched, and for what.
        identity: everything that decides what a candidate scores; a study of another identity is refused.
        seed: of what is drawn.
        stops_early: whether candidates that fare badly on a part of the documents are given up.

    Raises: InputError: the study there is of another search; the folder cannot be written; optuna is missing.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        goals: Sequence[Goal],
        identity: Mapping[str, Any],
        *,
        seed: int = 0,
        stops_early: bool = True,
    ):
        self._optuna = import_optuna()
        self.folder, self.space, self.goals, self._seed = folder, space, goals, seed
        self._stops_early = stops_early and len(goals) == 1
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.locked():
                storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
                directions = ["maximize" if goal.is_gain else "minimize" for goal in goals]
                known = [summary.study_name for summary in self._optuna.get_all_study_summaries(storage)]
                if NAME in known:
                    self.study = self._optuna.load_study(study_name=NAME, storage=storage)
                    self._check(identity)
                else:
                    self.study = self._optuna.create_study(storage=storage, study_name=NAME, directions=directions)
                    self.study.set_user_attr(IDENTITY, json.loads(json.dumps(dict(identity))))
                    for method in space.methods:
                        self.study.enqueue_trial(space.defaults(method))
                self.study.pruner = self._pruner()
        except OSError as error:
            raise InputError(
                f"{setting('study', folder)}: cannot be written: {error.strerror}. Choose another folder."
            ) from error

    def _check(self, identity: Mapping[str, Any]) -> None:
        there = self.study.user_attrs.get(IDENTITY)
        here = json.loads(json.dumps(dict(identity)))
        if there != here:
            differing = ", ".join(differences(there, here)[:5]) if isinstance(there, dict) else "everything"
            raise ArgumentError(
                f"{setting('study', self.folder)}: holds a search that differs in {differing}. Run that command again to go on with it, or choose another folder."
            )

    def _pruner(self) -> Any:
        if not self._stops_early:
            return self._optuna.pruners.NopPruner()
        return self._optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have what one process alone may do wait for the others; the lock ends with its process."""
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ------------------------------------------------------------------------------------------------------ trials

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All that were begun, in order."""
        found: list[optuna.trial.FrozenTrial] = self.study.get_trials(deepcopy=False)
        return found

    @property
    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Those that count: scored on all documents, or given up."""
        states = self._optuna.trial.TrialState
        return [trial for trial in self.trials if trial.state in (states.COMPLETE, states.PRUNED)]

    @property
    def complete(self) -> list[optuna.trial.FrozenTrial]:
        """Those that were scored on all documents."""
        state = self._optuna.trial.TrialState.COMPLETE
        return [trial for trial in self.trials if trial.state == state]

    def best(self, count: int) -> list[optuna.trial.FrozenTrial]:
        """The best, of different recipes: by the goal, or the Pareto front by the first goal."""
        goal = self.goals[0]
        found = self.complete if len(self.goals) == 1 else self.study.best_trials
        ordered = sorted(found, key=lambda trial: (-trial.values[0] if goal.is_gain else trial.values[0], trial.number))
        different: dict[str, optuna.trial.FrozenTrial] = {}
        for trial in ordered:
            different.setdefault(json.dumps(trial.params, sort_keys=True), trial)
        return list(different.values())[:count]

    def note(self, key: str, content: Any) -> None:
        """Keep something beside the trials, for every process and later runs."""
        self.study.set_user_attr(key, content)

    def noted(self, key: str) -> Any:
        """What was kept under a key; None where nothing was."""
        return self.study.user_attrs.get(key)

    def run(self, evaluate: Evaluate, budget: Budget, progress: Callable[[int], object] = lambda count: None) -> None:
        """Try candidates until the budget is spent.

        Args:
            evaluate: makes and scores one; raises InputError where a recipe cannot be made of it, which counts as no trial.
            progress: called with how many trials have been finished since the last time, of all processes.

        Raises: Interrupted: Ctrl-C; InputError: no recipe can be made of many candidates, one after the other.
        """
        started, told, failures = time.monotonic(), 0, 0
        while True:
            done = len(self.finished)
            progress(done - told)
            told = done
            if budget.trials is not None and done >= budget.trials:
                return
            if budget.minutes is not None and time.monotonic() - started >= 60 * budget.minutes:
                return
            failed = self._try(evaluate)
            failures = failures + 1 if failed else 0
            if failures >= MOST_FAILURES:
                raise InputError(
                    f"{self.space.where}: expected recipes, got {failures} candidates one after the other that are none: {failed}"
                )

    def _try(self, evaluate: Evaluate) -> str:
        """One trial; why none came of it, empty where one did."""
        states = self._optuna.trial.TrialState
        running = sum(trial.state == states.RUNNING for trial in self.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self.study.sampler = self._sampler(self._seed + 1000 * (len(self.finished) + running))
            trial = self.study.ask()
            started = time.monotonic()
            try:
                tree = self.space.choose(lambda name, free: _suggest(trial, name, free))
                trial.set_user_attr(RECIPE, tree)
                evaluation = evaluate(tree, lambda step, value: self._stops(trial, step, value))
            except KeyboardInterrupt:
                self.study.tell(trial, state=states.FAIL)
                raise Interrupted(
                    f"interrupted. Run the same command again to go on; {self.folder} holds {len(self.finished)} finished trials."
                ) from None
            except InputError as error:
                trial.set_user_attr(REASON, str(error))
                self.study.tell(trial, state=states.FAIL)
                return str(error)
            except BaseException:
                self.study.tell(trial, state=states.FAIL)
                raise
            trial.set_user_attr(SECONDS, round(time.monotonic() - started, 3))
            if evaluation is None:
                self.study.tell(trial, state=states.PRUNED)
            else:
                trial.set_user_attr(LOSSES, {task: list(values) for task, values in evaluation.losses.items()})
                self.study.tell(trial, list(evaluation.values))
        return ""

    def _stops(self, trial: Any, step: int, value: float) -> bool:
        if not self._stops_early:
            return False
        trial.report(value, step)
        return bool(trial.should_prune())

    def _sampler(self, seed: int) -> Any:
        """Of one trial. Its seed follows from how many there are, so that a search that goes on draws what it would have drawn."""
        samplers = self._optuna.samplers
        if len(self.goals) > 1:
            return samplers.NSGAIISampler(seed=seed, population_size=16)
        return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, group=True)


def _suggest(trial: Any, name: str, free: Free) -> Any:
    if free.choices:
        return trial.suggest_categorical(name, list(free.choices))
    if free.is_whole:
        return trial.suggest_int(name, free.low, free.high, step=int(free.step or 1), log=free.log)
    value = trial.suggest_float(name, free.low, free.high, step=free.step, log=free.log)
    return round(value, 4) if free.step is None and not free.log else float(f"{value:.6g}")
