"""The ways to merge that are compared. Each is a command line of merge.py, so a new one is one more `Rule`.

A rule's settings are chosen on validation, from its grid. A control knows nothing of what its rule knows and changes the merge as
much; it is scored twice, at its rule's settings and at its own best.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

LAMBDAS = (0.4, 0.6, 0.8, 1.0)
QUICK_LAMBDAS = (0.6, 1.0)
DENSITIES = (0.2, 0.5)
ALL_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)

Grid = Mapping[str, tuple[float, ...]]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """A way to merge.

    Attributes:
        name: of its rows.
        flags: of merge.py, besides inputs and output. `{lambda}` and other names of the grid stand for a setting,
            `{statistics}` for the flags that give AIM the base's activations, `{texts}` for the experts' training texts, separated by commas.
        grid: setting -> values to try.
        control_of: the rule that it is a control of; empty for a rule.
    """

    name: str
    flags: str
    grid: Grid = field(default_factory=dict)
    control_of: str = ""

    def candidates(self) -> list[dict[str, float]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    def command(self, settings: Settings, places: Mapping[str, str]) -> list[str]:
        """The flags with settings and places filled in."""
        texts = {name: f"{value:g}" for name, value in settings.items()} | dict(places)
        return [part for flag in self.flags.split() for part in string.Formatter().vformat(flag, (), texts).split()]

    def label(self, settings: Settings) -> str:
        """Of a candidate: the rule's name and its settings, by which its scores are found again."""
        return ", ".join((self.name, *(f"{name} {value:g}" for name, value in settings.items())))


REFERENCE = "task arithmetic"
"""The rule that all others are compared with, at its best lambda."""
SUM = "--method task_arithmetic --lambda {lambda}"
AIM = f"{SUM} --omega 0 {{statistics}}"
MEAN = f"{AIM} --protect mean"


def rules(lambdas: tuple[float, ...], densities: tuple[float, ...] = (0.2,)) -> list[Rule]:
    """All rules, with the values of lambda and density that are tried."""
    grid = {"lambda": lambdas}
    # TIES averages what agrees, where the others sum, so its lambdas are twice as large.
    doubled = {"density": densities, "lambda": tuple(2 * value for value in lambdas)}
    return [
        Rule(REFERENCE, SUM, grid),
        Rule("AIM", AIM, grid),
        Rule("AIM, uniform control", f"{AIM} --control uniform", grid, control_of="AIM"),
        Rule("AIM, permuted control", f"{AIM} --control permuted", grid, control_of="AIM"),
        Rule("mean input", MEAN, grid),
        Rule("RegMean", "--method regmean --model_data {texts}"),
        Rule("TIES", "--method ties --density {density} --lambda {lambda}", doubled),
        Rule("DARE", "--method dare_linear --density {density} --lambda {lambda}", {"density": densities, **grid}),
    ]
