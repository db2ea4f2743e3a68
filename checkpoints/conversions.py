"""How stored tensors become a model's parameters: matched by name, renamed, fused, cut and transposed as transformers does it.

Names are matched by the code that transformers itself loads with, and what it fuses on loading is fused by its own
operations, on meta tensors.
Source: transformers 5.19, `core_model_loading.convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from checkpoints.module_kinds import classify
from checkpoints.placements import Placement, Shape


@dataclass
class Group:
    """Disk tensors that become one parameter, and the transformers converter that makes it of them, if one does."""

    parameter: str
    converter: Any
    sources: list[tuple[str, str | None]] = field(default_factory=list)  # (disk name, pattern that matched)


def match_names(model: Any, names: Iterable[str]) -> tuple[list[Group], dict[str, str]]:
    """Steps 1 and 2 of transformers' `convert_and_load_state_dict_in_model`: which disk tensors go where.

    Returns: the groups; and for each disk tensor that nothing takes, the name it was looked for under.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    groups: dict[str, Group] = {}
    strangers: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers stacks experts
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        taken = target in groups and None in (groups[target].converter, pattern)  # by another name for all of it
        if target not in state or taken:
            strangers[name] = target
        else:
            group = groups.setdefault(target, Group(target, by_pattern.get(pattern)))
            group.sources.append((name, pattern))
    return list(groups.values()), strangers


def place_group(
    group: Group, model: Any, state: Mapping[str, Shape], sources: Mapping[str, Shape]
) -> tuple[dict[str, Placement], str]:
    """Placements of a group's disk tensors, and what does not fit about their shapes ("" if all does).

    Args:
        state: name and shape of everything in the model.
        sources: name and shape of the group's disk tensors.
    """
    shape = state[group.parameter]
    kind, dim = classify(model, group.parameter)
    try:
        made = _convert(group, sources, shape, model.config)
        axes: tuple[int | None, ...] = tuple(range(len(shape)))
        if group.converter is not None:
            stored = len(next(iter(sources.values())))
            axes = tuple(
                None if len(shape) - axis > stored else source_dim(group, sources, shape, axis, model.config)
                for axis in range(len(shape))
            )
            dim = dim if dim is None else axes[dim]
            kind = "other" if dim is None and kind in ("linear", "conv1d", "experts", "norm") else kind
    except (RuntimeError, ValueError, IndexError) as error:  # such as experts of different shapes: they do not stack
        return dict.fromkeys(sources, Placement(group.parameter, "other")), f"{group.parameter}: {error}"
    complaint = "; ".join(
        f"{name} is {list(state.get(name, ()))} by config.json, and {list(got)} on disk"
        for name, got in made.items()
        if got != state.get(name)
    )
    stacked = len(shape) > len(next(iter(sources.values())))
    starts = {} if complaint else _starts(group, sources, shape, model.config)
    placements: dict[str, Placement] = {}
    count: dict[str | None, int] = {}
    for name, pattern in group.sources:
        if not stacked:
            others = tuple(other for other in made if other != group.parameter)
            placements[name] = Placement(group.parameter, kind, dim, None, others, starts.get(name), axes)
            continue
        # More tensors than a parameter has experts: transformers fills the converter's next target with the rest.
        target, expert = divmod(count.get(pattern, 0), shape[0])
        count[pattern] = count.get(pattern, 0) + 1
        parameter = [*made][min(target, len(made) - 1)]
        placements[name] = Placement(parameter, kind, dim, expert, (), starts.get(name), axes)
    return placements, complaint


def _convert(group: Group, sources: Mapping[str, Shape], shape: Shape, config: Any) -> dict[str, Shape]:
    """Shapes of what transformers makes of a group's tensors, by running its conversion on the meta device.

    Args:
        sources: name and shape of the group's disk tensors.
        shape: of the parameter, in the model; some conversions transpose what has another one.
    """
    if group.converter is None:
        return {group.parameter: next(iter(sources.values()))}
    empty = {name: torch.empty(size, device="meta") for name, size in sources.items()}
    return {name: tuple(tensor.shape) for name, tensor in _run_converter(group, empty, shape, config).items()}


def _run_converter(
    group: Group, tensors: Mapping[str, torch.Tensor], shape: Shape, config: Any
) -> dict[str, torch.Tensor]:
    """What transformers' converter makes of a group's tensors; `shape`: of the parameter, in the model."""
    converter = deepcopy(group.converter)
    for name, pattern in group.sources:
        converter.add_tensor(group.parameter, name, pattern, tensors[name])
    model = SimpleNamespace(get_parameter=lambda _: torch.empty(shape, device="meta"))
    made = converter.convert(group.parameter, model=model, config=config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class Conversion:
    """How stored tensors become a model's parameters and buffers, as transformers does it when it loads them.

    Args:
        model: with its parameters on the meta device.
        shapes: name and shape of every stored tensor.

    Attributes:
        targets: the parameter or buffer that each conversion is known by; it may make further ones.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape]):
        self._model = model
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        groups, _ = match_names(model, shapes)
        self._groups = {group.parameter: group for group in groups}
        self._made = {
            name: list(
                _convert(
                    group,
                    {source: tuple(shapes[source]) for source, _ in group.sources},
                    self._shapes[name],
                    model.config,
                )
            )
            for name, group in self._groups.items()
        }
        self.targets = tuple(self._groups)

    def made(self, target: str) -> list[str]:
        """Names of all that a conversion makes."""
        return self._made[target]

    def sources(self, target: str) -> list[str]:
        """Names of the stored tensors that a conversion takes."""
        return [name for name, _ in self._groups[target].sources]

    def plain_source(self, target: str) -> str | None:
        """The one stored tensor that is taken as it is; None where a conversion changes something."""
        group = self._groups[target]
        return group.sources[0][0] if group.converter is None else None

    def make(self, target: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the stored tensors become, by names of parameters and buffers."""
        group = self._groups[target]
        if group.converter is None:
            return {target: next(iter(tensors.values()))}
        return _run_converter(group, tensors, self._shapes[target], self._model.config)


def _starts(group: Group, sources: Mapping[str, Shape], shape: Shape, config: Any) -> dict[str, int]:
    """Where each of a group's disk tensors begins in its flattened parameter; nothing for one that is no run of it.

    Converts tensors that hold the numbers of their rows, one column wide, and looks where these come out.
    """
    if group.converter is None:
        return {name: 0 for name, source in sources.items() if source == shape}
    first = next(iter(sources.values()))
    if len(first) < 2 or any(source[-1] != shape[-1] for source in sources.values()):
        return {}
    converter = deepcopy(group.converter)
    begins: dict[str, int] = {}
    rows = 0
    for name, pattern in group.sources:
        begins[name], count = rows, math.prod(sources[name][:-1])
        numbers = torch.arange(rows, rows + count).view(*sources[name][:-1], 1)
        converter.add_tensor(group.parameter, name, pattern, numbers)
        rows += count
    model = SimpleNamespace(get_parameter=lambda _: torch.empty(*shape[:-1], 1, device="meta"))
    try:
        made = converter.convert(group.parameter, model=model, config=config)
    except (RuntimeError, ValueError, IndexError):  # an operation that looks at columns
        return {}
    if len(made) != 1:
        return {}
    tensor = next(iter(made.values()))
    order = (tensor[0] if isinstance(tensor, list) else tensor).flatten()
    if len(order) != rows:
        return {}
    position = torch.empty_like(order)
    position[order] = torch.arange(rows)
    starts = {}
    for name, begin in begins.items():
        count, at = math.prod(sources[name][:-1]), int(position[begin])
        if torch.equal(order[at : at + count], torch.arange(begin, begin + count)):
            starts[name] = at * shape[-1]
    return starts


def source_dim(group: Group, sources: Mapping[str, Shape], shape: Shape, dim: int, config: Any) -> int | None:
    """Which dimension of a group's disk tensors becomes dimension `dim` of its parameter, whole; None if none does.

    Doubles one dimension of the disk tensors after another and looks which of the parameter's doubles with it: sizes
    alone do not tell, as matrices may be square.
    """
    first = next(iter(sources.values()))
    for candidate in range(len(first)):
        grown = {name: (*s[:candidate], 2 * s[candidate], *s[candidate + 1 :]) for name, s in sources.items()}
        # Whether a conversion transposes is decided as for the true shapes.
        grown_shape = next(iter(grown.values())) if first == shape else shape
        made = _convert(group, grown, grown_shape, config)
        if made[group.parameter] == (*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]):
            sizes = {target[dim] for target in made.values()}
            whole = all(source[candidate] in sizes for source in grown.values())  # and not joined along this dimension
            return candidate if whole else None
    return None
