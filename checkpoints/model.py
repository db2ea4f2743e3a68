"""A model as an input: its folder, its open weights, and what config and tokenizer say, read when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints.architecture_cache import remembered
from checkpoints.errors import InputError, UnknownClass
from checkpoints.location import Location, ModelName, locate, parse_model, parse_name, remote_headers
from checkpoints.pieces import Piece, find_pieces, text_placements
from checkpoints.problems import Problems
from checkpoints.reader import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    WEIGHT_FILES,
    Checkpoint,
    RemoteFile,
    WeightFile,
    is_adapter,
    open_checkpoint,
    open_tensor_file,
)
from checkpoints.side_names import TOKENIZER_FILES
from checkpoints.sidecars import SideFiles, licence_of, read_config
from checkpoints.source import FLOAT8, holds_mxfp4
from checkpoints.vocabulary import Vocabulary, read_vocabulary, vocabulary_digest
from checkpoints.weights import Weights

if TYPE_CHECKING:
    from checkpoints.adapters import AdapterConfig, Tie
    from checkpoints.placements import Architecture

Planned = TypeVar("Planned")


@dataclass
class Model:
    """One input of a command.

    Attributes:
        location: where its files are, for an adapter those of its base.
        weights: its tensors.
        trust_remote_code: whether its own Python files may run.
        name: as the user gave it, where that is not the location's.
        adapters: what is on top of the base.
        made_of: the models that it is merged from as it is read.
        notes: what a user should know of how it is made.
        described: what merge_recipe.json says of it as an input, given how much of its files is digested, and with which hash; None for what files say.
    """

    location: Location
    weights: Weights
    trust_remote_code: bool = False
    name: ModelName | None = None
    adapters: tuple[tuple[Location, Checkpoint], ...] = ()
    made_of: tuple[Model, ...] = ()
    notes: tuple[str, ...] = ()
    described: Callable[[Any, Any], dict[str, Any]] | None = None

    @property
    def label(self) -> str:
        """How messages name it: as the user wrote it."""
        return str(self.name or self.location.name)

    @property
    def folder(self) -> Path:
        """Where its config and what belongs to it lie."""
        return self.location.folder

    @property
    def parts(self) -> list[tuple[Location, Sequence[WeightFile]]]:
        """Every folder that it comes from, and the weight files there."""
        on_top = [(location, checkpoint.files) for location, checkpoint in self.adapters]
        theirs = {id(file) for _, files in on_top for file in files}
        return [(self.location, [file for file in self.weights.files if id(file) not in theirs]), *on_top]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that it comes from."""
        return tuple(location.folder for location, _ in self.parts)

    @property
    def origins(self) -> list[Model]:
        """The models whose files are read: itself, or those that it is merged from."""
        return [origin for model in self.made_of for origin in model.origins] or [self]

    @property
    def is_file(self) -> bool:
        """Whether it is a file of tensors by itself: without config, tokenizer or a class that is known."""
        return self.location.name.is_tensor_file

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies: of an adapter that brings one, with the adapter."""
        return next((folder for folder in reversed(self.folders) if vocabulary_digest(folder)), self.folder)

    def side_files(self) -> SideFiles:
        """Its files that are no weights."""
        files = SideFiles(self.folder, self.label)
        if self.tokenizer_folder != self.folder:
            files.take(self.tokenizer_folder, TOKENIZER_FILES)
        self.weights.adjust(files)
        return files

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty for a file by itself. Raises InputError where it is missing or damaged."""
        return {} if self.is_file else read_config(self.folder, self.label)

    @cached_property
    def quantisation(self) -> str | None:
        """How its weights are quantised, by config.json; None where they are not, or are read as plain numbers."""
        stated = self.side_files().read_json("config.json").get("quantization_config")
        if not stated:
            return None
        return str(stated.get("quant_method", "an unnamed method") if isinstance(stated, dict) else stated)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer's tokens; None without a tokenizer."""
        return read_vocabulary(self.tokenizer_folder, self.label, trust_remote_code=self.trust_remote_code)

    @cached_property
    def vocabulary_digest(self) -> str | None:
        """Equal where the token files are equal."""
        return vocabulary_digest(self.tokenizer_folder)

    @cached_property
    def architecture(self) -> Architecture:
        """What holds each tensor; builds the model class without its weights, which takes seconds the first time.

        Raises: UnknownClass: a file by itself, or a class that transformers does not know; InputError: config.json is damaged.
        """
        if self.is_file:
            raise UnknownClass(
                f"{self.label}: expected a folder with config.json, got a file of tensors, of which nothing says how its model computes. Give the "
                "folder of the model, or merge by names alone: without AIM, methods that run models, slices, and settings of head or vocabulary."
            )
        shapes = {name: info.shape for name, info in self.weights.tensors.items()}
        config = self.folder / "config.json"
        if self.trust_remote_code or not config.is_file():
            return self._describe(shapes)
        return remembered(config.read_bytes(), shapes, lambda: self._describe(shapes))

    @cached_property
    def known_architecture(self) -> Architecture:
        """`architecture`; of a class that transformers does not know one of which nothing is known: arithmetic needs none."""
        try:
            return self.architecture
        except UnknownClass:
            from checkpoints.placements import Architecture

            return Architecture("", {}, {}, None, None, (), (), tuple(self.weights.tensors), (), {})

    def _describe(self, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        """What would hold tensors of these names and shapes in this model's class."""
        from checkpoints.architecture import describe

        return describe(self.folder, shapes, label=self.label, trust_remote_code=self.trust_remote_code)

    def find_same(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Where tensors of other names belong: name -> this model's tensor that becomes the same parameter.

        Args:
            shapes: name -> shape of tensors that would be loaded into this model's class.

        Returns: nothing for a name that has no place, or where transformers does not know the class.
        """
        pieces_of = self.find_pieces(shapes)
        return {pieces[0].name: name for name, pieces in pieces_of.items() if len(pieces) == 1 and pieces[0].is_whole}

    def find_pieces(self, shapes: Mapping[str, tuple[int, ...]], other: Model | None = None) -> dict[str, list[Piece]]:
        """What this model's tensors consist of, in the files of another: found by the parameters that both become.

        Both are looked up in this model's class. What has no place there, as the text part of a model that reads images
        too has not, is looked up in the other model's own class, whose decoder stands for this one's.

        Args:
            shapes: name -> shape of the other model's tensors.
            other: that model, to look in its class; None to look in this one's alone.

        Returns: this model's tensor -> its elements, in order; nothing for one that is not there whole, or where transformers
            does not know the class.
        """
        ours = {name: info.shape for name, info in self.weights.tensors.items()}
        try:
            mine = self.architecture
            pieces_of = find_pieces(mine.placements, ours, self._describe(shapes).placements, shapes)
        except InputError:
            return {}
        if other is not None and len(pieces_of) < len(mine.placements):
            with suppress(InputError):
                pieces_of = (
                    find_pieces(mine.placements, ours, text_placements(other.architecture, mine), shapes) | pieces_of
                )
        return pieces_of

    @cached_property
    def licence(self) -> str | None:
        """The licence its model card names, or those of all its parts where they name the same; else None."""
        cards = [folder for folder in self.folders if (folder / "README.md").is_file()]
        licences = {licence_of(folder) for folder in cards}
        return licences.pop() if len(licences) == 1 else None


class QuantisedBase(InputError):
    """An adapter on a base whose weights are quantised.

    Args:
        adapter: how messages name the adapter.
        base: what it was trained on.
        written: what to write before the adapter.
    """

    def __init__(self, adapter: str, base: Model, written: str = "BASE"):
        super().__init__(
            f"{adapter}: its base {base.label} is quantised ({base.quantisation}), which cannot be merged. Put the adapter on the unquantised "
            f"model: write {written}+{adapter}."
        )
        self._adapter, self._base = adapter, base

    def with_base(self, base: Model) -> QuantisedBase:
        """This error with a model to write before the adapter, where that is of its base's size and not quantised."""
        keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        fits = base.quantisation is None and all(base.config.get(key) == self._base.config.get(key) for key in keys)
        return QuantisedBase(self._adapter, self._base, base.label) if fits else self


def open_and_plan(
    names: Sequence[ModelName],
    plan: Callable[[list[Model]], Planned],
    *,
    check: Callable[[Model], object] | None = None,
    download: bool = True,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Planned:
    """Open models and plan with them: from the headers of hub models first, so that what does not fit is said before
    gigabytes are fetched, then, where weights were left on the hub, once more with everything here.

    Args:
        names: the inputs, the base first.
        plan: makes of the opened models what is wanted, and raises what does not fit.
        check: looks at the base, and raises what else does not fit.
        download: False stops at the headers (a dry run).

    Raises: Refusals: as `open_models`, and whatever `plan` and `check` raise; the models are closed then.
    """
    for weights in (False, True):
        opened = open_models(names, weights=weights, quiet=quiet, trust_remote_code=trust_remote_code)
        try:
            planned = _plan_and_check(opened, plan, check)
        except BaseException:
            close_all(opened)
            raise
        if not download or all(model.weights.is_here for model in opened):
            break
        close_all(opened)
    return planned


def _plan_and_check(
    opened: list[Model], plan: Callable[[list[Model]], Planned], check: Callable[[Model], object] | None
) -> Planned:
    """What `plan` makes of the models. Raises Refusals: what it refuses, and what `check` does."""
    planned: list[Planned] = []
    problems = Problems()
    with problems.collect():
        planned.append(plan(opened))
    if check is not None:
        with problems.collect():
            check(opened[0])
    problems.raise_if_any()
    return planned[0]


def close_all(models: Iterable[Model]) -> None:
    """Close the weights of all models."""
    for model in models:
        model.weights.close()


def open_models(
    names: Sequence[ModelName], *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False
) -> list[Model]:
    """Open every model and read its config; what cannot be is said at once. See `open_model`. Raises Refusals."""
    problems = Problems()
    opened: list[Model] = []
    for name in names:
        try:
            opened.append(open_model(name, weights=weights, quiet=quiet, trust_remote_code=trust_remote_code))
            _ = opened[-1].config
        except QuantisedBase as error:
            base = opened[0] if opened and opened[0].name in (None, names[0]) else None
            problems.add(error.with_base(base) if base is not None else error)
        except InputError as error:
            problems.add(error)
    if problems:
        close_all(opened)
    problems.raise_if_any()
    return opened


def open_model(
    name: ModelName | str, *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False
) -> Model:
    """Find a model and open its weights; reads headers only. Of an adapter, its base too.

    Args:
        name: a folder, a safetensors or GGUF file or a hub name, as text or parsed; an adapter, by itself or as `BASE+ADAPTER`.
        weights: download the weights of a hub model; without, its headers are read over the network and its numbers cannot
            be (`weights.is_here` is False). A model that stores pickles, which have no headers, is downloaded in any case,
            and so is an adapter.

    Raises: InputError: as `locate` and `open_checkpoint`; an adapter of another kind than LoRA, or of another base.
    """
    name = parse_model(name) if isinstance(name, str) else name
    if name.merged is not None:
        made: Model = name.merged.open(weights=weights, quiet=quiet, trust_remote_code=trust_remote_code)
        return made
    own = replace(name, base=None)
    if own.is_tensor_file:
        return _whole(name, Location(own, own.path.resolve()), open_tensor_file(own.path, str(own)), trust_remote_code)
    if own.is_gguf:
        from checkpoints.gguf_files import convert_gguf

        location = convert_gguf(own, quiet=quiet)
        return _whole(name, location, open_checkpoint(location.folder, str(own)), trust_remote_code)
    options = {"quiet": quiet, "trust_remote_code": trust_remote_code}
    location = locate(own, weights=weights, **options)
    if not location.weights_here:
        headers = remote_headers(replace(own, revision=location.revision))
        if headers and not is_adapter(location.folder, [file for file in headers if "/" not in file]):
            files = [RemoteFile(file, str(own), header.file_bytes, header.tensors) for file, header in headers.items()]
            return _whole(name, location, Checkpoint(location.folder, str(own), files), trust_remote_code)
        location = locate(own, **options)
    if is_adapter(location.folder, [file for file in WEIGHT_FILES if (location.folder / file).is_file()]):
        return _open_adapted(name, location, weights=weights, **options)
    return _whole(name, location, open_checkpoint(location.folder, str(own)), trust_remote_code)


def _whole(name: ModelName, location: Location, checkpoint: Checkpoint, trust_remote_code: bool) -> Model:
    """A whole model, its float8 and MXFP4 weights as numbers. Raises InputError: it was named as an adapter; scales do not fit."""
    try:
        if name.base is not None:
            raise InputError(f"{name}: expected an adapter after the '+', got a whole model. Give it by itself.")
        if holds_mxfp4(checkpoint.tensors):
            from checkpoints.mxfp4 import Mxfp4Weights

            return Model(location, Mxfp4Weights(checkpoint), trust_remote_code)
        if not any(info.dtype in FLOAT8 for info in checkpoint.tensors.values()):
            return Model(location, checkpoint, trust_remote_code)
        from checkpoints.dequantise import DequantisedWeights

        config = {} if name.is_tensor_file else read_config(location.folder, str(name))
        return Model(location, DequantisedWeights(checkpoint, config), trust_remote_code)
    except BaseException:
        checkpoint.close()
        raise


def _open_adapted(name: ModelName, location: Location, **options: bool) -> Model:
    """An adapter on its base."""
    from checkpoints.adapters import AdaptedWeights, read_adapter_config

    label = str(replace(name, base=None))
    config = read_adapter_config(location.folder, label)
    if name.base is None and config.base is None:
        raise InputError(f"{label}: {ADAPTER_CONFIG} names no base model. Give both, as BASE+{label}.")
    named = name.base or _named_base(config, label)
    if named.is_local and named.path.resolve() == location.folder:
        raise InputError(f"{label}: is an adapter, and named as its own base. Give a whole model, as BASE+{label}.")
    try:
        base = open_model(named, **options)
    except InputError as error:
        if name.base is not None:
            raise
        raise InputError(f"{label}: its base: {error.marked} Or name the base yourself, as BASE+{label}.") from None
    with ExitStack() as opened:
        opened.callback(base.weights.close)
        if base.quantisation is not None:
            raise QuantisedBase(label, base)
        adapter = open_checkpoint(location.folder, label, ADAPTER_FILES)
        opened.callback(adapter.close)
        weights = AdaptedWeights(base.weights, adapter, str(name), config, base.find_same, lambda: tie_of(base))
        opened.pop_all()
    return Model(base.location, weights, base.trust_remote_code, name, (*base.adapters, (location, adapter)))


def tie_of(base: Model) -> Tie | None:
    """The head that a model ties to its embedding and does not store; None where it stores one, or has none."""
    from checkpoints.adapters import Tie

    head, embedding = base.architecture.output_head, base.architecture.input_embedding
    if head is None or embedding is None or head in base.weights.tensors:
        return None
    embedding = base.architecture.stored_name(embedding)
    return Tie(head, embedding) if embedding in base.weights.tensors else None


def _named_base(config: AdapterConfig, label: str) -> ModelName:
    """The base that adapter_config.json names. Raises InputError where that is no name."""
    try:
        base = parse_name(str(config.base))
        return replace(base, revision=config.revision) if config.revision and not base.is_local else base
    except InputError as error:
        raise InputError(f"{label}: {ADAPTER_CONFIG}: its base: {error}") from None
