"""What a search may choose: the entries of a recipe that are marked as free, each a name with a range or a list of choices.

    merge_method: {search: [ties, dare_ties]}
    parameters:
      lambda: {search: [0.2, 1.2]}                        # two numbers: a range
      density: {search: [0.1, 0.9], step: 0.1}            # on a grid, whose statistics are measured once
    aim: {omega: {search: [0, 1], default: 1}, protect: {search: [channels, mean]}}

Anything in a recipe can be free, whatever it means; which of a method's parameters count depends on the method that is chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints.errors import ArgumentError
from checkpoints.problems import Problems
from checkpoints.settings import setting
from merging.methods import get_method
from merging.parameters import REQUIRED
from streaming.values import describe

MARK = "search"
KEYS = (MARK, "step", "log", "default")
METHOD = "merge_method"
NOT_GIVEN: Any = object()
Path = tuple[str | int, ...]
Number = int | float
Suggest = Callable[[str, "Free"], Any]
"""Chooses a value: the name of a free entry under the method that is chosen, and the entry."""


@dataclass(frozen=True)
class Free:
    """One entry that is searched.

    Attributes:
        path: keys and positions that lead to it.
        choices: what it may be; empty where it is a range.
        low, high: a range.
        step: of a grid in it; None for any number.
        log: whether ratios count, not differences.
        default: what it is untuned, where the recipe says so.
    """

    path: Path
    choices: tuple[Any, ...] = ()
    low: Number = 0.0
    high: Number = 0.0
    step: Number | None = None
    log: bool = False
    default: Any = NOT_GIVEN

    @property
    def name(self) -> str:
        """How people know it: `parameters.lambda`, `models[0].parameters.weight`."""
        return place_of(self.path)

    @property
    def parameter(self) -> str | None:
        """The key of the parameter that it is, or is in; None of anything else."""
        return str(self.path[self.path.index("parameters") + 1]) if "parameters" in self.path else None

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return not self.choices and all(type(number) is int for number in (self.low, self.high, self.step or 1))

    def nearest(self, value: Any) -> Any:
        """The value in the space that is nearest to one: where a search begins."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        inside = min(max(value, self.low), self.high)
        if self.step is None:
            return inside
        on_grid = self.low + round((inside - self.low) / self.step) * self.step
        return on_grid if self.is_whole else round(on_grid, 12)

    def as_text(self) -> str:
        """The range or the choices, for people."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        words = [f"{self.low:g} to {self.high:g}"]
        words += [f"in steps of {self.step:g}"] if self.step is not None else []
        words += ["by ratio"] if self.log else []
        return " ".join(words)


def place_of(path: Path) -> str:
    """`models[0].parameters.weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class Space:
    """A recipe with free entries.

    Args:
        tree: the recipe as a file has it, with `{search: ...}` in places.
        where: the file, for messages.

    Attributes:
        free: the entries, in the order of the recipe.

    Raises: Refusals: marks that are wrong; nothing is free; a method that is not known.
    """

    def __init__(self, tree: Mapping[str, Any], where: str):
        self.tree, self.where = tree, where
        problems = Problems()
        self.free = tuple(_find(tree, (), where, problems))
        if not problems and not self.free:
            problems.add(
                ArgumentError(
                    f"{where}: expected something to search, got none. Mark entries as free, such as lambda: {{search: [0.2, 1.2]}}."
                )
            )
        for method in self.methods:
            with problems.collect():
                if not isinstance(method, str):
                    raise ArgumentError(f"{where}: {METHOD}: expected the name of a method, got {describe(method)}.")
                once = get_method(method).prepared_with
                for free in self.free:
                    if free.parameter in once:
                        raise ArgumentError(
                            f"{where}: {free.name}: {method} runs the models once for all candidates, and this decides how. Give it one value."
                        )
        problems.raise_if_any()

    @property
    def methods(self) -> tuple[Any, ...]:
        """What the method may be."""
        chosen = next((free.choices for free in self.free if free.path == (METHOD,)), None)
        return chosen if chosen is not None else (self.tree.get(METHOD),)

    def counts(self, free: Free, method: str) -> bool:
        """Whether an entry means something to a method."""
        if len(free.path) < 2 or free.path[-2] != "parameters":
            return free.path != (METHOD,)
        return free.path[-1] in get_method(method).parameters()

    def choose(self, suggest: Suggest) -> dict[str, Any]:
        """A recipe without free entries; those that the method has no use for are left out.

        Args:
            suggest: chooses each value; a name begins with the method where that is free, as its best values are its own.
        """
        chooses = next((free for free in self.free if free.path == (METHOD,)), None)
        method: str = self.tree[METHOD] if chooses is None else suggest(chooses.name, chooses)
        chosen: dict[Path, Any] = {(METHOD,): method}
        for free in self.free:
            if self.counts(free, method):
                chosen[free.path] = suggest(self.name_under(free, method), free)
        return self._fill(chosen)

    def name_under(self, free: Free, method: str) -> str:
        """What an entry is called under a method."""
        own = len(free.path) > 1 and free.path[-2] == "parameters" and len(self.methods) > 1
        return f"{method}: {free.name}" if own else free.name

    def default_of(self, free: Free, method: str) -> Any:
        """What an entry is untuned: as the recipe says, else the method's default; NOT_GIVEN where neither says anything."""
        if free.default is not NOT_GIVEN:
            return free.default
        if len(free.path) > 1 and free.path[-2] == "parameters":
            parameter, _ = get_method(method).parameters()[str(free.path[-1])]
            for value in (parameter.default, parameter.default_in_files):
                if value is not REQUIRED and value is not None:
                    return value
        return NOT_GIVEN

    def defaults(self, method: str) -> dict[str, Any]:
        """Names -> values of the untuned recipe of a method, each the nearest in the space: where a search begins."""
        values: dict[str, Any] = {}
        for free in self.free:
            if free.path == (METHOD,):
                values[free.name] = method
            elif self.counts(free, method):
                value = self.default_of(free, method)
                middle = free.choices[0] if free.choices else (free.low + free.high) / 2
                values[self.name_under(free, method)] = free.nearest(middle if value is NOT_GIVEN else value)
        return values

    def untuned(self, method: str) -> dict[str, Any]:
        """The recipe that somebody writes who tunes nothing: every free entry at its default, or in the middle where it has none;
        without AIM, unless the recipe gives a default for it."""
        chosen: dict[Path, Any] = {(METHOD,): method}
        for free in self.free:
            if free.path == (METHOD,) or not self.counts(free, method):
                continue
            value = self.default_of(free, method)
            middle = free.choices[0] if free.choices else free.nearest((free.low + free.high) / 2)
            chosen[free.path] = middle if value is NOT_GIVEN else value
        tree = self._fill(chosen)
        tuned_aim = [free for free in self.free if free.path[0] == "aim"]
        if tuned_aim and all(free.default is NOT_GIVEN for free in tuned_aim):
            del tree["aim"]
        return tree

    def widest(self, method: str, prefer: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe of a method that wants everything that any candidate of it wants: every tensor, and of free parameters the values to prefer.

        Args:
            prefer: key of a parameter -> its value where it is free.
        """
        values = self.defaults(method)

        def suggest(name: str, free: Free) -> Any:
            if free.path[-1] in ("exclude", "only"):
                return NOT_GIVEN
            return prefer.get(free.parameter or "", values[name])

        return self.choose(suggest)

    def _fill(self, chosen: Mapping[Path, Any]) -> dict[str, Any]:
        marked = {free.path for free in self.free}

        def fill(node: Any, path: Path) -> Any:
            if path in marked:
                return chosen.get(path, NOT_GIVEN)
            if isinstance(node, Mapping):
                filled = {key: fill(value, (*path, key)) for key, value in node.items()}
                return {key: value for key, value in filled.items() if value is not NOT_GIVEN}
            if isinstance(node, list):
                return [fill(value, (*path, at)) for at, value in enumerate(node)]
            return node

        tree: dict[str, Any] = fill(self.tree, ())
        return tree

    def as_json(self) -> dict[str, Any]:
        """What decides a search's candidates."""
        return {"recipe": dict(self.tree)}

    def as_text(self) -> list[str]:
        """A line for each free entry."""
        width = max(len(free.name) for free in self.free)
        return [f"  {free.name.ljust(width)}  {free.as_text()}" for free in self.free]


def _find(node: Any, path: Path, where: str, problems: Problems) -> Iterator[Free]:
    if isinstance(node, Mapping) and MARK in node:
        with problems.collect():
            yield _read(node, path, f"{where}: {place_of(path)}")
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _find(value, (*path, str(key)), where, problems)
    elif isinstance(node, list):
        for at, value in enumerate(node):
            yield from _find(value, (*path, at), where, problems)


def _read(node: Mapping[str, Any], path: Path, where: str) -> Free:
    """One mark. Raises InputError where it is none."""
    stranger = next((key for key in node if key not in KEYS), None)
    if stranger is not None:
        raise ArgumentError(f"{where}: expected the keys {', '.join(KEYS)}, got {stranger}. Leave it out.")
    content, step, log = node[MARK], node.get("step"), node.get("log", False)
    default = node.get("default", NOT_GIVEN)
    if not isinstance(content, list) or len(content) < 2:
        raise ArgumentError(
            f"{where}: {MARK}: expected [LOW, HIGH] or a list of choices, got {describe(content)}. Give two or more."
        )
    is_range = len(content) == 2 and all(isinstance(one, Number) and not isinstance(one, bool) for one in content)
    if not is_range:
        if step is not None or log:
            raise ArgumentError(f"{where}: step and log belong to a range of two numbers. Leave them out.")
        if not all(isinstance(one, str | int | float | bool) for one in content):
            raise ArgumentError(f"{where}: {MARK}: expected numbers or words, got {describe(content)}.")
        return Free(path, tuple(content), default=default)
    low, high = content
    if not low < high:
        raise ArgumentError(
            f"{where}: {MARK}: expected the smaller number first, got {low} and {high}. Turn them round."
        )
    if step is not None and (isinstance(step, bool) or not isinstance(step, Number) or not 0 < step <= high - low):
        raise ArgumentError(f"{where}: step: expected a number above 0 and within the range, got {describe(step)}.")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise ArgumentError(f"{where}: log: expected true with a range above 0 and no step, or false, got {log}.")
    if default is not NOT_GIVEN and (isinstance(default, bool) or not isinstance(default, Number)):
        raise ArgumentError(f"{where}: default: expected a number, got {describe(default)}.")
    if type(low) is not type(high):
        low, high = float(low), float(high)
    if step is None and type(low) is int and path[-1] not in _WHOLE:
        low, high = float(low), float(high)  # `[0, 1]` means every number between
    return Free(path, (), low, high, step, log, default)


_WHOLE = ("seed", "n_samples", "block_size")
"""Keys whose values are whole numbers."""


def space_from_methods(
    methods: list[str],
    base: str,
    models: list[str],
    *,
    calibration: str | None,
    statistics: str | None = None,
    data: Sequence[str] = (),
) -> dict[str, Any]:
    """The recipe that the flags search: method, weights, lambda and density, what regmean has of its own, and where a text for
    calibration is given, AIM.

    Args:
        data: files of text of each model's own task.

    Raises: InputError: a method that is not known; another number of files than of models.
    """
    if data and len(data) != len(models):
        raise ArgumentError(
            f"{setting('model_data')}: expected a file for each of {len(models)} models, got {len(data)}. Give one for each, in their order."
        )
    keys = {key for method in methods for key in get_method(method).parameters()}
    weight = {"weight": {MARK: [0.2, 1.0]}} if "weight" in keys else {}
    shared: dict[str, Any] = {"lambda": {MARK: [0.2, 1.4]}} if "lambda" in keys else {}
    if "density" in keys:
        shared["density"] = {MARK: [0.1, 1.0], "step": 0.1}
    if "ridge" in keys:
        shared["ridge"] = {MARK: [1e-4, 1e-3, 1e-2, 1e-1]}  # a grid, whose solutions are kept
    if "rest_lambda" in keys:
        shared["rest_lambda"] = {MARK: [0.2, 1.4]}
    tree: dict[str, Any] = {
        METHOD: {MARK: methods} if len(methods) > 1 else methods[0],
        "base_model": base,
        "models": [
            {"model": name, **({"parameters": dict(weight)} if weight else {}), **({"data": text} if text else {})}
            for name, text in itertools.zip_longest(models, data)
        ],
        "parameters": shared,
        "tokenizer_source": "base",
    }
    if calibration is not None or statistics is not None:
        tree["aim"] = {"omega": {MARK: [0.0, 1.0]}, "protect": {MARK: ["channels", "mean"]}}
        tree["aim"] |= {"calibration": {"source": calibration}} if statistics is None else {"statistics": statistics}
    return tree
