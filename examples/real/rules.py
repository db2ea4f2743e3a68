"""The ways to merge that are compared. Each is a command line of merge.py, so a new one is one more `Rule`.

A rule's settings are chosen on validation, from its grid. A control knows nothing of what its rule knows and changes the merge as
much; it is scored twice, at its rule's settings and at its own best.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

LAMBDAS = (0.4, 0.6, 0.8, 1.0)
QUICK_LAMBDAS = (0.6, 1.0)
ALL_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
OMEGAS = (0.0, 0.2, 0.4, 0.6, 0.8)

Grid = Mapping[str, tuple[float, ...]]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """A way to merge.

    Attributes:
        name: of its rows.
        flags: of merge.py, besides inputs and output. `{lambda}` and other names of the grid stand for a setting,
            `{statistics}` for the flags that give AIM the base's activations, `{texts}` for the experts' training texts, separated by commas,
            `{other_texts}` for the same with each expert's text at the next one's place, `{all_texts}` for one file with some of all.
        grid: setting -> values to try.
        control_of: the rule that it is a control of; empty for a rule.
        variant_of: the rule of which it shows an option, on validation alone; empty for all others.
        fixed_rest: what it merges in another way than matrices has a lambda of its own, so that lambda 0 is not the base.
        on_device: it multiplies and factorises matrices, which a GPU does faster; all others are bound by reading and writing.
        prototype: what makes the merge in place of merge.py, a name of `prototypes.PROTOTYPES`; flags are then those of that module.
    """

    name: str
    flags: str
    grid: Grid = field(default_factory=dict)
    control_of: str = ""
    variant_of: str = ""
    fixed_rest: bool = False
    on_device: bool = False
    prototype: str = ""

    def candidates(self) -> list[dict[str, float]]:
        """Every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    def lines(self) -> list[list[dict[str, float]]]:
        """The candidates, those that differ in lambda alone together: they lie on one line."""
        found: dict[tuple[tuple[str, float], ...], list[dict[str, float]]] = {}
        for settings in self.candidates():
            found.setdefault(tuple(pair for pair in settings.items() if pair[0] != "lambda"), []).append(settings)
        return list(found.values())

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
TIES = "--method ties --density {density} --lambda {lambda}"
AIM = "--omega {omega} {statistics}"
MEAN = f"{AIM} --protect mean"
REGMEAN = "--method regmean --model_data {texts} --lambda {lambda}"
REGMEAN_OTHER = REGMEAN.replace("{texts}", "{other_texts}")
SHUFFLED = REGMEAN.replace("regmean", "examples.real.controls:ShuffledRegMean")
REGMEAN_RULE = Rule("RegMean", REGMEAN, {"lambda": (1.0,)}, fixed_rest=True, on_device=True)
REGMEAN_FEW = replace(
    REGMEAN_RULE, name="RegMean, 800 tokens", flags=f"{REGMEAN} --data_tokens 800", variant_of="RegMean"
)

WUDI_RULE = Rule("WUDI", "--method wudi --lambda {lambda}", {"lambda": (1.0,)}, fixed_rest=True, on_device=True)


def rules(
    lambdas: tuple[float, ...],
    *,
    densities: tuple[float, ...] = (0.2,),
    omegas: tuple[float, ...] = (0.0,),
    controls: Sequence[str] = ("uniform", "permuted"),
    regmean_lambdas: tuple[float, ...] = (1.0,),
) -> list[Rule]:
    """The rules of `make real`, with the values that are tried.

    Args:
        controls: of AIM and the mean input.
        regmean_lambdas: of RegMean's controls; it has itself nothing to choose.
    """
    own = {"omega": omegas, "lambda": lambdas}
    theirs = {"omega": (0.0,), "lambda": lambdas}
    # TIES averages what agrees, where the others sum, so its lambdas are twice as large.
    doubled = {"density": densities, "lambda": tuple(2 * value for value in lambdas)}
    found = [Rule(REFERENCE, SUM, {"lambda": lambdas})]
    for name, flags in (("AIM", AIM), ("mean input", MEAN)):
        found.append(Rule(name, f"{SUM} {flags}", own if name == "AIM" else theirs))
        found += [
            Rule(f"{name}, {control} control", f"{SUM} {flags} --control {control}", theirs, control_of=name)
            for control in controls
            if control != "random" or name != "AIM"
        ]
    once, regmean = {"lambda": (1.0,)}, {"lambda": regmean_lambdas}
    return [
        *found,
        replace(REGMEAN_RULE, grid=once),
        replace(REGMEAN_RULE, name="RegMean, other texts control", flags=REGMEAN_OTHER, grid=regmean, control_of="RegMean"),
        replace(REGMEAN_RULE, name="RegMean, shuffled control", flags=SHUFFLED, grid=regmean, control_of="RegMean"),
        Rule("TIES", TIES, doubled),
        Rule("DARE", "--method dare_linear --density {density} --lambda {lambda}", {"density": densities, "lambda": lambdas}),
    ]  # fmt: skip


def quick_rules() -> list[Rule]:
    """Those of `make real-quick`."""
    names = (REFERENCE, "AIM", "AIM, uniform control", "mean input")
    return [rule for rule in rules(QUICK_LAMBDAS) if rule.name in names]


def few_rules(lambdas: tuple[float, ...]) -> list[Rule]:
    """Those that pairs of experts are merged with."""
    names = (REFERENCE, "AIM", "mean input", "RegMean", "TIES")
    return [rule for rule in rules(lambdas) if rule.name in names]


def overtrained_rules(lambdas: tuple[float, ...]) -> list[Rule]:
    """Those that overtrained experts are merged with."""
    return [*few_rules(lambdas), WUDI_RULE]


def all_rules() -> list[Rule]:
    """Those of `make real-full`."""
    every = rules(
        ALL_LAMBDAS,
        densities=(0.1, 0.2, 0.5),
        omegas=OMEGAS,
        controls=("uniform", "permuted", "random"),
        regmean_lambdas=ALL_LAMBDAS,
    )
    options = [REGMEAN_FEW, *regmean_options(REGMEAN_RULE, ALL_LAMBDAS)]
    return [*every, *options, *other_rules(ALL_LAMBDAS, (0.2, 0.5), (0.3, 1.0, 3.0))]


TESTED = (WUDI_RULE.name, "WUDI, ridge", "WUDI, spectral", "AIM on TIES", "mean input on TIES")


def option_rules() -> list[Rule]:
    """Those of `make real-options`: what `make real` leaves out, on validation, RegMean's options with fewer tokens.

    The rules that came out better than the tuned lambda there are scored on test too.
    """
    known = [rule for rule in rules(LAMBDAS) if rule.name in (REFERENCE, REGMEAN_RULE.name)]
    others = [
        rule if rule.name in TESTED else replace(rule, control_of="", variant_of=REFERENCE)
        for rule in other_rules(LAMBDAS, (0.2,), (1.0,))
    ]
    return [*known, *others, REGMEAN_FEW, *regmean_options(REGMEAN_FEW)]


def regmean_options(of: Rule, lambdas: tuple[float, ...] = ()) -> list[Rule]:
    """RegMean with each of its options.

    Args:
        of: RegMean, with as many tokens as all of them read.
        lambdas: values to try of one that chooses its lambda; none without.
    """
    flags = {
        "lambda": "",
        "inputs of the merge (RegMean++)": "--inputs merged",
        "first token as any other": "--first_token_weight 1",
        "no first token": "--first_token_weight 0",
        "diagonal moments": "--moments diagonal",
        "gram_scale 0.9": "--gram_scale 0.9",
        "gram_scale 0.5": "--gram_scale 0.5",
        "base_weight 0.1": "--base_weight 0.1",
        "base_weight 1": "--base_weight 1",
        "ridge 0.01": "--ridge 0.01",
    }
    return [
        replace(
            of,
            name=f"{of.name}, {name}",
            flags=f"{of.flags} {more}".strip(),
            grid={"lambda": lambdas} if name == "lambda" else of.grid,
            variant_of=of.name,
        )
        for name, more in flags.items()
        if lambdas or name != "lambda"
    ]


def other_rules(lambdas: tuple[float, ...], densities: tuple[float, ...], ridges: tuple[float, ...]) -> list[Rule]:
    """AIM and the mean input on TIES, rules that know no text, LM-Cocktail, and prototypes with their controls.

    WUDI stands there with nothing but its defaults, and with what it does not solve for merged at lambda too.
    """
    line = {"lambda": lambdas}
    doubled = {"density": densities, "omega": (0.0,), "lambda": tuple(2 * value for value in lambdas)}
    both = "--lambda {lambda} --rest_lambda {lambda}"
    return [
        Rule("AIM on TIES", f"{TIES} {AIM}", doubled),
        Rule("mean input on TIES", f"{TIES} {MEAN}", doubled),
        Rule("Iso-C", f"--method iso_c {both}", line, on_device=True),
        WUDI_RULE,
        Rule("WUDI, ridge", f"--method wudi --ridge {{ridge}} {both}", {"ridge": ridges, **line}, on_device=True),
        Rule("WUDI, spectral", f"--method wudi --solver spectral {both}", line, on_device=True),
        Rule("LM-Cocktail", "--method linear --weights loss --model_data {all_texts}", on_device=True),
        Rule("ACM", "--lambda {lambda}", line, prototype="acm"),
        Rule("ACM, permuted control", "--lambda {lambda}", line, control_of="ACM", prototype="acm_permuted"),
        Rule("Sens-Merging", "--lambda {lambda}", line, prototype="sens"),
        Rule("Sens-Merging, permuted control", "--lambda {lambda}", line, control_of="Sens-Merging", prototype="sens_permuted"),
        Rule("1bit-Merging", "--lambda {lambda}", line, prototype="one_bit"),
        Rule("1bit-Merging, MLP alone", "--lambda {lambda}", line, prototype="one_bit_mlp"),
    ]  # fmt: skip
