"""Sweeps on the tiny family, with both test sets in full: `make experiments`. Hours on a busy machine; it goes on where it was.

    PYTHONPATH=. python examples/experiments.py
    PYTHONPATH=. python examples/experiments.py --folder /tmp/experiments --out docs/figures

Of the merges of all three fine-tunes: AIM's omega for every method, lambda with and without AIM, AIM's two controls, and the
calibration text. docs/experiments.md says what came out.
"""

from __future__ import annotations

from examples.miniature import FINE_TUNES, METHODS, OMEGA, SINGLES, Candidate

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
