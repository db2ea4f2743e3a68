"""Searches: a made-up problem whose best point is known, by one process, two, and one that is cut off; texts, goals, comparison."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from checkpoints.errors import ArgumentError, InputError, Interrupted, Refusals
from reports.hypervolume import hv_gain
from search.goals import GOALS, read_goals, standing
from search.held_out import Rival, compare, controls_of, rivals_of, soup_of, verdict
from search.report import draw, write_trials
from search.space import Space
from search.study import MOST_FAILURES, Budget, Evaluation, Study

ROOT = Path(__file__).resolve().parent.parent
TREE = yaml.safe_load("""
merge_method: {search: [ties, task_arithmetic, dare_ties]}
base_model: base
models:
- {model: a, parameters: {weight: {search: [0.2, 1]}}}
- {model: b}
parameters:
  lambda: {search: [0.2, 1.4]}
  density: {search: [0.1, 0.9], step: 0.1}
aim: {omega: {search: [0, 1]}, protect: {search: [channels, mean]}}
""")
BEST = {"lambda": 0.7, "weight": 0.5, "omega": 0.3}


def bowl(tree: Mapping[str, Any], stops: Any = lambda step, value: False) -> Evaluation | None:
    """A loss with its minimum, 1, at `BEST`, ties and a density of 0.4; the others have higher ones."""
    weight = tree["models"][0]["parameters"]["weight"]
    value = 1 + (tree["parameters"]["lambda"] - BEST["lambda"]) ** 2 + (weight - BEST["weight"]) ** 2
    value += 0.5 * (tree["aim"]["omega"] - BEST["omega"]) ** 2 + 0.1 * (tree["aim"]["protect"] == "mean")
    value += {"ties": 0.0, "task_arithmetic": 0.3, "dare_ties": 0.4}[tree["merge_method"]]
    value += (tree["parameters"]["density"] - 0.4) ** 2 if "density" in tree["parameters"] else 0.0
    if stops(1, value) or stops(2, value):
        return None
    return Evaluation([value], {"task": [value] * 4})


def make_study(folder: Path, goals: str = "loss", **how: Any) -> Study:
    return Study(folder, Space(TREE, "recipe.yml"), read_goals(goals), {"what": "a bowl"}, **how)


def check_found(study: Study) -> None:
    """The best trial is near to the best point."""
    best = study.best(1)[0]
    tree = best.user_attrs["recipe"]
    assert best.values[0] < 1.1  # a fifth of what drawing at random leaves
    assert tree["merge_method"] == "ties"
    assert tree["aim"]["protect"] == "channels"
    assert tree["parameters"]["lambda"] == pytest.approx(BEST["lambda"], abs=0.35)


# ----------------------------------------------------------------------------------------------------------- the space


def test_a_space_is_what_a_recipe_marks_as_free():
    space = Space(TREE, "recipe.yml")
    names = [free.name for free in space.free]
    assert names == [
        "merge_method", "models[0].parameters.weight", "parameters.lambda", "parameters.density", "aim.omega", "aim.protect",
    ]  # fmt: skip
    assert space.methods == ("ties", "task_arithmetic", "dare_ties")
    # What a method has no use for is left out, and is not asked for; names are a method's own where it is free.
    asked: list[str] = []

    def low(name: str, free: Any) -> Any:
        asked.append(name)
        return "task_arithmetic" if name == "merge_method" else free.choices[0] if free.choices else free.low

    tree = space.choose(low)
    assert tree["parameters"] == {"lambda": 0.2}
    assert asked == [
        "merge_method", "task_arithmetic: models[0].parameters.weight", "task_arithmetic: parameters.lambda", "aim.omega", "aim.protect",
    ]  # fmt: skip
    assert TREE["parameters"]["lambda"] == {"search": [0.2, 1.4]}
    # Untuned: the method's own defaults, in the middle where it has none, and no AIM.
    assert space.untuned("ties")["parameters"] == {"lambda": 1.0, "density": 0.5}
    assert space.untuned("ties")["models"][0] == {"model": "a", "parameters": {"weight": 1.0}}
    assert "aim" not in space.untuned("ties")
    assert space.defaults("ties")["ties: parameters.density"] == 0.5


def test_ranges_of_whole_numbers_and_ratios_and_given_defaults():
    text = "{merge_method: ties, seed: {search: [1, 9]}, parameters: {lambda: {search: [0.1, 10], log: true, default: 2}, weight: {search: [0, 1]}}}"
    free = {one.name: one for one in Space(yaml.safe_load(text), "r").free}
    assert free["seed"].is_whole
    assert free["parameters.lambda"].log
    assert not free["parameters.weight"].is_whole
    assert free["parameters.weight"].nearest(7) == 1.0
    assert Space(yaml.safe_load(text), "r").untuned("ties")["parameters"]["lambda"] == 2


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("{search: [1]}", "expected [LOW, HIGH] or a list of choices"),
        ("{search: 3}", "expected [LOW, HIGH] or a list of choices"),
        ("{search: [2, 1]}", "expected the smaller number first"),
        ("{search: [0, 1], stp: 0.1}", "expected the keys search, step, log, default, got stp"),
        ("{search: [0, 1], step: 2}", "step: expected a number above 0"),
        ("{search: [0, 1], log: true}", "log: expected true with a range above 0"),
        ("{search: [a, b], step: 1}", "step and log belong to a range"),
        ("{search: [[1], [2]]}", "expected numbers or words"),
        ("{search: [0, 1], default: high}", "default: expected a number"),
    ],
)
def test_marks_that_are_wrong_are_refused_with_their_place(mark: str, says: str):
    tree = yaml.safe_load(f"{{merge_method: ties, parameters: {{lambda: {mark}}}}}")
    with pytest.raises(Refusals) as caught:
        Space(tree, "recipe.yml")
    assert str(caught.value).startswith("recipe.yml: parameters.lambda: ")
    assert says in str(caught.value)


def test_spaces_that_are_none():
    with pytest.raises(Refusals, match="expected something to search, got none"):
        Space({"merge_method": "ties"}, "r")
    with pytest.raises(Refusals, match="unknown method"):
        Space({"merge_method": {"search": ["ties", "tis"]}}, "r")


# ----------------------------------------------------------------------------------------------------------- the study


def test_the_best_point_is_found(tmp_path: Path):
    study = make_study(tmp_path, stops_early=False)
    study.run(bowl, Budget(trials=60))
    assert len(study.complete) == 60
    check_found(study)
    assert [trial.user_attrs["recipe"]["merge_method"] for trial in study.trials[:3]] == list(Space(TREE, "r").methods)


def test_bad_candidates_are_given_up_and_the_best_point_is_found(tmp_path: Path):
    study = make_study(tmp_path)
    study.run(bowl, Budget(trials=50))
    assert len(study.finished) == 50
    assert 8 < len(study.complete) < 45
    check_found(study)
    rows = write_trials(study).read_text().splitlines()
    assert len(rows) == 51
    assert sum(",pruned," in row for row in rows) == 50 - len(study.complete)
    drawn = {path.name for path in draw(study)}
    assert {"trials.png", "parameters.svg", "importance.png"} <= drawn


WORKER = """
import sys
from pathlib import Path
from search.study import Budget
from tests.test_search import bowl, make_study
study = make_study(Path(sys.argv[1]), stops_early=False)
study.run(bowl, Budget(trials=60))
print(len([trial for trial in study.trials]))
"""


def test_two_processes_find_it_in_one_journal(tmp_path: Path):
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        assert process.communicate(timeout=300)[0]
        assert process.returncode == 0
    study = make_study(tmp_path, stops_early=False)
    assert 60 <= len(study.complete) <= 61
    check_found(study)
    numbers = [trial.number for trial in study.trials]
    assert numbers == sorted(set(numbers))


def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path):
    whole = make_study(tmp_path / "whole", stops_early=False)
    whole.run(bowl, Budget(trials=25))
    calls = []

    def cut_off(tree: Mapping[str, Any], stops: Any) -> Evaluation | None:
        calls.append(tree)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return bowl(tree, stops)

    study = make_study(tmp_path / "cut", stops_early=False)
    with pytest.raises(Interrupted, match=r"Run the same command again to go on; .* holds 11 finished trials"):
        study.run(cut_off, Budget(trials=25))
    again = make_study(tmp_path / "cut", stops_early=False)
    again.run(bowl, Budget(trials=25))
    assert [trial.params for trial in again.complete] == [trial.params for trial in whole.complete]
    again.run(lambda tree, stops: pytest.fail("the budget is spent"), Budget(trials=25))


def test_a_study_of_another_search_is_refused(tmp_path: Path):
    make_study(tmp_path)
    with pytest.raises(
        ArgumentError, match=r"holds a search that differs in what \(\"a bowl\" there, \"another\" here\)"
    ):
        Study(tmp_path, Space(TREE, "r"), read_goals("loss"), {"what": "another"})


def test_candidates_that_no_recipe_can_be_made_of_count_as_no_trials(tmp_path: Path):
    calls = []

    def picky(tree: Mapping[str, Any], stops: Any) -> Evaluation | None:
        calls.append(tree)
        if len(calls) % 2:
            raise InputError("weight: the sum must not be 0")
        return bowl(tree, stops)

    study = make_study(tmp_path / "half", stops_early=False)
    study.run(picky, Budget(trials=5))
    assert (len(study.complete), len(calls)) == (5, 10)
    assert "weight: the sum must not be 0" in write_trials(study).read_text()

    def never(tree: Mapping[str, Any], stops: Any) -> Evaluation | None:
        raise InputError("no such thing")

    with pytest.raises(InputError, match=f"got {MOST_FAILURES} candidates one after the other that are none: no such"):
        make_study(tmp_path / "none", stops_early=False).run(never, Budget(trials=5))


def test_several_goals_give_a_front(tmp_path: Path):
    """Two losses that pull lambda apart: nothing of the front is worse in both than something else of it."""

    def apart(tree: Mapping[str, Any], stops: Any) -> Evaluation | None:
        lambda_ = tree["parameters"]["lambda"]
        return Evaluation([(lambda_ - 0.4) ** 2, (lambda_ - 1.2) ** 2], {})

    study = make_study(tmp_path, "loss,worst")
    study.run(apart, Budget(trials=40))
    front = [tuple(trial.values) for trial in study.best(40)]
    assert len(front) > 5
    assert not any(all(a < b for a, b in zip(one, other, strict=True)) for one in front for other in front)
    assert all(0.3 < trial.user_attrs["recipe"]["parameters"]["lambda"] < 1.3 for trial in study.best(40))
    assert "front.png" in {path.name for path in draw(study)}


@pytest.mark.parametrize("given", [{}, {"trials": 0}, {"minutes": 0.0}, {"minutes": math.nan}])
def test_a_budget_needs_an_end(given: dict[str, Any]):
    with pytest.raises(ArgumentError, match="expected a"):
        Budget(**given)


def test_minutes_end_a_search(tmp_path: Path):
    study = make_study(tmp_path, stops_early=False)
    study.run(bowl, Budget(minutes=0.01))
    assert study.complete


# --------------------------------------------------------------------------------------------- goals and the comparison


LOSSES = {"a": [1.0, 2.0, 3.0], "b": [0.5, 0.5]}


def test_goals_by_hand():
    assert GOALS["loss"].value(LOSSES, []) == pytest.approx((2.0 + 0.5) / 2)
    assert GOALS["worst"].value(LOSSES, []) == 2.0
    inputs = [{"a": [2.0] * 3, "b": [1.0] * 2}, {"a": [3.0] * 3, "b": [0.25] * 2}]
    expected = hv_gain(np.exp([[-2.0, -1.0], [-3.0, -0.25]]), [np.exp([-1.0, -2.0, -3.0]).mean(), math.exp(-0.5)])
    assert expected > 0
    assert GOALS["hypervolume"].value(LOSSES, inputs) == pytest.approx(expected)
    assert GOALS["hypervolume"].value(inputs[0], inputs) == 0.0


def test_the_standard_error_is_that_of_paired_documents():
    """Documents differ much, the models by a little on each: paired, that is sure; a coin's throw is not."""
    generator = np.random.default_rng(1)
    base = {task: generator.normal(3, 1, 40) for task in "ab"}
    better = {task: values - 0.1 + generator.normal(0, 0.05, 40) for task, values in base.items()}
    other = {task: values + generator.normal(0, 0.5, 40) for task, values in base.items()}
    for name in ("loss", "worst", "hypervolume"):
        goal = GOALS[name]
        difference = goal.difference(better, base, [other])
        assert difference.value == pytest.approx(goal.value(better, [other]) - goal.value(base, [other]))
        assert standing(goal, difference) == (
            "better" if name != "hypervolume" or difference.value else "not distinguishable"
        )
    plain = GOALS["loss"].difference(better, base, [])
    gaps = [better[task] - base[task] for task in base]
    assert plain.stderr == pytest.approx(math.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps)) / 2, rel=0.1)
    assert standing(GOALS["loss"], GOALS["loss"].difference(other, base, [])) == "not distinguishable"
    assert standing(GOALS["loss"], GOALS["loss"].difference(base, better, [])) == "worse"
    assert standing(GOALS["loss"], GOALS["loss"].difference(base, base, [])) == "not distinguishable"


def test_the_winner_is_compared_with_all_that_it_has_to_beat():
    space = Space(TREE, "r")
    winner = {**space.untuned("ties"), "aim": {"omega": 0.4, "protect": "mean"}}
    inputs = [{"t": [3.0] * 5}, {"t": [2.0] * 5}, {"t": [1.5] * 5}]
    rivals = rivals_of(
        space, [Rival("best found", winner, is_candidate=True)], inputs, ["base", "a", "b"], [GOALS["loss"]]
    )
    names = [rival.name for rival in rivals]
    assert names == [
        "best found", "default ties", "default task_arithmetic", "default dare_ties", "best single model (b)", "uniform soup",
        "its control: uniform", "its control: permuted", "its control: random", "base (base)",
    ]  # fmt: skip
    assert rivals[4].position == 2
    assert [rival.tree["aim"]["control"] for rival in rivals[6:9] if rival.tree] == ["uniform", "permuted", "random"]
    assert soup_of(winner)["models"] == [{"model": name, "parameters": {"weight": 1.0}} for name in ("a", "b")]
    own = [1.0, 1.1, 0.9, 1.05, 0.95]
    near = [value + change for value, change in zip(own, (0.01, -0.01, 0.012, -0.012, 0.001), strict=True)]
    scored: list[Any] = [{"t": own}, *({"t": near} for _ in rivals[1:])]
    scored[4] = {"t": [1.5, 1.6, 1.4, 1.5, 1.55]}
    rows = compare(rivals, scored, inputs, [GOALS["loss"]])
    assert rows[0].differences == []
    assert rows[4].standings == ["better"]
    lines = verdict(rows, [GOALS["loss"]])
    assert "loss: on the held-out texts the best found is better than best single model (b)." in lines
    assert sum(line.count(name) for line in lines for name in names[1:]) >= 9


@pytest.mark.parametrize("aim", [None, {"omega": 1.0}, {"omega": 0.4, "control": "uniform"}])
def test_where_aim_does_nothing_there_is_no_control(aim: dict[str, Any] | None):
    assert controls_of({"aim": aim} if aim else {}) == []


def test_unknown_goals():
    with pytest.raises(ArgumentError, match=r"unknown goal 'los'\. Did you mean 'loss'"):
        read_goals("los")
    with pytest.raises(ArgumentError, match="expected each goal once"):
        read_goals("loss,loss")
    assert json.dumps([goal.name for goal in read_goals("loss, worst")]) == '["loss", "worst"]'
