"""LoRA adapters: a base model's tensors with what an adapter adds to them, read by rows and never stored.

    W' = W + scaling * B A,   scaling = alpha / r, or alpha / sqrt(r) where it is rank-stabilised

`A` is `[r, in]`, `B` `[out, r]`; of an embedding `A` is `[r, tokens]`, `B` `[width, r]`, and the product is transposed, as it
is for a module that stores its weight `[in, out]`. Tensors that the adapter holds whole (`modules_to_save`, trained biases,
an embedding of another size) take the place of the base's. Everything is float32; nothing is rounded.

A tied head stays the base's where the embedding alone is adapted, and the other way round, as in peft's forward pass: the
adapted model has a head of its own then.

Source: arXiv:2106.09685; arXiv:2312.03732 (rank-stabilised); file format and meaning of the config: peft 0.21.
Deviation: peft rounds the product to the adapter's dtype and the sum to the base's; here whoever writes rounds once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from checkpoints.errors import InputError
from checkpoints.patterns import pattern
from checkpoints.problems import Problems
from checkpoints.reader import ADAPTER_CONFIG, Checkpoint, WeightFile, read_tensor
from checkpoints.sidecars import SideFiles, read_json
from checkpoints.source import READ_ELEMENTS, TensorInfo
from checkpoints.tensor_names import split_name
from checkpoints.tokenizer_files import set_tied, set_vocabulary_size
from checkpoints.weights import Weights

CACHED_PRODUCTS = 16
"""Tensors whose A and B are held: some for each of those that a run has at work."""

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.default)?(\.weight)?")
# Of what peft can do with a LoRA config, these change the weights otherwise than by the formula above.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on fused parameters",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "LoRA with a bias",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says.

    Attributes:
        base, revision: the model that it was trained on, as its author named it; None where it names none.
        label: of the adapter, for messages.
    """

    base: str | None
    revision: str | None
    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    transposed: bool
    saved_whole: tuple[str, ...] = ()
    """Ends of the names of modules that were trained as copies of their own (`modules_to_save`)."""
    keeps_ties: bool = False
    """Whether what it does to an embedding it does to the head that is tied to it (`ensure_weight_tying`)."""
    label: str = ""
    """How messages name it."""

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied with."""
        # The first pattern that fits the end of the module's name counts, as in peft.
        where = f"{self.label}: {ADAPTER_CONFIG}: alpha_pattern"
        fitting = (
            key for key in self.alpha_pattern if pattern(where, rf"\A(?:(.*\.)?({key})$)", InputError).found_in(module)
        )
        alpha = self.alpha_pattern[key] if (key := next(fitting, None)) is not None else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter_config(folder: Path, label: str) -> AdapterConfig:
    """Read adapter_config.json. Raises InputError: no adapter, or one of another kind than LoRA, which is named."""
    content = read_json(folder / ADAPTER_CONFIG, label)
    kind = content.get("peft_type")
    start = content.get("init_lora_weights")
    other = next((name for key, name in _OTHER_KINDS.items() if content.get(key)), None)
    if kind != "LORA":
        other = str(kind)
    elif other is None and start not in _PLAIN_STARTS:
        other = f"LoRA started with {start!r}, which changes the base's weights too"
    if other is not None:
        raise InputError(
            f"{label}: expected a plain LoRA adapter, got {other}. Merge it into its base with peft (merge_and_unload), and give that model."
        )
    try:
        return AdapterConfig(
            base=content.get("base_model_name_or_path") or None,
            revision=content.get("revision") or None,
            alpha=float(content["lora_alpha"]),
            alpha_pattern={str(key): float(value) for key, value in (content.get("alpha_pattern") or {}).items()},
            rank_stabilised=bool(content.get("use_rslora")),
            transposed=bool(content.get("fan_in_fan_out")),
            saved_whole=tuple(map(str, content.get("modules_to_save") or ())),
            keeps_ties=bool(content.get("ensure_weight_tying")),
            label=label,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{label}: {ADAPTER_CONFIG}: expected numbers as alphas, got others. Download it again."
        ) from None


@dataclass
class _Change:
    """What becomes of one tensor.

    Attributes:
        whole: the adapter's tensor in its place.
        factors: the names of A and B.
        embedding: whether they are an embedding's.
    """

    module: str
    whole: str | None = None
    factors: dict[str, str] = field(default_factory=dict)
    embedding: bool = False


@dataclass(frozen=True)
class _Product:
    """`scaling * B A` of one tensor `[rows, columns]`: its row i is `scaling * left[i] @ right`.

    Attributes:
        left: the name of the factor `[rows, r]`, or `[r, rows]` where `left_transposed`.
        right: `[r, columns]`, likewise.
    """

    left: str
    right: str
    left_transposed: bool
    right_transposed: bool
    scaling: float


@dataclass(frozen=True)
class Tie:
    """A head that a base does not store, as it is tied to the embedding.

    Attributes:
        head, embedding: their names.
    """

    head: str
    embedding: str


class AdaptedWeights:
    """A base's tensors with an adapter on top; a `Weights`.

    Args:
        base: what the adapter was trained on.
        adapter: its own file.
        label: how messages name both.
        config: see `read_adapter_config`.
        find: names that the base does not store, with shapes -> the base's tensors that become the same parameters.
        tie: asks for the head that the base ties to its embedding, and that, where it stores one of them; None where not.

    Raises: Refusals: tensors of the adapter that have no place in the base, or do not fit it.
    """

    def __init__(
        self,
        base: Weights,
        adapter: Checkpoint,
        label: str,
        config: AdapterConfig,
        find: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, str]],
        tie: Callable[[], Tie | None] = lambda: None,
    ):
        self.label = label
        self.folder = base.folder
        self.files: Sequence[WeightFile] = [*base.files, *adapter.files]
        self.modules = base.modules
        self._base, self._adapter = base, adapter
        self._resized: dict[int, int] = {}  # rows of a table of the base -> rows that the adapter gives it
        self._whole: dict[str, str] = {}
        self._products: dict[str, _Product] = {}
        infos = dict(base.tensors)
        problems = Problems()
        # What the adapter says of each tensor, and which tensor of the base that is.
        changes = _read_changes(adapter, problems)
        places = _find_places(changes, base, adapter, find)
        transposed = config.transposed or any(
            _only_turned(change, adapter, base.tensors[places.get(name, name)].shape)
            for name, change in changes.items()
            if places.get(name, name) in base.tensors
        )
        # Where one end of a tie is adapted, the head becomes a tensor of its own.
        self._head = _untied(changes, places, config, tie)
        if self._head is not None:
            infos[self._head.head] = base.tensors[self._head.embedding]
        # Whole tensors take the base's place; factors must fit what is there then.
        for name, change in changes.items():
            place = places.get(name, name)
            if config.keeps_ties and name not in base.tensors and _is_head_of(tie(), name):
                continue  # the same change as the embedding's
            if change.whole is not None:
                self._whole[place] = change.whole
                own, replaced = adapter.tensors[change.whole], base.tensors.get(place)
                infos[place] = TensorInfo(own.dtype, own.shape, replaced.plain_dtype if replaced else None)
                if replaced and replaced.shape[:1] != own.shape[:1]:
                    self._resized |= {replaced.shape[0]: own.shape[0]}
            if not change.factors:
                continue
            if place not in infos:
                problems.add(
                    f"{label}: adapts {name}, which {base.label} does not store. Give the base that it was trained on."
                )
                continue
            product = _fit(change, adapter, infos[place].shape, config, transposed)
            if product is None:
                shapes = ", ".join(str(list(adapter.tensors[key].shape)) for key in change.factors.values())
                problems.add(
                    f"{label}: {place}: expected factors for shape {list(infos[place].shape)}, got {shapes}. Give the base that it was trained on."
                )
                continue
            self._products[place] = product
            stored = infos[place]
            infos[place] = TensorInfo(torch.float32, stored.shape, stored.plain_dtype)
        problems.raise_if_any()
        self.tensors: Mapping[str, TensorInfo] = {name: infos[name] for name in sorted(infos)}
        self._factors = lru_cache(CACHED_PRODUCTS)(self._read_factors)

    @property
    def is_here(self) -> bool:
        """See `Weights`."""
        return self._base.is_here and self._adapter.is_here

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        product = self._products.get(name)
        if product is None:
            return self._read_plain(name, start, stop, buffer)
        out = buffer[: 4 * (stop - start)].view(torch.float32)
        out.copy_(self._read_plain(name, start, stop, torch.empty_like(buffer)))
        left, right = self._factors(product)
        columns = right.shape[1]
        # Rows are multiplied in tiles that do not depend on what is asked for, so that every read gives the same bits.
        tile = max(1, READ_ELEMENTS // columns)
        for first in range(start // columns // tile * tile, -(-stop // columns), tile):
            added = (left[first : first + tile] @ right).mul_(product.scaling).view(-1)
            low, high = max(start, first * columns), min(stop, first * columns + len(added))
            out[low - start : high - start] += added[low - first * columns : high - first * columns]
        return out

    def _read_plain(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        whole = self._whole.get(name)
        if whole is not None:
            return self._adapter.read(whole, start, stop, buffer)
        if self._head is not None and name == self._head.head:
            name = self._head.embedding
        return self._base.read(name, start, stop, buffer)

    def _read_factors(self, product: _Product) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, r]` and `[r, columns]`, float32."""
        left, right = (read_tensor(self._adapter, name).float() for name in (product.left, product.right))
        left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
        left = left.T.contiguous() if product.left_transposed else left
        return left, right.T.contiguous() if product.right_transposed else right

    def adjust(self, files: SideFiles) -> None:
        """See `Weights`."""
        self._base.adjust(files)
        for old, new in self._resized.items():
            set_vocabulary_size(files, old, new)
        if self._head is not None:
            set_tied(files, False)

    def check_unchanged(self) -> None:
        """See `Weights`."""
        self._base.check_unchanged()
        self._adapter.check_unchanged()

    def close(self) -> None:
        """See `Weights`."""
        self._base.close()
        self._adapter.close()


def _read_changes(adapter: Checkpoint, problems: Problems) -> dict[str, _Change]:
    """The base's tensor, by the adapter's name for it -> what the adapter does to it."""
    changes: dict[str, _Change] = {}
    for key in adapter.tensors:
        name = key.removeprefix(_PREFIX)
        match = _LORA_KEY.fullmatch(name)
        if match is not None:
            change = changes.setdefault(f"{match['module']}.weight", _Change(match["module"]))
            change.factors[match["factor"]] = key
            change.embedding = match["embedding"] is not None
        elif name == key or re.search(r"\.lora_|_adapter\.", name):
            problems.add(
                f"{adapter.label}: {key}: expected tensors of a plain LoRA adapter, got one of another kind. Merge it into its base with peft."
            )
        elif re.search(r"\.original_module\.[^.]+$", name) is None:  # which holds the base's, from before the training
            whole = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+$)", "", name)
            change = changes.setdefault(whole, _Change(whole.rpartition(".")[0]))
            if change.whole is None or whole != name:  # a table may be there twice, and the trained one counts
                change.whole = key
    for name, change in changes.items():
        if change.factors and change.factors.keys() != {"A", "B"}:
            problems.add(f"{adapter.label}: {name}: expected lora_A and lora_B, got one of them. Download it again.")
            change.factors = {}
    return changes


def _untied(
    changes: Mapping[str, _Change], places: Mapping[str, str], config: AdapterConfig, tie: Callable[[], Tie | None]
) -> Tie | None:
    """The tie that an adapter undoes, as it changes one end of it, or each in its own way; None where it undoes none."""
    if config.keeps_ties:
        return None
    own = {
        places.get(name, name)
        for name, change in changes.items()
        if change.factors or any(f".{change.module}".endswith(f".{saved}") for saved in config.saved_whole)
    }
    # Asking takes seconds: most adapters change layers alone.
    if not any(change.embedding or change.whole is not None or _is_outside(name) for name, change in changes.items()):
        return None
    ends = tie()
    return ends if ends is not None and own & {ends.head, ends.embedding} else None


def _is_outside(name: str) -> bool:
    """Whether a tensor is in no layer of a stack."""
    return split_name(name) is None


def _is_head_of(tie: Tie | None, name: str) -> bool:
    return tie is not None and tie.head == name


def _find_places(
    changes: Mapping[str, _Change],
    base: Weights,
    adapter: Checkpoint,
    find: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, str]],
) -> Mapping[str, str]:
    """The adapter's name for a tensor -> the base's, where that is another: modules may be called otherwise than on disk."""
    strangers: dict[str, tuple[int, ...]] = {}
    for name, change in changes.items():
        if name not in base.tensors:
            shapes = {factor: adapter.tensors[key].shape for factor, key in change.factors.items()}
            strangers[name] = adapter.tensors[change.whole].shape if change.whole else (shapes["B"][0], shapes["A"][-1])
    return find(strangers) if strangers else {}


def _only_turned(change: _Change, adapter: Checkpoint, shape: Sequence[int]) -> bool:
    """Whether a module's factors make its tensor `[in, out]` and not `[out, in]`: then square ones are stored so, too."""
    if change.embedding or not change.factors or len(shape) != 2:
        return False
    into, out = adapter.tensors[change.factors["A"]].shape[-1], adapter.tensors[change.factors["B"]].shape[0]
    return tuple(shape) == (into, out) != (out, into)


def _fit(
    change: _Change, adapter: Checkpoint, shape: Sequence[int], config: AdapterConfig, transposed: bool
) -> _Product | None:
    """How the factors make a tensor of this shape, `transposed` or not where it is square; None where they do not."""
    inner, outer = change.factors["A"], change.factors["B"]
    a, b = (adapter.tensors[key].shape for key in (inner, outer))
    rank = a[0]
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    if b[1:2] != (rank,) or math.prod(b[2:]) != 1:
        return None
    into, out = math.prod(a[1:]), b[0]
    scaling = config.scaling(change.module, rank)
    straight, turned = (rows, columns) == (out, into), (rows, columns) == (into, out)
    if turned and (change.embedding or transposed or not straight):
        return _Product(inner, outer, True, True, scaling)
    return _Product(outer, inner, False, False, scaling) if straight else None
