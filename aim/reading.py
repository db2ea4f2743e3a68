"""Read what is asked of AIM into typed values by setting, whether flags gave it, a recipe file, or both.

given = read_section({"omega": 0.4, "calibration": {"n_samples": 64}}, "recipe.yml")
request = make_request(given)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aim.calibrate import CalibrationOptions
from aim.calibration_text import CalibrationData
from aim.choices import DRAWN, Calibration, Relaxing
from aim.omegas import Omega, read_omega, read_omegas
from aim.request import AimRequest
from checkpoints.errors import ArgumentError, InputError, named_by, unknown
from checkpoints.problems import Problems
from checkpoints.settings import in_file, setting
from streaming.values import describe

RESULTS = (
    "base_fingerprint",
    "merged_fingerprint",
    "relaxed",
    "share_kept",
    "energy_kept",
    "along_mean",
    "kept",
    "mean_change",
)
"""What merge_recipe.json has in the section besides: it says what came of it, and is passed over there."""
RECORD = "base_fingerprint"
"""The one that every record has, and no recipe that somebody wrote."""
CALIBRATION = "calibration"
CALIBRATION_RESULTS = (
    "numerics",
    "texts",
    "too_long",
    "empty",
    "blocks",
    "dropped_tokens",
    "tokens",
    "difference",
    "threads",
    "attention",
    "passes",
    "mode",
    "transformers",
    "torch",
)
FLAGS_ONLY = ("save_activations", "figures")
"""Settings that belong to one run, and to no recipe."""
MACHINE = {"mode": "calibration.mode", "max_memory": "max_memory"}
"""The same, of how a machine calibrates, by their names in `CalibrationOptions`: they change no number."""
NO_KEYS = {*FLAGS_ONLY, *MACHINE.values()}


def _whole(name: str, content: Any) -> int:
    """A whole number, or the text of one."""
    if isinstance(content, str) and re.fullmatch(r"-?\d{1,18}", content):
        return int(content)
    if type(content) is not int:
        raise ArgumentError(f"{setting(name)}: expected a whole number, got {describe(content)}.")
    return content


def _number(name: str, content: Any) -> float:
    """A number, or the text of one."""
    try:
        return float(content) if not isinstance(content, bool) else float("nan")
    except (TypeError, ValueError):
        raise ArgumentError(f"{setting(name)}: expected a number, got {describe(content)}.") from None


def _size(name: str, content: Any) -> int:
    """A number of bytes, or the text of one with its unit."""
    match = re.fullmatch(r"(\d{1,15})(B|KB|MB|GB|TB)?", str(content).upper())
    if isinstance(content, bool) or match is None:
        raise ArgumentError(f"{setting(name)}: expected a size such as 500MB or 8GB, got {describe(content)}.")
    size: int = int(match[1]) * 1000 ** ("B", "KB", "MB", "GB", "TB").index(match[2] or "B")
    return size


def _text(name: str, content: Any) -> str:
    """Text; a number where a name could be one."""
    if isinstance(content, bool) or not isinstance(content, str | int | float):
        raise ArgumentError(f"{setting(name)}: expected text, got {describe(content)}.")
    return str(content)


def _path(name: str, content: Any) -> Path:
    """A file or folder, `~` expanded."""
    kind = "folder" if name == "figures" else "file"
    text = _text(name, content)
    if not text.strip():
        raise ArgumentError(f"{setting(name)}: expected a {kind}, got nothing. Name one.")
    return Path(text).expanduser()


READERS: dict[str, Callable[[str, Any], Any]] = {
    "omega": lambda name, content: read_omega(content),
    "omegas": lambda name, content: read_omegas(content),
    "protect": _text,
    "scaling": _text,
    "control": _text,
    "numerics": _text,
    "seed": _whole,
    "statistics": _path,
    "save_activations": _path,
    "figures": _path,
    "calibration.source": _text,
    "text_field": _text,
    "n_samples": _whole,
    "block_size": _whole,
    "calibration.seed": _whole,
    "batch_size": _whole,
    "calibration.dtype": _text,
    "calibration.tolerance": _number,
    "calibration.mode": _text,
    "max_memory": _size,
}
"""Setting -> what makes a value of what a file or a flag gives."""
CALIBRATION_KEYS = {
    "source": "calibration.source",
    "text_field": "text_field",
    "n_samples": "n_samples",
    "block_size": "block_size",
    "seed": "calibration.seed",
    "batch_size": "batch_size",
    "dtype": "calibration.dtype",
    "tolerance": "calibration.tolerance",
}
"""Key of a recipe's `aim.calibration` -> setting. The other settings are keys of `aim` itself."""


@dataclass(frozen=True)
class Given:
    """What was given of AIM's settings.

    Attributes:
        values: setting -> its value.
        places: setting -> where a file gives it, `recipe.yml: aim.omega`.
        problems: what was given and is no value of its kind; `make_request` refuses it, with everything else that is wrong.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[InputError, ...] = ()

    def as_section(self) -> dict[str, Any]:
        """The `aim:` section of a recipe that gives the same."""
        left_out = {*NO_KEYS, *CALIBRATION_KEYS.values()}
        if self.values.get("control") not in DRAWN:
            left_out.add("seed")
        section = {name: _as_json(value) for name, value in self.values.items() if name not in left_out}
        calibration = {key: self.values[name] for key, name in CALIBRATION_KEYS.items() if name in self.values}
        return {**section, CALIBRATION: calibration} if calibration else section


def _as_json(value: Any) -> Any:
    if isinstance(value, Omega):
        return value.as_json()
    if isinstance(value, tuple):
        return [omega.as_json() for omega in value]
    return str(value) if isinstance(value, Path) else value


def read_values(content: Mapping[str, Any]) -> Given:
    """Values of what flags or a program give, by setting; None means not given."""
    problems = Problems()
    values = {}
    for name, given in content.items():
        if given is not None:
            with problems.collect():
                values[name] = READERS[name](name, given)
    return Given(values, problems=tuple(problems))


def read_section(section: Mapping[str, Any], where: str) -> Given:
    """Read a recipe's `aim:` section, that of merge_recipe.json too.

    Args:
        where: the file, for messages.

    Returns: the values; unknown keys, and values of a wrong kind, are among its problems, each with its place in the file.
    """
    problems = Problems()
    content: dict[str, Any] = {}
    places: dict[str, str] = {}
    results, calibration_results = (RESULTS, CALIBRATION_RESULTS) if RECORD in section else ((), ())
    for key, value in section.items():
        if key in results or key == CALIBRATION or (key == "statistics" and isinstance(value, Mapping)):
            continue
        if key in READERS and key not in {*NO_KEYS, *CALIBRATION_KEYS.values()}:
            content[key], places[key] = value, f"{where}: aim.{key}"
        else:
            known = [name for name in READERS if name not in {*NO_KEYS, *CALIBRATION_KEYS.values()}]
            problems.add(ArgumentError(f"{where}: aim: {unknown('key', str(key), [*known, CALIBRATION])}"))
    calibration = section.get(CALIBRATION)
    if calibration is not None and not isinstance(calibration, Mapping):
        problems.add(
            ArgumentError(f"{where}: aim.{CALIBRATION}: expected keys such as source, got {describe(calibration)}.")
        )
    elif content.get("statistics") is None:  # a file of statistics says how they were taken, which is passed over
        for key, value in (calibration or {}).items():
            if key in calibration_results:
                continue
            if key in MACHINE:
                problems.add(
                    ArgumentError(
                        f"{where}: aim.{CALIBRATION}.{key}: belongs to a machine, and to no recipe. Use {setting(MACHINE[key])}."
                    )
                )
            elif key in CALIBRATION_KEYS:
                name = CALIBRATION_KEYS[key]
                content[name], places[name] = value, f"{where}: aim.{CALIBRATION}.{key}"
            else:
                problems.add(ArgumentError(f"{where}: aim.{CALIBRATION}: {unknown('key', str(key), CALIBRATION_KEYS)}"))
    places = {name: place for name, place in places.items() if content[name] is not None}
    given = read_values(content)
    problems.extend(problem.shown(in_file(places)) for problem in given.problems)
    return Given(given.values, places, tuple(problems))


def agree(file: Given, flags: Given, where: str) -> Given:
    """What a file and flags give together; settings to which they give different values are among the problems.

    Args:
        where: the file, for messages.
    """
    problems = Problems([*file.problems, *flags.problems])
    for name, value in flags.values.items():
        said = file.values.get(name, value)
        if said != value:
            said = ",".join(map(str, said)) if isinstance(said, tuple) else said
            problems.add(ArgumentError(f"{setting(name)}: {where} says {said} under aim. Leave one of the two out."))
    if not problems and not (file.values.keys() | flags.values.keys()) & {"omega", "omegas"}:
        problems.add(ArgumentError(f"{where}: aim: expected omega, got none. Add it, such as omega: 0.4."))
    places = {name: place for name, place in file.places.items() if name not in flags.values}
    return Given({**file.values, **flags.values}, places, tuple(problems))


def make_request(given: Given, device: torch.device | None = None) -> AimRequest:
    """The request of what was given, with defaults for the rest.

    Args:
        device: of calibration; None for what there is.

    Raises: Refusals: values that are out of range, or exclude each other.
    """
    problems, values = Problems(given.problems), given.values
    relaxing = Relaxing()
    statistics: Calibration | Path = Calibration()
    with named_by(given.places):
        with problems.collect():
            relaxing = _read_relaxing(values)
        with problems.collect():
            statistics = _read_statistics(values, device, relaxing)
        kept = {name: values.get(name) for name in FLAGS_ONLY}
        with problems.collect():
            request = AimRequest(relaxing, statistics, **kept, places=given.places)
        problems.raise_if_any()
    return request


def read_request(section: Mapping[str, Any], where: str = "aim") -> AimRequest:
    """The request of a recipe's `aim:` section, for a merge from Python: `merge(recipe, "OUT", aim=read_request(recipe.aim))`.

    Raises: Refusals: the section is wrong somewhere, or says nothing of omega.
    """
    return make_request(agree(read_section(section, where), Given(), where))


def _read_relaxing(values: Mapping[str, Any]) -> Relaxing:
    """What is relaxed how far."""
    problems = Problems()
    omegas: tuple[Omega, ...] = Relaxing().omegas
    if "omega" in values and "omegas" in values:
        problems.add(ArgumentError(f"{setting('omegas')}: excludes {setting('omega')}. Give one of the two."))
    elif "omegas" in values:
        omegas = values["omegas"]
    elif "omega" in values:
        omegas = (values["omega"],)
    chosen = {name: values[name] for name in ("protect", "scaling", "control", "seed", "numerics") if name in values}
    relaxing = Relaxing()
    with problems.collect():
        relaxing = Relaxing(omegas, **chosen, sweep="omegas" in values)
    problems.raise_if_any()
    return relaxing


def _read_statistics(values: Mapping[str, Any], device: torch.device | None, relaxing: Relaxing) -> Calibration | Path:
    """Where the statistics come from."""
    calibration = {key: values[name] for key, name in CALIBRATION_KEYS.items() if name in values}
    machine = {key: values[name] for key, name in MACHINE.items() if name in values}
    if "statistics" in values:
        for key in (*calibration, *machine):
            raise ArgumentError(
                f"{setting((CALIBRATION_KEYS | MACHINE)[key])}: {setting('statistics')} brings the statistics, nothing is calibrated. Leave one of the two out."
            )
        return Path(values["statistics"])
    options = {key: calibration.pop(key) for key in ("batch_size", "dtype", "tolerance") if key in calibration}
    return Calibration(
        CalibrationData(**calibration),
        CalibrationOptions(device=device, numerics=relaxing.numerics, **options, **machine),
    )
