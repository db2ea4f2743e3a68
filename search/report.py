"""What a search leaves in its folder: trials.csv, recipe.yml, report.json, report.md and figures."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpoints.files import write_text
from search.goals import ACCURACY, Goal
from search.study import LOSSES, REASON, SECONDS, Study

FIGURES = "figures"


def write_trials(study: Study) -> Path:
    """Write every trial with its parameters and what it gave, as CSV. Raises InputError: it cannot be written."""
    names = sorted({name for trial in study.trials for name in trial.params})
    goals = [goal.name for goal in study.goals]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tasks = sorted({task for trial in study.complete for task in trial.user_attrs.get(LOSSES, {})})
    writer.writerow(
        [
            "number",
            "state",
            *goals,
            *(task if task.startswith(ACCURACY) else f"loss: {task}" for task in tasks),
            *names,
            "seconds",
            "reason",
        ]
    )
    for trial in study.trials:
        values = list(trial.values) if trial.values is not None and trial in study.complete else [""] * len(goals)
        losses = trial.user_attrs.get(LOSSES, {})
        means = [f"{sum(losses[task]) / len(losses[task]):.6f}" if task in losses else "" for task in tasks]
        own = [_rounded(trial.params.get(name, "")) for name in names]
        noted = [trial.user_attrs.get(key, "") for key in (SECONDS, REASON)]
        writer.writerow([trial.number, trial.state.name.lower(), *values, *means, *own, *noted])
    path = study.folder / "trials.csv"
    write_text(path, text.getvalue(), name="study")
    return path


def _rounded(value: Any) -> Any:
    """A parameter without the digits of a step's rounding."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def write_recipe(folder: Path, tree: Mapping[str, Any], comment: str) -> Path:
    """Write a recipe that merge.py reads, with a first line that says what it is. Raises InputError: it cannot be written."""
    path = folder / "recipe.yml"
    text = yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_text(path, f"# {comment}\n{text}", name="study")
    return path


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))


def write_report(folder: Path, content: Mapping[str, Any], text: str) -> list[Path]:
    """Write the comparison for programs and for people. Raises InputError: it cannot be written."""
    paths = [folder / "report.json", folder / "report.md"]
    write_text(paths[0], json.dumps(content, indent=2, ensure_ascii=False) + "\n", name="study")
    write_text(paths[1], text + "\n", name="study")
    return paths


def draw(study: Study) -> list[Path]:
    """Draw the goal over trials, each parameter against it, how much each parameter matters, and for several goals the front."""
    from matplotlib import rc_context

    from reports.figures import STYLE, save, subplots

    folder = study.folder / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    complete, paths = study.complete, list[Path]()
    if not complete:
        return paths
    goal = study.goals[0]
    values = [trial.values[0] for trial in complete]
    with rc_context(STYLE):
        # The goal over trials, and the best so far.
        figure, (axes,) = subplots(1, columns=1, size=(5.0, 3.2))
        best: list[float] = []
        for value in values:
            best.append(value if not best or goal.better(value, best[-1]) else best[-1])
        axes.plot([trial.number for trial in complete], values, "o", ms=3, label="trial")
        axes.step([trial.number for trial in complete], best, where="post", label="best so far")
        axes.set(xlabel="trial", ylabel=goal.text)
        axes.legend()
        paths += save(figure, folder, "trials")
        # Each parameter against the goal.
        names = sorted({name for trial in complete for name in trial.params})
        figure, panels = subplots(len(names), columns=3, size=(3.0, 2.4))
        for axes, name in zip(panels, names, strict=True):
            there = [(trial.params[name], trial.values[0]) for trial in complete if name in trial.params]
            axes.plot([str(x) if isinstance(x, str | bool) else x for x, _ in there], [y for _, y in there], "o", ms=3)
            axes.set(xlabel=name, ylabel=goal.name)
        paths += save(figure, folder, "parameters")
        shares = importances(study)
        if shares:
            figure, (axes,) = subplots(1, columns=1, size=(5.0, 0.4 + 0.3 * len(shares)))
            ordered = sorted(shares.items(), key=lambda item: item[1])
            axes.barh([name for name, _ in ordered], [share for _, share in ordered])
            axes.set(xlabel="importance (PED-ANOVA)")
            paths += save(figure, folder, "importance")
        if len(study.goals) > 1:
            figure, (axes,) = subplots(1, columns=1, size=(4.2, 3.6))
            front = sorted(study.best(len(complete)), key=lambda trial: trial.values[0])
            axes.plot(values, [trial.values[1] for trial in complete], "o", ms=3, color="#7f7f7f", label="trial")
            axes.plot([t.values[0] for t in front], [t.values[1] for t in front], "o-", ms=4, label="front")
            axes.set(xlabel=study.goals[0].text, ylabel=study.goals[1].text)
            axes.legend()
            paths += save(figure, folder, "front")
    return paths


def importances(study: Study) -> dict[str, float]:
    """How much each parameter matters for the first goal, of those that every finished trial has; empty where too few are."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = study.complete
    shared = set.intersection(*(set(trial.params) for trial in complete)) if complete else set()
    varied = [name for name in sorted(shared) if len({str(trial.params[name]) for trial in complete}) > 1]
    if len(complete) < 8 or not varied:
        return {}
    several = len(study.goals) > 1
    sign = -1.0 if study.goals[0].is_gain else 1.0  # of low values, as the evaluator has it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says that low values are meant
        found = get_param_importances(
            study.study,
            evaluator=PedAnovaImportanceEvaluator(),
            params=varied,
            target=(lambda trial: sign * float(trial.values[0])) if several else None,
        )
    return {name: float(share) for name, share in found.items()}


def goals_as_json(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """What was searched for."""
    return [{"name": goal.name, "text": goal.text, "more_is_better": goal.is_gain} for goal in goals]
