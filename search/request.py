"""What a user asks of a search, as values, with nothing opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints.errors import ArgumentError
from checkpoints.problems import Problems
from checkpoints.settings import setting
from evaluation.benchmarks.settings import Settings
from search.candidates import Candidate, read_candidate
from search.goals import GOALS, Goal
from search.model_data import with_data
from search.study import Budget


@dataclass(frozen=True)
class SearchRequest:
    """One search.

    Attributes:
        tree: the recipe with its free entries, as a file has it.
        texts: task -> its file.
        benchmarks: names; each is a task by its reference answers, and by its accuracy, as the goals ask.
        data_dir: folder with their data; None for the hub.
        evaluation: what their prompts and limits depend on.
        folder: of the study: journal, trials.csv, recipe.yml, report and figures.
        budget: when it ends.
        goals: what it is for; several give a Pareto front.
        where: the recipe's file, for messages.
        save_path: the best candidate's checkpoint; None writes none.
        held_out: share of the texts that is not searched with.
        documents: of a task on either side at most.
        seed: of what is drawn.
        stops_early: give up candidates that fare badly on a part of the documents.
        mode: whole, layerwise (a layer's weights in memory at a time), or auto, what fits.
        device: where models run and weights are computed.
        workers: threads for weights; None for one per core.
        trust_remote_code: let Python files of a checkpoint run.
        quiet: no progress bars.
        command: what the checkpoint's card shows.

    Raises: Refusals: values out of their range, or that exclude each other.
    """

    tree: Mapping[str, Any]
    texts: Mapping[str, Path]
    folder: Path
    budget: Budget
    goals: Sequence[Goal] = (GOALS["loss"],)
    benchmarks: Sequence[str] = ()
    data_dir: Path | None = None
    evaluation: Settings = field(default_factory=Settings)
    where: str = "recipe"
    save_path: Path | None = None
    held_out: float = 0.5
    documents: int = 16
    seed: int = 0
    stops_early: bool = True
    mode: Literal["auto", "whole", "layerwise"] = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int | None = None
    trust_remote_code: bool = False
    quiet: bool = False
    command: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        if not 0 < self.held_out < 1:
            problems.add(
                ArgumentError(f"{setting('held_out')}: expected a share between 0 and 1, got {self.held_out}.")
            )
        if self.documents < 4:
            problems.add(ArgumentError(f"{setting('documents')}: expected at least 4, got {self.documents}."))
        problems.extend(self._check_tasks())
        problems.raise_if_any()

    def read(self, tree: Mapping[str, Any]) -> Candidate:
        """The candidate of a recipe without free entries. Raises Refusals: everything that is wrong with it."""
        return read_candidate(with_data(tree, self.folder), self.where)

    @property
    def measures(self) -> set[str]:
        """What the goals need: losses, accuracies."""
        return {goal.measures for goal in self.goals}

    def _check_tasks(self) -> Problems:
        """Whether texts and benchmarks are what the goals need."""
        problems = Problems()
        if not self.texts and not self.benchmarks:
            problems.add(
                ArgumentError(
                    f"{setting('texts')}: expected a file of texts for each task, or {setting('benchmarks')}, got none."
                )
            )
        both = sorted(set(self.texts) & set(self.benchmarks))
        if both:
            problems.add(
                ArgumentError(f"{setting('texts')}: the task {both[0]} is a benchmark's. Name it, as NAME=FILE.")
            )
        names = ", ".join(goal.name for goal in self.goals)
        if self.texts and "losses" not in self.measures:
            problems.add(
                ArgumentError(
                    f"{setting('texts')}: texts have a loss, and {setting('goal', names)} asks for none. Leave them out, or add loss."
                )
            )
        if self.benchmarks or self.texts:
            asked = {goal.benchmark for goal in self.goals if goal.benchmark}
            if "accuracies" in self.measures and not self.benchmarks:
                problems.add(
                    ArgumentError(f"{setting('goal', names)}: accuracy is of {setting('benchmarks')}. Name some.")
                )
            elif asked - set(self.benchmarks):
                missing = ", ".join(sorted(asked - set(self.benchmarks)))
                problems.add(
                    ArgumentError(f"{setting('goal', names)}: {setting('benchmarks')} lacks {missing}. Add it.")
                )
        return problems
