"""What holds each tensor of a checkpoint: the model's parameters, matched to the names on disk, without its weights.

The class named in config.json is built on torch's meta device, so nothing is allocated. Names are matched by the code
that transformers itself loads with, and what it fuses on loading is fused by its own operations, on meta tensors. So
there is no list of architectures here, and what a tensor is follows from the module that holds it, not from its name.

Fused experts: the experts of a layer are one module with three-dimensional parameters, `[experts, out, in]` or, where
the module says `is_transposed`, `[experts, in, out]`. On disk they may be fused alike (`Placement.expert` is None, one
tensor holds all experts) or be one tensor per expert (`expert` is its index). Statistics `[experts, in]` of the
parameter belong to the disk tensor as they are in the first case; in the second, row `expert` of them. Gate and up
weights, which are joined along the output dimension, have one input and so the same row.
Source: transformers 5.19, `core_model_loading.convert_and_load_state_dict_in_model`, `integrations/moe.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoints.errors import InputError, UnknownClass, first_line
from checkpoints.limits import limited_building
from checkpoints.placements import Architecture, Kind, Placement, Shape
from checkpoints.process import quick_start
from checkpoints.settings import setting
from checkpoints.sidecars import read_config

# Modules, and parameters, of a model for each tensor that is stored: there are about as many of the former, fewer of the latter.
PARTS_EACH = 10
PARTS_AT_LEAST = 1000


@quick_start()
def describe(
    folder: Path, shapes: Mapping[str, Shape], *, label: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """Say for every tensor of a checkpoint what holds it.

    Args:
        folder: the checkpoint. Only config.json is read, and the code beside it if trusted.
        shapes: name and shape of every tensor in its weight files.
        label: what to call the checkpoint in messages; the folder by default.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        InputError: as `build_meta_model`; names or shapes that transformers fails on. Other tensors that do not fit raise
            nothing: they are in `unplaced`, `missing` and `mismatched`.
    """
    import transformers  # before, as it loads libraries that claim much more than they use

    assert transformers.AutoConfig
    with limited_building(PARTS_EACH * len(shapes) + PARTS_AT_LEAST):
        model: Any = build_meta_model(folder, label=label, trust_remote_code=trust_remote_code)
    try:
        return _describe(model, shapes)
    except Exception as error:  # conversions of transformers fail in every way there is on names and shapes of no model
        raise InputError(
            f"{label or folder}: its tensors are not those of a {type(model).__name__}, which config.json names: "
            f"{type(error).__name__}: {first_line(error)}. Use matching files."
        ) from error


def _describe(model: Any, shapes: Mapping[str, Shape]) -> Architecture:
    """See `describe`."""
    from transformers.utils.loading_report import LoadStateDictInfo

    with _quiet():
        state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        computed = {name for name, _ in model.named_buffers(remove_duplicate=False)} - state.keys()
        # Place every disk tensor that some parameter is made of.
        groups, strangers = _match_names(model, shapes)
        buffers: set[str] = set()
        placements: dict[str, Placement] = {}
        mismatched: dict[str, str] = {}
        for group in groups:
            if group.parameter not in parameters:
                buffers |= {name for name, _ in group.sources}
                continue
            placed, complaint = _place(group, model, state, {name: tuple(shapes[name]) for name, _ in group.sources})
            placements |= placed
            mismatched |= dict.fromkeys(placed, complaint) if complaint else {}

        # Ties fill parameters too.
        disk_names = {placement.parameter: name for name, placement in placements.items()}
        filled = {name for placement in placements.values() for name in (placement.parameter, *placement.others)}
        tied, shared = _resolve_ties(model, placements, disk_names)
        filled |= shared
        # The class's own rules on what may be missing or left over; they look at names in the model.
        left = LoadStateDictInfo(parameters - filled, set(strangers.values()) - computed, set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(left)
        unplaced = {name for name, target in strangers.items() if target in left.unexpected_keys}
        return Architecture(
            model_class=type(model).__name__,
            placements=placements,
            tied=tied,
            input_embedding=_weight_of(model, model.get_input_embeddings, nn.Embedding, disk_names),
            output_head=_weight_of(model, model.get_output_embeddings, nn.Module, disk_names),
            buffers=tuple(sorted(buffers)),
            ignored=tuple(sorted(strangers.keys() - unplaced)),
            unplaced=tuple(sorted(unplaced)),
            missing=tuple(sorted(left.missing_keys)),
            mismatched=mismatched,
            decoder=_decoder_of(model),
        )


@quick_start()
def build_meta_model(folder: Path, *, label: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's model on the meta device: float32, no weights, nothing allocated. `type()` of it loads it.

    Its class is the config's first architecture where transformers has it, else what AutoModelForCausalLM, else what
    AutoModel makes of the config. Code from the checkpoint runs only if `trust_remote_code`.

    Raises:
        InputError: config.json is missing or broken, its model type is unknown, or no model can be built from it.
    """
    from transformers import initialization

    label = label or str(folder)
    raw = read_config(folder, label)
    code = raw.get("auto_map") or {}
    with _building(label):
        config = load_config(folder, label=label, trust_remote_code=trust_remote_code)
        build = _choose_class(config, raw.get("architectures"), code if trust_remote_code else {})
        safe_ops, no_weights = initialization.meta_device_safe_creation_ops(), initialization.no_init_weights()
        with torch.device("meta"), safe_ops, no_weights:
            # eager: the attention kernel that the config asks for need not be installed to look at names.
            return build(dtype=torch.float32, attn_implementation="eager").eval()


@quick_start()
def load_config(folder: Path, *, label: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config as transformers has it, what config.json leaves out filled in. Raises InputError as `build_meta_model`."""
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    label = label or str(folder)
    raw = read_config(folder, label)
    code = raw.get("auto_map") or {}
    model_type = str(raw.get("model_type") or "")
    # AutoConfig would guess a missing model_type from the name of the folder, so ask here.
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "AutoConfig" in code):
        advice = (
            f"pass {setting('trust_remote_code')} to run its own code, if you trust it"
            if code
            else "install a newer one"
        )
        raise UnknownClass(
            f"{label}: config.json: expected a model_type that transformers {__version__} knows, "
            f"got '{model_type}'. Mend it, or {advice}."
        )
    with _building(label):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextmanager
def _building(label: str) -> Iterator[None]:
    """Say in one message what transformers cannot make of a config: its validators and constructors raise anything."""
    from transformers import __version__

    with _quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{label}: config.json: expected what transformers {__version__} can build a model from, got "
                f"{type(error).__name__}: {first_line(error)}. Mend it, or install the version it was written for."
            ) from error


def _choose_class(config: Any, architectures: Any, code: Mapping[str, str]) -> Callable[..., nn.Module]:
    """What builds the model, given dtype and attn_implementation. `code`: auto class -> trusted class beside it."""
    import transformers

    architecture = architectures[0] if architectures else ""
    model_class: Any = getattr(transformers, architecture, None) if architecture else None
    if isinstance(config, getattr(model_class, "config_class", None) or ()):
        return lambda **options: model_class._from_config(config, **options)
    own = [auto for auto, path in code.items() if isinstance(path, str) and path.split(".")[-1] == architecture]
    for name in (*own, "AutoModelForCausalLM", "AutoModel"):
        auto = getattr(transformers, name)
        if name in code or type(config) in auto._model_mapping:
            return lambda **options: auto.from_config(config, trust_remote_code=bool(code), **options)
    raise ValueError(f"no model class for {type(config).__name__}")


@dataclass
class _Group:
    """Disk tensors that become one parameter, and the transformers converter that makes it of them, if one does."""

    parameter: str
    converter: Any
    sources: list[tuple[str, str | None]] = field(default_factory=list)  # (disk name, pattern that matched)


def _match_names(model: Any, names: Iterable[str]) -> tuple[list[_Group], dict[str, str]]:
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
    groups: dict[str, _Group] = {}
    strangers: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers stacks experts
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        taken = target in groups and None in (groups[target].converter, pattern)  # by another name for all of it
        if target not in state or taken:
            strangers[name] = target
        else:
            group = groups.setdefault(target, _Group(target, by_pattern.get(pattern)))
            group.sources.append((name, pattern))
    return list(groups.values()), strangers


def _place(
    group: _Group, model: Any, state: Mapping[str, Shape], sources: Mapping[str, Shape]
) -> tuple[dict[str, Placement], str]:
    """Placements of a group's disk tensors, and what does not fit about their shapes ("" if all does).

    Args:
        state: name and shape of everything in the model.
        sources: name and shape of the group's disk tensors.
    """
    shape = state[group.parameter]
    kind, dim = _classify(model, group.parameter)
    try:
        made = _convert(group, sources, shape, model.config)
        axes: tuple[int | None, ...] = tuple(range(len(shape)))
        if group.converter is not None:
            stored = len(next(iter(sources.values())))
            axes = tuple(
                None if len(shape) - axis > stored else _trace(group, sources, shape, axis, model.config)
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


def _convert(group: _Group, sources: Mapping[str, Shape], shape: Shape, config: Any) -> dict[str, Shape]:
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
    group: _Group, tensors: Mapping[str, torch.Tensor], shape: Shape, config: Any
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
        groups, _ = _match_names(model, shapes)
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


def _starts(group: _Group, sources: Mapping[str, Shape], shape: Shape, config: Any) -> dict[str, int]:
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


def _trace(group: _Group, sources: Mapping[str, Shape], shape: Shape, dim: int, config: Any) -> int | None:
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


def _classify(model: Any, parameter: str) -> tuple[Kind, int | None]:
    """What a parameter is, by the class of the module that holds it, and which of its dimensions is the input."""
    from transformers.pytorch_utils import Conv1D

    path, _, leaf = parameter.rpartition(".")
    module, n_dims = model.get_submodule(path), model.get_parameter(parameter).ndim
    is_own = not type(module).__module__.startswith("torch.nn.")
    is_leaf = next(module.children(), None) is None
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return "embedding", None
    if leaf == "weight" and isinstance(module, nn.Linear):
        return "linear", 1
    if leaf == "weight" and isinstance(module, Conv1D):
        return "conv1d", 0
    if n_dims > 2 and isinstance(module, nn.modules.conv._ConvNd):
        return "convolution", None
    # Set by transformers on every module of experts that its `ALL_EXPERTS_FUNCTIONS` can run.
    if n_dims == 3 and hasattr(module, "is_transposed"):
        return "experts", 1 if module.is_transposed else 2
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias", None
    # Of torch's own one-dimensional weights, batch and group norms and PReLU have their channels elsewhere.
    if n_dims == 1 and leaf == "weight" and is_leaf and (is_own or isinstance(module, nn.LayerNorm | nn.RMSNorm)):
        return "norm", 0
    if n_dims == 2 and is_own and (is_leaf or leaf == "weight") and _multiplies_input(module, leaf):
        return "linear", 1
    return "other", None


def _multiplies_input(module: nn.Module, leaf: str) -> bool:
    """Does this module, which is no nn.Linear, act as one? The routers of experts do. Tried out on the meta device.

    Args:
        module: on the meta device, in float32 (so that a cast to float32 is no copy).
        leaf: name of its parameter, `[out, in]`.
    """
    weight = module.get_parameter(leaf)
    tokens = torch.empty(2, weight.shape[1], device="meta")
    products = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args[1].shape == weight.shape:
                storages = [tensor.untyped_storage()._cdata for tensor in (*args[:2], tokens, weight)]
                products.append(storages[:2] == storages[2:])
            return func(*args, **(kwargs or {}))

    try:
        with Watch(), torch.no_grad():
            module(tokens)
    except Exception:  # it wants other inputs, or data; what it did before that still counts
        pass
    return any(products)


def _resolve_ties(
    model: Any, placements: dict[str, Placement], disk_names: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """`Architecture.tied`, and every parameter that is tied to a stored one.

    Changes `placements` where only the other side of an embedding is stored: that is the embedding then.
    """
    families: dict[str, list[str]] = {}  # first the one that the class names as the source
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        families.setdefault(source, [source]).append(name)
    tied: dict[str, str] = {}
    shared: set[str] = set()
    for family in families.values():
        stored = [name for name in family if name in disk_names]
        holder = (stored or family)[0]
        holder_on_disk = _disk_name(model, holder, disk_names)
        tied |= {_disk_name(model, name, disk_names): holder_on_disk for name in family if name != holder}
        if stored:
            shared |= set(family)
            if any(_classify(model, name)[0] == "embedding" for name in family if name not in stored):
                placements[holder_on_disk] = replace(placements[holder_on_disk], kind="embedding", input_dim=None)
    return tied, shared


def _disk_name(model: Any, parameter: str, disk_names: Mapping[str, str]) -> str:
    """The disk tensor that holds a parameter; if none does, the name that transformers would save it under."""
    from transformers.core_model_loading import revert_weight_conversion

    if parameter in disk_names:
        return disk_names[parameter]
    name: str = next(iter(revert_weight_conversion(model, {parameter: model.get_parameter_or_buffer(parameter)})))
    return name


def _weight_of(
    model: Any, get_module: Callable[[], Any], kind: type[nn.Module], disk_names: Mapping[str, str]
) -> str | None:
    """Disk name of the weight of a module that one of the model's own methods returns; None if it has no such."""
    try:
        module = get_module()
    except (NotImplementedError, AttributeError):  # how models without words to embed answer
        return None
    path = next((path for path, other in model.named_modules() if other is module), None)
    if path is None or not isinstance(module, kind) or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    return _disk_name(model, f"{path}.weight", disk_names)


def _decoder_of(model: Any) -> str:
    """See `Architecture.decoder`."""
    try:
        module = model.get_decoder()
    except (NotImplementedError, AttributeError):
        return ""
    return next((path for path, other in model.named_modules() if other is module), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from transformers: what matters of a checkpoint's fit is in what `describe` returns."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
