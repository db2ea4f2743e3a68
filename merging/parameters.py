"""What a user can set: every parameter of every method, once. Importing this imports no torch, so that help texts list them.

A method's file says which of them it has (`weights: tuple[float, ...] = parameter("weight")`), its line in METHODS what
they are by default there. The flags of merge.py, the keys of recipe files and all refusals follow from this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting

SAME: Any = object()
"""In a recipe file, the default is the method's."""
REQUIRED: Any = object()
"""In a recipe file, there is no default."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        key: its name in recipe files, and the setting that messages mention.
        help: what it does, a clause for lists of settings; it may mention others.
        kind: number; whole: a whole number; switch: yes or no; rule: yes, no, or None for what the method itself does.
        per_model: one value for each model; a flag takes one for all too.
        low, high: the closed range of a number; above: an open lower bound.
        in_files: the default in a recipe file, where that is not the method's.
    """

    key: str
    help: str
    kind: Literal["number", "whole", "switch", "rule"] = "number"
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    in_files: Any = SAME

    @property
    def is_switch(self) -> bool:
        """Whether it takes yes and no."""
        return self.kind in ("switch", "rule")

    def check(self, value: Any, *, place: bool = True) -> None:
        """Raise ArgumentError where one value is outside the range, or of another kind; `place`: it names the key."""
        if value is None and self.kind == "rule":
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            fits = isinstance(value, bool) and self.is_switch
        else:
            fits = not self.is_switch and self.low <= value <= self.high and self.above < value < math.inf
            fits = fits and value > -math.inf and (self.kind != "whole" or value == int(value))
        if not fits:
            raise ArgumentError(f"{f'{self.key}: ' if place else ''}expected {self.expectation}, got {value}.")

    @property
    def expectation(self) -> str:
        """What a value must be, for messages."""
        if self.is_switch:
            return "true or false"
        noun = "whole number" if self.kind == "whole" else "number"
        if self.above > -math.inf:
            return f"a {noun} above {self.above:g}"
        if self.low > -math.inf and self.high == math.inf:
            return f"a finite {noun}, {self.low:g} or above"
        if self.low > -math.inf:
            return f"a {noun} in [{self.low:g}, {self.high:g}]"
        return f"a finite {noun}"


def _table(*parameters: Parameter) -> dict[str, Parameter]:
    return {parameter.key: parameter for parameter in parameters}


PARAMETERS = _table(
    Parameter("weight", "one number, or one for each model: 0.5,0.3,0.2", per_model=True),
    Parameter(
        "density",
        "share of each task vector that is kept, likewise; 0.5 is the setting of WIDEN's authors for the models of the AIM paper, the AIM authors' program passes none, which means 1.0: no trimming and no dropping",
        per_model=True,
        low=0.0,
        high=1.0,
        in_files=1.0,
    ),
    Parameter(
        "gamma",
        "share of each task vector's largest changes that is dropped, likewise",
        per_model=True,
        low=0.0,
        high=1.0,
    ),
    Parameter(
        "epsilon",
        "the probability of keeping a change grows from density - epsilon for the smallest of a row to density + epsilon for the largest, likewise",
        per_model=True,
        low=0.0,
        high=0.5,
    ),
    Parameter("lambda", "what the merged task vector is multiplied with"),
    Parameter("normalize", "divide by the sum of weights, of the agreeing models where signs are elected", "switch"),
    Parameter(
        "rescale",
        f"after trimming or dropping, give each task vector the l1 norm it had; {setting('rescale', 'false')} leaves it",
        "rule",
    ),
    Parameter("t", "where between the base (0) and the model (1)", in_files=REQUIRED),
    Parameter("nuslerp_flatten", "one angle for each tensor; without, one for each of its rows", "switch"),
    Parameter("nuslerp_row_wise", f"with {setting('nuslerp_flatten', 'false')}: one for each column", "switch"),
    Parameter("max_iter", "steps at most", "whole", low=0),
    Parameter("tol", "a step shorter than this is the last", low=0.0),
    Parameter("filter_wise", "one ratio for each row of a matrix instead of one for each tensor", "switch"),
    Parameter("select_topk", "share of the changed elements that is kept: those in which the models differ most", low=0.0, high=1.0),
    Parameter("scale", "what the weights are multiplied with", per_model=True),
    Parameter("widen_ratio", "ranks above this multiple of the mean count as important", low=0.0),
    Parameter("widen_calibration", "score of the important ones", low=0.0),
)  # fmt: skip
"""Recipe key -> parameter, in the order in which they are listed."""


def text_of(value: Any) -> str:
    """A value of a recipe as one line: `true`, `0.5`, `[0, 0.5, 1]`, `[mlp: 0.5, else 0]`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return (
            f"{value['filter']}: {text_of(value['value'])}" if "filter" in value else f"else {text_of(value['value'])}"
        )
    return f"{value:g}" if isinstance(value, int | float) else str(value)
