"""Sweeps on the tiny family, with both test sets in full: `make experiments`. Hours on a busy machine; it goes on where it was.

    PYTHONPATH=. python examples/experiments.py
    PYTHONPATH=. python examples/experiments.py --folder /tmp/experiments --out docs/figures

Of the merges of all three fine-tunes: AIM's omega for every method, lambda with and without AIM, AIM's two controls, and the
calibration text. docs/experiments.md says what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.miniature import FINE_TUNES, METHODS, OMEGA, SINGLES, Candidate, Workspace, evaluate_all, guarded
from reports import Verdicts, bootstrap
from reports.bootstrap import Estimate, Model
from reports.entries import Entry
from reports.figures import for_dark_too
from reports.results_files import read_results

SPLITS = ("test_0", "test_1")

OMEGAS = (0.0, 0.2, 0.4, 0.6, 0.8)
LAMBDAS = (0.3, 0.5, 0.7, 0.9, 1.2)
"""Beside 1, the default."""
DRAWS = (0, 1, 2)
TEXTS = (
    ("code", 256),
    ("math", 256),
    ("instruct", 256),
    ("random", 256),
    ("mixture", 8),
    ("mixture", 32),
    ("mixture", 128),
)
"""Beside the mixture with 256 texts, the default."""

PLAIN = {
    method: tuple(Candidate(method, FINE_TUNES, seed=seed) for seed in (DRAWS if "dare" in method else (None,)))
    for method in METHODS
}
"""Method -> its merges without AIM, one for each draw."""
SUM = PLAIN["task_arithmetic"][0]


def candidates() -> list[Candidate]:
    """Every model of the sweeps, each once; the cheapest questions first."""
    found = [*SINGLES]
    for merges in PLAIN.values():
        found += merges
    found += [
        merge.with_aim(omega) for omega in (OMEGA, 0.8, 0.0, 0.6, 0.2) for merges in PLAIN.values() for merge in merges
    ]
    for lambda_ in LAMBDAS:
        by_lambda = [Candidate(method, FINE_TUNES, lambda_=lambda_) for method in ("task_arithmetic", "ties")]
        found += [*by_lambda, by_lambda[0].with_aim()]
    for omega in OMEGAS:
        found += [SUM.with_aim(omega, control="uniform"), SUM.with_aim(omega, control="permuted")]
    found += [SUM.with_aim(control="permuted", seed=seed) for seed in (1, 2)]
    found += [SUM.with_aim(text=text) for text in TEXTS]
    return list(dict.fromkeys(found))


def run(folder: Path, out: Path) -> None:
    """Merge and evaluate what is missing; then write the figures and the tables."""
    workspaces = [Workspace(folder, split) for split in SPLITS]
    every = candidates()
    files = evaluate_all(workspaces, every)
    entries = [{each: read_results(path) for each, path in zip(every, paths, strict=True)} for paths in files]
    scored = {each: pool([one[each] for one in entries]) for each in every}
    out.mkdir(parents=True, exist_ok=True)
    tables = [
        singles_table(scored),
        omega_table(scored),
        lambda_table(scored),
        controls_table(scored),
        texts_table(scored),
    ]
    (out / "tables.md").write_text("\n".join(tables))
    print("\n".join(tables))
    for path in draw(scored, out):
        print(f"{path}: written")


def pool(entries: Sequence[Entry]) -> Model:
    """One model's verdicts on the items of all splits, by benchmark."""
    found: dict[str, Verdicts] = {}
    for name in entries[0].scores:
        parts = [entry.scores[name].verdicts for entry in entries]
        known = [part for part in parts if part is not None]
        assert len(known) == len(parts), f"{entries[0].source}: its samples are missing"
        earned, possible = (np.concatenate([getattr(one, key) for one in known]) for key in ("earned", "possible"))
        found[name] = Verdicts(earned, possible, np.arange(len(earned)))
    return found


def average(models: Sequence[Model]) -> Model:
    """What several draws of one merge earn on average, item by item."""
    return {
        name: Verdicts(np.mean([model[name].earned for model in models], axis=0), one.possible, one.rows)
        for name, one in models[0].items()
    }


def mean_score(model: Model) -> Estimate:
    """The mean over the benchmarks in percent, with its interval over items."""
    draws = bootstrap.resample_all([model]).mean(axis=2)[:, 0]
    return bootstrap.estimate(100 * float(np.mean([one.score for one in model.values()])), 100 * draws)


def difference(model: Model, other: Model) -> Estimate:
    """The paired difference of two mean scores in points."""
    found = bootstrap.mean_difference(model, other)
    assert found.stderr is not None
    assert found.low is not None
    assert found.high is not None
    return Estimate(*(100 * number for number in (found.value, found.stderr, found.low, found.high)))


Scored = Mapping[Candidate, Model]


def at_omega(scored: Scored, method: str, omega: float) -> Model:
    """A method's merge of all three at an omega, averaged over its draws; omega 1 is the merge without AIM."""
    merges = [merge if omega == 1.0 else merge.with_aim(omega) for merge in PLAIN[method]]
    return average([scored[merge] for merge in merges])


def at_lambda(scored: Scored, method: str, lambda_: float, omega: float | None = None) -> Model:
    """A method's merge of all three at a lambda."""
    merge = Candidate(method, FINE_TUNES, lambda_=None if lambda_ == 1.0 else lambda_)
    return scored[merge if omega is None else merge.with_aim(omega)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """A Markdown table under a title."""
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def shown(number: Estimate, sign: str = "") -> str:
    """`61.9 [60.1, 63.7]`"""
    return f"{number.value:{sign}.1f} [{number.low:{sign}.1f}, {number.high:{sign}.1f}]"


def singles_table(scored: Scored) -> str:
    """The single models on each benchmark."""
    names = list(scored[SINGLES[0]])
    rows = [
        [one.name, *(f"{100 * scored[one][name].score:.1f}" for name in names), shown(mean_score(scored[one]))]
        for one in SINGLES
    ]
    return table(["model", *names, "mean"], rows, "Single models, percent")


def omega_table(scored: Scored) -> str:
    """Mean scores over omega, and what AIM changes at 0.4."""
    omegas = (*OMEGAS, 1.0)
    rows = [
        [
            method,
            *(f"{mean_score(at_omega(scored, method, omega)).value:.1f}" for omega in omegas),
            shown(difference(at_omega(scored, method, OMEGA), at_omega(scored, method, 1.0)), "+"),
        ]
        for method in METHODS
    ]
    header = ["method", *(f"omega {omega:g}" for omega in omegas), f"AIM {OMEGA:g} minus none"]
    return table(header, rows, "Mean of six benchmarks by omega (1 is the merge without AIM), all three fine-tunes")


def lambda_table(scored: Scored) -> str:
    """Mean scores over lambda."""
    lambdas = sorted((*LAMBDAS, 1.0))
    lines = {"task_arithmetic": ("task_arithmetic", None), "ties": ("ties", None)}
    lines[f"task_arithmetic, AIM {OMEGA:g}"] = ("task_arithmetic", OMEGA)
    rows = [
        [label, *(shown(mean_score(at_lambda(scored, method, lambda_, omega))) for lambda_ in lambdas)]
        for label, (method, omega) in lines.items()
    ]
    return table(["merge", *(f"lambda {lambda_:g}" for lambda_ in lambdas)], rows, "Mean of six benchmarks by lambda")


def controls_table(scored: Scored) -> str:
    """AIM and its controls on the sum of all three."""
    rows = []
    for omega in OMEGAS:
        aim = scored[SUM.with_aim(omega)]
        permuted = [SUM.with_aim(omega, control="permuted", seed=seed) for seed in (None, 1, 2)]
        models = {
            "uniform": scored[SUM.with_aim(omega, control="uniform")],
            "permuted": average([scored[one] for one in permuted if one in scored]),
        }
        cells = [shown(difference(aim, model), "+") for model in models.values()]
        rows.append([f"{omega:g}", *(f"{mean_score(one).value:.1f}" for one in (aim, *models.values())), *cells])
    header = ["omega", "AIM", "uniform", "permuted", "AIM minus uniform", "AIM minus permuted"]
    return table(header, rows, "AIM and the controls that know nothing of the channels: task_arithmetic, lambda 1")


def texts_table(scored: Scored) -> str:
    """What the calibration text changes."""
    default = scored[SUM.with_aim()]
    rows = [["mixture, 256 texts", shown(mean_score(default)), ""]]
    for name, count in TEXTS:
        model = scored[SUM.with_aim(text=(name, count))]
        rows.append([f"{name}, {count} texts", shown(mean_score(model)), shown(difference(model, default), "+")])
    return table(
        ["calibration text", "mean", "minus the default"], rows, f"Calibration text: task_arithmetic, omega {OMEGA:g}"
    )


def draw(scored: Scored, folder: Path) -> list[Path]:
    """Mean score over omega, over lambda, and against the controls, with intervals over items."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, rc_context

    omegas, lambdas = (*OMEGAS, 1.0), sorted((*LAMBDAS, 1.0))
    figures: dict[str, tuple[str, dict[str, tuple[Sequence[float], list[Model]]]]] = {
        "omega": ("omega (1: without AIM)", {m: (omegas, [at_omega(scored, m, o) for o in omegas]) for m in METHODS}),
        "lambda": (
            "lambda",
            {
                "task_arithmetic": (lambdas, [at_lambda(scored, "task_arithmetic", one) for one in lambdas]),
                "ties": (lambdas, [at_lambda(scored, "ties", one) for one in lambdas]),
                f"task_arithmetic, AIM {OMEGA:g}": (
                    lambdas,
                    [at_lambda(scored, "task_arithmetic", one, OMEGA) for one in lambdas],
                ),
            },
        ),
        "controls": (
            "omega",
            {
                control or "AIM": (OMEGAS, [scored[SUM.with_aim(omega, control=control)] for omega in OMEGAS])
                for control in ("", "uniform", "permuted")
            },
        ),
    }
    written = []
    with rc_context(
        {"svg.hashsalt": "experiments", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, (label, lines) in figures.items():
            figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
            for line, (xs, models) in lines.items():
                means = [mean_score(model) for model in models]
                axes.plot(xs, [mean.value for mean in means], marker="o", markersize=4, label=line)
                axes.fill_between(xs, [mean.low or 0 for mean in means], [mean.high or 0 for mean in means], alpha=0.15)
            axes.set_xlabel(label)
            axes.set_ylabel("mean of six benchmarks, percent")
            axes.legend(frameon=False)
            for suffix in ("png", "svg"):
                path = folder / f"experiments_{name}.{suffix}"
                figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
                if suffix == "svg":
                    path.write_text(for_dark_too(path.read_text()))
                written.append(path)
            pyplot.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("experiments"), help="for merges and results (default: experiments)"
    )
    parser.add_argument("--out", type=Path, help="for tables and figures (default: FOLDER/figures)")
    arguments = parser.parse_args(argv)
    return guarded("experiments.py", lambda: run(arguments.folder, arguments.out or arguments.folder / "figures"))


if __name__ == "__main__":
    sys.exit(main())
