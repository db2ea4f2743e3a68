"""A model as an input: its folder, its open weights, and what config and tokenizer say, read when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints.errors import InputError, Refusals, collecting
from checkpoints.location import Location, ModelName, locate, parse_name, remote_headers
from checkpoints.reader import Checkpoint, RemoteFile, open_checkpoint
from checkpoints.sidecars import Stamps, licence_of, read_config, side_file_stamps
from checkpoints.vocabulary import Vocabulary, read_vocabulary, vocabulary_digest

if TYPE_CHECKING:
    from checkpoints.architecture import Architecture

Planned = TypeVar("Planned")


@dataclass
class Model:
    """One input of a command.

    location: where its files are; weights: its tensors; trust_remote_code: whether its own Python files may run.
    """

    location: Location
    weights: Checkpoint
    trust_remote_code: bool = False

    @property
    def label(self) -> str:
        """How messages name it: as the user wrote it."""
        return str(self.location.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises InputError where it is missing or damaged."""
        return read_config(self.location.folder, self.label)

    @cached_property
    def side_file_stamps(self) -> Stamps:
        """What its side files looked like when this was first asked for."""
        return side_file_stamps(self.location.folder)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer's tokens; None without a tokenizer."""
        return read_vocabulary(self.location.folder, self.label, trust_remote_code=self.trust_remote_code)

    @cached_property
    def vocabulary_digest(self) -> str | None:
        """Equal where the token files are equal."""
        return vocabulary_digest(self.location.folder)

    @cached_property
    def architecture(self) -> Architecture:
        """What holds each tensor; builds the model class without its weights, which takes seconds."""
        from checkpoints.architecture import describe

        shapes = {name: info.shape for name, info in self.weights.tensors.items()}
        return describe(self.location.folder, shapes, label=self.label, trust_remote_code=self.trust_remote_code)

    @cached_property
    def licence(self) -> str | None:
        """The licence its model card names, or None."""
        return licence_of(self.location.folder)


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
        names: the inputs, the base first; plan: makes of the opened models what is wanted, and raises what does not fit.
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
    problems: list[str | InputError] = []
    with collecting(problems):
        planned.append(plan(opened))
    if check is not None:
        with collecting(problems):
            check(opened[0])
    if problems:
        raise Refusals(problems)
    return planned[0]


def close_all(models: Iterable[Model]) -> None:
    """Close the weights of all models."""
    for model in models:
        model.weights.close()


def open_models(
    names: Sequence[ModelName], *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False
) -> list[Model]:
    """Open every model and read its config; what cannot be is said at once. See `open_model`. Raises Refusals."""
    problems: list[str | InputError] = []
    opened: list[Model] = []
    for name in names:
        try:
            opened.append(open_model(name, weights=weights, quiet=quiet, trust_remote_code=trust_remote_code))
            _ = opened[-1].config, opened[-1].side_file_stamps
        except InputError as error:
            problems.append(error)
    if problems:
        for model in opened:
            model.weights.close()
        raise Refusals(problems)
    return opened


def open_model(
    name: ModelName | str, *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False
) -> Model:
    """Find a model and open its weights; reads headers only.

    Args:
        name: a folder or a hub name, as text or parsed.
        weights: download the weights of a hub model; without, its headers are read over the network and its numbers cannot
            be (`weights.is_here` is False). A model that stores pickles, which have no headers, is downloaded in any case.

    Raises: InputError: as `locate` and `open_checkpoint`.
    """
    name = parse_name(name) if isinstance(name, str) else name
    location = locate(name, weights=weights, quiet=quiet, trust_remote_code=trust_remote_code)
    if not location.weights_here:
        headers = remote_headers(ModelName(name.path_or_id, location.revision))
        if headers:
            files = [RemoteFile(file, str(name), header.file_bytes, header.tensors) for file, header in headers.items()]
            return Model(location, Checkpoint(location.folder, str(name), files), trust_remote_code)
        location = locate(name, quiet=quiet, trust_remote_code=trust_remote_code)
    return Model(location, open_checkpoint(location.folder, str(name)), trust_remote_code)
