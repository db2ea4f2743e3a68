"""Finished checkpoints to the Hugging Face hub: what can be refused is known before anything is made of models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError, InputError, Interrupted, first_line
from checkpoints.hub_errors import few, progress_bars
from checkpoints.problems import Problems
from checkpoints.publishing import CARD, public_name, publish
from checkpoints.save_path import RECIPE_FILE
from checkpoints.settings import setting

if TYPE_CHECKING:
    from checkpoints.model import Model

WRITES = re.compile(r"repo\..*write")
"""Permissions of a fine-grained token to write to repos: `repo.write`."""
LATER = "Leave the flag out, and push later with `hf upload`."


@dataclass(frozen=True)
class Pushed:
    """A checkpoint that is on the hub. url, visibility: of its repo; commit: of its last files."""

    url: str
    visibility: str
    commit: str


@dataclass(frozen=True)
class Upload:
    """Where checkpoints go, from `plan_upload`.

    Attributes:
        repos: full names `USER/NAME`, one for each folder below the save path.
        folders: these, `""` for the path itself.
        public: whether everybody may see what is made.
        overwrite: whether an earlier result there may be replaced.
    """

    repos: tuple[str, ...]
    folders: tuple[str, ...]
    public: bool = False
    overwrite: bool = False

    @property
    def visibility(self) -> str:
        """`public` or `private`."""
        return "public" if self.public else "private"

    def as_json(self, inputs: Sequence[Model] = (), files: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What would be pushed, for programs.

        Args:
            inputs: every model.
            files: name -> bytes of each file of each checkpoint, the card and the recipe left out.
        """
        shown = {"files": dict(files or {}), "names": _public_names(inputs)} if files or inputs else {}
        return {"repos": list(self.repos), "visibility": self.visibility, **shown}

    def as_text(self, inputs: Sequence[Model] = (), files: Mapping[str, int] | None = None) -> str:
        """What would be pushed, for people. Arguments as `as_json`."""
        lines = [f"would push to {', '.join(map(_url, self.repos))} ({self.visibility}). Nothing was pushed."]
        lines += [f"  {name}: {size:,} bytes" for name, size in (files or {}).items()]
        lines += [f"  {CARD} and {RECIPE_FILE}, which name the inputs so:"] if inputs else []
        lines += [f"    {name}: {public}" for name, public in _public_names(inputs).items()]
        return "\n".join(lines)

    def check(self) -> None:
        """Look at every repo. Raises Refusals: one holds something else, or is not as visible as was asked for."""
        problems = Problems()
        for repo in self.repos:
            with problems.collect(), _in_words(repo):
                self._check_repo(repo)
        problems.raise_if_any()

    def _check_repo(self, repo: str) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = HfApi().model_info(repo, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        except RepositoryNotFoundError:
            return
        if info.private == self.public:
            advice = f"Add {setting('public')}" if not self.public else f"Leave {setting('public')} out"
            raise InputError(
                f"{setting('push_to_hub', repo)}: is {'private' if info.private else 'public'} on the hub. {advice}, change it at {_url(repo)}/settings, or choose another name."
            )
        there = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
        if there and RECIPE_FILE not in there:
            raise InputError(
                f"{setting('push_to_hub', repo)}: holds {few(there)}, which is no earlier result. Choose another name."
            )
        if there and not self.overwrite:
            raise InputError(
                f"{setting('push_to_hub', repo)}: holds an earlier result. Choose another name, or add {setting('overwrite')}."
            )

    def push(self, save_path: Path, *, quiet: bool = False) -> Iterator[Pushed]:
        """Push every checkpoint below `save_path`, one after the other.

        Raises: InputError: the hub refuses or cannot be reached; Interrupted: Ctrl-C. Both say how to push what is left.
        """
        for folder in self.folders:
            publish(save_path / folder)
        for index, (repo, folder) in enumerate(zip(self.repos, self.folders, strict=True)):
            try:
                with _in_words(repo):
                    self._check_repo(repo)  # hours may have gone by
                    pushed = self._push(repo, save_path / folder, quiet=quiet)
            except InputError as error:
                raise InputError(error.marked, *self._how_later(save_path, index)) from error
            except KeyboardInterrupt:
                raise Interrupted("interrupted while pushing.", *self._how_later(save_path, index)) from None
            yield pushed

    def _push(self, repo: str, folder: Path, *, quiet: bool) -> Pushed:
        from huggingface_hub import HfApi

        api = HfApi()
        with progress_bars(not quiet):
            api.create_repo(repo, private=not self.public, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, delete_patterns="*", commit_message=f"Push {folder.resolve().name}"
            )
        return Pushed(_url(repo), self.visibility, str(commit.oid))

    def _how_later(self, save_path: Path, first: int) -> list[str]:
        """Lines that say how: commands that push the checkpoints from the one at `first` on."""
        more = [*([] if self.public else ["--private"]), *(["--delete", "*"] if self.overwrite else [])]
        left = zip(self.repos[first:], self.folders[first:], strict=True)
        commands = [shlex.join(["hf", "upload", repo, str(save_path / folder), ".", *more]) for repo, folder in left]
        return [f"{save_path} is complete. Push it later with:", *(f"  {line}" for line in commands)]


def plan_upload(name: str, folders: Sequence[str] = ("",), *, public: bool = False, overwrite: bool = False) -> Upload:
    """Find out whether checkpoints can be pushed, with two requests and one more for each further repo.

    Args:
        name: `NAME` or `USER/NAME`, `ORGANISATION/NAME`.
        folders: of the checkpoints, below the save path; each but `""` goes to a repo of its own, `NAME-FOLDER`.
        public, overwrite: see `Upload`.

    Raises: Refusals, ArgumentError: the hub cannot have the name; InputError: offline; no token, or one that may not write
        there; a repo that holds something else, or is not as visible as was asked for.
    """
    from huggingface_hub import constants

    names = [f"{name}-{folder}" if folder else name for folder in folders]
    for repo in names:
        _check_name(repo)
    if constants.is_offline_mode():
        raise InputError(f"{setting('push_to_hub', name)}: HF_HUB_OFFLINE=1 forbids to ask the hub. Unset it. {LATER}")
    with _in_words(name):
        user = _ask_who()
    owner = name.split("/")[0] if "/" in name else user["name"]
    _check_owner(name, owner, user)
    repos = tuple(repo if "/" in repo else f"{owner}/{repo}" for repo in names)
    upload = Upload(repos, tuple(folders), public, overwrite)
    upload.check()
    return upload


def _public_names(inputs: Sequence[Model]) -> dict[str, str]:
    """Input as typed -> as the recipe and the card of the repo would have it; a folder's fingerprint is known when it is read."""
    return {
        model.label: public_name(model.label, [where.revision for where, _ in model.parts], "...") for model in inputs
    }


def _url(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ArgumentError(
            f"{setting('push_to_hub')}: expected NAME or USER/NAME of letters, digits, '-', '_' and '.', got {name!r}."
        ) from None


def _ask_who() -> dict[str, Any]:
    from huggingface_hub import HfApi

    return HfApi().whoami()


def _check_owner(name: str, owner: str, user: dict[str, Any]) -> None:
    """Raise InputError where the token says that it may not write to the owner's repos; what it does not say, pushing will."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    scopes = [
        scope for scoped in (token.get("fineGrained") or {}).get("scoped") or () for scope in scoped["permissions"]
    ]
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not any(map(WRITES.fullmatch, scopes))):
        raise InputError(
            f"{setting('push_to_hub', name)}: your token may read only. Make one that may write at {_url('settings/tokens')}, and give it to `hf auth login`."
        )
    owners = [user["name"], *(scoped["name"] for scoped in user.get("orgs") or ())]
    if owner.lower() not in map(str.lower, owners):
        raise InputError(
            f"{setting('push_to_hub', name)}: your token is that of {user['name']}, who is no member of {owner}. Push to one of: {', '.join(owners)}."
        )


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into an InputError that begins with the flag."""
    import httpx2
    from huggingface_hub import constants, errors

    where = f"{setting('push_to_hub', repo)}"
    try:
        yield
    except InputError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"{where}: there is no token. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(
                f"{where}: the hub does not know your token. Log in with `hf auth login`, or set HF_TOKEN to another."
            ) from error
        # Not the error's own text: that may quote a signed address.
        reason = (error.server_message or error.response.reason_phrase).split("\n")[0].rstrip(".")
        raise InputError(f"{where}: the hub refuses with status {status}: {reason}.") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError) as error:  # hf_xet raises RuntimeError
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{where}: {constants.ENDPOINT} cannot be reached ({said}).") from error
    except ValueError as error:  # a model card that the hub does not take, or an answer that is none
        said = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{where}: the hub refuses: {said}.") from error
