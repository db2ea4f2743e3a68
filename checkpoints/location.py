"""Find the local folder of a model from its name, as a user types it."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from checkpoints.errors import ArgumentError, InputError, cannot_open

if TYPE_CHECKING:
    from checkpoints.hub_headers import RemoteHeader

WHAT_TO_GIVE = "Give the folder of a model, or a hub name such as org/model or org/model@revision."
# Spaces, control characters and ~^:?*[\ are no part of a git reference, nor is a slash or a dot in some places.
_REVISION = re.compile(r"(?![/.])(?!.*(?:\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\]+(?<![/.])")
_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co/|hf\.co/|hf://)(?:models/)?([\w.-]+/[\w.-]+)")


class Opens(Protocol):
    """What opens a model that is made while it is read."""

    def open(self, *, weights: bool = True, quiet: bool = False, trust_remote_code: bool = False) -> Any:
        """See `checkpoints.model.open_model`."""


@dataclass(frozen=True)
class ModelName:
    """A model as the user named it; `str` gives the text back.

    Attributes:
        base: of an adapter, where it was named: `BASE+ADAPTER`.
        merged: what opens it, where it is the name of a merge in the recipe, and no model that is there.
    """

    path_or_id: str
    revision: str | None = None
    base: ModelName | None = None
    merged: Opens | None = field(default=None, compare=False)

    def __str__(self) -> str:
        own = self.path_or_id if self.revision is None else f"{self.path_or_id}@{self.revision}"
        return own if self.base is None else f"{self.base}+{own}"

    @property
    def path(self) -> Path:
        """The name read as a path, `~` expanded."""
        return Path(os.path.expanduser(self.path_or_id))

    @property
    def is_tensor_file(self) -> bool:
        """Whether the name means a safetensors file by itself, which no config belongs to."""
        return self.is_local and self.path.suffix == ".safetensors" and self.path.is_file()

    @property
    def is_gguf(self) -> bool:
        """Whether the name means a GGUF file."""
        return self.is_local and self.path.suffix.lower() == ".gguf" and self.path.is_file()

    @property
    def is_local(self) -> bool:
        """Whether the name means a folder: something of that name exists, or it is written as only a path is."""
        if self.merged is not None:
            return False
        return self.revision is None and (os.path.lexists(self.path) or _looks_like_path(self.path_or_id))


@dataclass(frozen=True)
class Location:
    """Where a model's files are on this machine.

    Attributes:
        name: as the user gave it.
        folder: the local folder, links resolved; for a hub model its snapshot in the cache; for tensors in a file by itself that file.
        revision: the commit of a hub model; None for a local folder.
        hub_sha256: for a hub model, file name -> sha256 as the hub states it, where it does (its large files).
        weights_here: whether the weight files lie in `folder` too; a local folder is believed to hold its own.
        note: what the user should know, in one line: that the cache answered in place of the hub. Mostly empty.
    """

    name: ModelName
    folder: Path
    revision: str | None = None
    hub_sha256: Mapping[str, str] = field(default_factory=dict)
    weights_here: bool = True
    note: str = ""


def parse_name(text: str) -> ModelName:
    """Read `FOLDER`, `NAME` or `NAME@REVISION`. A path that exists wins, even where it contains `@` or `:`.

    Args:
        text: one model, as typed; `~` is expanded where the path is used, not in the name.

    Raises: ArgumentError: empty; no name before the `@` or no revision after it; a revision that git cannot have; a
        revision of a local folder.
    """
    if not text.strip():
        raise ArgumentError(f"expected the name of a model, got '{text}'. {WHAT_TO_GIVE}")
    if "\0" in text:
        raise ArgumentError(f"{text!r}: expected the name of a model, got a zero byte in it. {WHAT_TO_GIVE}")
    if os.path.lexists(os.path.expanduser(text)):
        return ModelName(text)
    folder, _, last = text.rpartition("@")
    if folder and last and os.path.lexists(os.path.expanduser(folder)):
        raise ArgumentError(f"{text}: {folder} is a local folder, which has no revisions. Leave '@{last}' out.")
    name, at, revision = text.partition("@")
    if at and not (name.strip() and last.strip()):
        missing = "revision" if name.strip() else "name"
        raise ArgumentError(f"{text}: expected NAME@REVISION, got no {missing}. {WHAT_TO_GIVE}")
    if not at or _looks_like_path(text):
        return ModelName(text)
    if not _REVISION.fullmatch(revision):
        raise ArgumentError(f"{text}: '{revision}' is no revision. Give a branch, a tag or a commit after the '@'.")
    return ModelName(name, revision)


def parse_model(text: str) -> ModelName:
    """Read a model as `parse_name` does, or `BASE+ADAPTER`, where a path that exists wins; bases may be such names themselves.

    Raises: ArgumentError: as `parse_name`.
    """
    base, plus, adapter = text.rpartition("+")
    if not plus or os.path.lexists(os.path.expanduser(text)):
        return parse_name(text)
    if not (base.strip() and adapter.strip()):
        raise ArgumentError(f"{text}: expected BASE+ADAPTER, got one of them. {WHAT_TO_GIVE}")
    return replace(parse_name(adapter.strip()), base=parse_model(base.strip()))


def locate(
    name: ModelName,
    *,
    weights: bool = True,
    offline: bool = False,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Location:
    """Find a model's folder; a hub model is downloaded first, as far as a merge needs it and the cache lacks it.

    Args:
        name: from `parse_name`.
        weights: False leaves the weights of a hub model where they are; `remote_headers` tells what they hold.
        offline: use the cache only, as HF_HUB_OFFLINE=1 does.
        quiet: no progress bars.
        trust_remote_code: download the model's own Python files too.

    Raises: InputError: nothing of that name here or on the hub; no folder; not readable; no access; neither network
        nor a complete copy in the cache; no weights that can be merged; too little disk space.
    """
    if name.is_local:
        return Location(name, _readable_folder(name))
    _check_hub_name(name)
    from checkpoints.hub import fetch  # most models are folders

    snapshot = fetch(
        name.path_or_id, name.revision, weights=weights, code=trust_remote_code, offline=offline, quiet=quiet
    )
    return Location(name, snapshot.folder, snapshot.commit, snapshot.sha256, snapshot.weights_here, snapshot.note)


def remote_headers(name: ModelName) -> dict[str, RemoteHeader]:
    """The headers of a hub model's safetensors files, by range requests: kilobytes instead of the download.

    Pin the revision with the commit of a `Location`, so that headers and folder belong together.

    Returns: file name -> header, for the files that `locate` would download; empty where those are pickles.

    Raises: InputError: as `locate`; a header that is damaged.
    """
    _check_hub_name(name)
    from checkpoints.hub_headers import read_remote_headers

    return read_remote_headers(name.path_or_id, name.revision)


def _looks_like_path(text: str) -> bool:
    return text in (".", "..") or text.startswith(("/", "./", "../", "~"))


def _readable_folder(name: ModelName) -> Path:
    """The folder, resolved. Raises InputError where it is missing, something else, or not readable."""
    path = name.path
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise InputError(f"{name}: expected a folder, got a file. Give the folder it lies in: {path.parent}.")
        os.scandir(path).close()
    except PermissionError as error:
        raise InputError(f"{name}: permission denied. Ask for the right to read it.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            target = os.readlink(path)
            raise InputError(f"{name}: is a link to {target}, which does not exist. Mend the link.") from error
        raise InputError(f"{name}: no such folder.{_near(path)} {WHAT_TO_GIVE}") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise cannot_open(str(name), error) from error
        reason = "its symbolic links lead in a circle" if error.errno == errno.ELOOP else f"{error.strerror}"
        raise InputError(f"{name}: cannot be opened: {reason}. {WHAT_TO_GIVE}") from error
    return path.resolve()


def _near(path: Path) -> str:
    """` Did you mean ...?` where the parent folder holds a similar name."""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return ""
    return f" Did you mean '{path.parent / near[0]}'?" if near else ""


def _check_hub_name(name: ModelName) -> None:
    """Raise InputError where the name cannot be one on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name.path_or_id)
    except HFValidationError as error:
        url = _HUB_URL.match(name.path_or_id)
        hint = f" Did you mean '{url[1]}'?" if url else _near(name.path)
        raise InputError(f"{name}: no such folder, and no name that the hub can have.{hint} {WHAT_TO_GIVE}") from error
