"""What a user can set of a method: its parameters, each declared in the method's own class.

A class declares a parameter by a field, with its own default, range and help:

    t: float = parameter("t", "how near is near", default=REQUIRED, above=0.0)
    weights: tuple[float, ...] = shared("weight")

Two methods may use one key for different things. The flags of merge.py, the keys of recipe files, all refusals and the
tables of the docs follow from these declarations. Importing this imports no torch, so that `--help` can list them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting

SAME: Any = object()
"""In a recipe file, the default is the method's."""
REQUIRED: Any = object()
"""There is no default: a user has to say it."""
LARGEST = 1e18
"""Of any number: products of two are far from the largest float32."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of one method.

    Attributes:
        key: its name in recipe files, and the setting that messages mention.
        help: what it does, a clause for lists of settings, with its unit where it has one; it may mention other settings.
        default: its value where nothing is given; REQUIRED where something must be; None for the own rule of a `rule`.
        kind: number; whole: a whole number; switch: yes or no; rule: yes, no, or None for what the method itself does; word: one of `words`.
        per_model: one value for each model; a flag takes one for all too.
        low, high: the closed range of a number.
        above: an open lower bound.
        in_files: the default in a recipe file, where that is not the method's.
        words: what a word can be.
        common: the short help of merge.py shows it, whatever the method is.

    Raises: ValueError: the default is outside of the range.
    """

    key: str
    help: str
    default: Any
    kind: Literal["number", "whole", "switch", "rule", "word"] = "number"
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    in_files: Any = SAME
    words: tuple[str, ...] = ()
    common: bool = False

    def __post_init__(self) -> None:
        try:
            for value in (self.default, self.default_in_files):
                if value is not REQUIRED:
                    self.check(value)
        except ArgumentError as error:
            raise ValueError(f"the default of {error}") from error

    @property
    def default_in_files(self) -> Any:
        """Its default in a recipe file; REQUIRED where there is none."""
        return self.default if self.in_files is SAME else self.in_files

    @property
    def is_switch(self) -> bool:
        """Whether it takes yes and no."""
        return self.kind in ("switch", "rule")

    def check(self, value: Any, *, place: bool = True) -> None:
        """Raise ArgumentError where one value is outside the range, or of another kind; `place`: it names the key."""
        if value is None and self.kind == "rule":
            return
        if self.kind == "word":
            fits = value in self.words
        elif isinstance(value, bool) or not isinstance(value, int | float):
            fits = isinstance(value, bool) and self.is_switch
        else:
            fits = not self.is_switch and self.low <= value <= self.high and self.above < value
            fits = fits and abs(value) <= LARGEST and (self.kind != "whole" or value == int(value))
        if not fits:
            large = isinstance(value, int | float) and LARGEST < abs(value) < math.inf
            expected = f"{self.expectation} of at most {LARGEST:g} in size" if large else self.expectation
            raise ArgumentError(f"{f'{self.key}: ' if place else ''}expected {expected}, got {value}.")

    @property
    def expectation(self) -> str:
        """What a value must be, for messages."""
        if self.is_switch:
            return "true or false"
        if self.kind == "word":
            return " or ".join(self.words)
        noun = "whole number" if self.kind == "whole" else "number"
        if self.above > -math.inf:
            return f"a {noun} above {self.above:g}"
        if self.low > -math.inf and self.high == math.inf:
            return f"a finite {noun}, {self.low:g} or above"
        if self.low > -math.inf:
            return f"a {noun} in [{self.low:g}, {self.high:g}]"
        return f"a finite {noun}"


def parameter(
    key: str,
    help: str,
    *,
    default: Any,
    kind: Literal["number", "whole", "switch", "rule", "word"] = "number",
    per_model: bool = False,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    in_files: Any = SAME,
    words: tuple[str, ...] = (),
) -> Any:
    """Declare a parameter: a field of a method's class, which holds a tuple where each model has its own value.

    Only names of this module may stand among the arguments: `--help` reads them without importing the method.

    Args: see `Parameter`.
    """
    return _field(Parameter(key, help, default, kind, per_model, low, high, above, in_files, words))


def shared(key: str, *, default: Any = SAME) -> Any:
    """Declare one of the parameters that mean the same in every method that has them (SHARED), with another default if given."""
    parameter = SHARED[key]
    return _field(parameter if default is SAME else dataclasses.replace(parameter, default=default))


def _field(parameter: Parameter) -> Any:
    metadata = {"parameter": parameter}
    if parameter.kind == "rule":
        return dataclasses.field(default=None, kw_only=True, metadata=metadata)
    return dataclasses.field(metadata=metadata)


SHARED = {
    parameter.key: parameter
    for parameter in (
        Parameter("weight", "one number, or one for each model: 0.5,0.3,0.2", 1.0, per_model=True, common=True),
        Parameter(
            "density",
            "share of each task vector that is kept, likewise; 0.5 is the setting of WIDEN's authors for the models of the AIM paper, the AIM authors' program passes none, which means 1.0: no trimming and no dropping",
            0.5,
            per_model=True,
            low=0.0,
            high=1.0,
            in_files=1.0,
            common=True,
        ),
        Parameter("lambda", "what the merged task vector is multiplied with", 1.0, common=True),
        Parameter(
            "normalize", "divide by the sum of weights, of the agreeing models where signs are elected", False, "switch"
        ),
        Parameter(
            "rescale",
            f"after trimming or dropping, give each task vector the l1 norm it had; {setting('rescale', 'false')} leaves it",
            None,
            "rule",
        ),
    )
}
"""Recipe key -> parameters that mean the same wherever they occur, in the order of `--help`."""


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
