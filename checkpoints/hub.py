"""Models on the Hugging Face hub: which of their files a merge needs, and how these come into the local cache."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import InputError
from checkpoints.hub_errors import Unreachable, few, label_of, one_line_errors, progress_bars
from checkpoints.side_names import choose_side_files, module_weights

# What a copy in the cache must have of these, if the repo does: programs that only load a model fetch no more.
NEEDED_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repo in the local cache; see `Location`."""

    folder: Path
    commit: str
    sha256: Mapping[str, str]
    weights_here: bool
    note: str = ""


@dataclass(frozen=True)
class Listing:
    """What the hub says a commit holds: file name -> bytes, and sha256 for the files in large-file storage."""

    commit: str
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]


def fetch(repo_id: str, revision: str | None, *, weights: bool, code: bool, offline: bool, quiet: bool) -> Snapshot:
    """Bring what a merge needs of a repo into the local cache, or find it there.

    Args:
        repo_id, revision: a valid name; branch, tag, commit or None for the main branch.
        weights: download the weights too, else only the side files and the index of the weights.
        code: download `*.py` too.
        offline: send no request.
        quiet: no progress bars.

    Raises: InputError: see `location.locate`.
    """
    from huggingface_hub import constants

    try:
        if offline:
            raise Unreachable("offline work was asked for")
        if constants.is_offline_mode():
            raise Unreachable("HF_HUB_OFFLINE=1 forbids to ask the hub")
        with one_line_errors(repo_id, revision):
            return _download(repo_id, revision, weights=weights, code=code, quiet=quiet)
    except Unreachable as error:
        return _find_in_cache(repo_id, revision, weights=weights, reason=str(error))


def list_files(repo_id: str, revision: str | None) -> Listing:
    """Ask the hub what a revision holds. Raises what huggingface_hub raises; Unreachable where no hub answers."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout_s)
        files = info.siblings or []
        return Listing(
            commit=str(info.sha),
            sizes={file.rfilename: (file.lfs.size if file.lfs else file.size) or 0 for file in files},
            sha256={file.rfilename: file.lfs.sha256 for file in files if file.lfs},
        )
    except HfHubHTTPError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreachable(f"{constants.ENDPOINT} does not answer as a hub does (a login page in between?)") from error


def choose_weights(names: Collection[str], read: Callable[[str], bytes], label: str) -> list[str]:
    """The weight files to use, in the order in which the reader looks: safetensors before pickles, never both; and those of
    modules behind the model.

    Args:
        names: the files of a checkpoint.
        read: gives the content of one of them; called for an index.
        label: the model, for messages.

    Raises: InputError: no weights; an index that is damaged, or names a file that is not there.
    """
    from checkpoints.reader import ADAPTER_FILES, WEIGHT_FILES

    chosen = next((name for name in (*WEIGHT_FILES, *ADAPTER_FILES) if name in names), None)
    if chosen is None:
        there = few(names) or "nothing"
        raise InputError(f"{label}: expected {WEIGHT_FILES[0]}, {WEIGHT_FILES[2]} or an index of shards, got {there}.")
    modules = module_weights(names)
    if not chosen.endswith(".json"):
        return [chosen, *modules]
    try:
        shards = sorted({str(shard) for shard in json.loads(read(chosen))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{label}: {chosen}: expected a JSON object with a weight_map, got something else.") from None
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise InputError(f"{label}: {chosen} names files that are not there: {few(missing)}. Tell the model's author.")
    return [*shards, *modules]


def _side_files(sizes: Mapping[str, int], code: bool) -> list[str]:
    """The files of a repo that an output may get, the card and indices; Python files only where they may run."""
    copied = choose_side_files(sizes).copied
    more = [name for name in sizes if name == "README.md" or ("/" not in name and name.endswith(".index.json"))]
    more += [name for name in sizes if name == "adapter_config.json"]
    return [name for name in (*copied, *more) if code or not name.endswith(".py")]


def _download(repo_id: str, revision: str | None, *, weights: bool, code: bool, quiet: bool) -> Snapshot:
    """Ask the hub what there is, fetch the side files, then the weights of the very same commit."""
    label = label_of(repo_id, revision)
    listing = list_files(repo_id, revision)
    side = _side_files(listing.sizes, code)
    if not side:
        raise InputError(f"{label}: expected config.json and a tokenizer, got {few(listing.sizes) or 'an empty repo'}.")
    # By branch or tag, so that the cache remembers what it points to and knows it offline.
    folder = _snapshot(repo_id, revision or "main", side, quiet=True)
    if folder.name != listing.commit:
        raise InputError(f"{label}: changed on the hub while it was read. Run the command again.")
    try:
        chosen = choose_weights(listing.sizes, lambda name: (folder / name).read_bytes(), label)
    except InputError:
        if weights:
            raise
        chosen = []
    absent = [name for name in chosen if not (folder / name).exists()]
    if weights and absent:
        _check_disk_space(label, folder, absent, listing)
        _snapshot(repo_id, listing.commit, absent, quiet=quiet)
        absent = []
    present = {*side, *chosen}.difference(absent)
    sha256 = {name: digest for name, digest in sorted(listing.sha256.items()) if name in present}
    return Snapshot(folder, listing.commit, sha256, bool(chosen) and not absent)


def _snapshot(repo_id: str, revision: str, names: Iterable[str], *, quiet: bool, local: bool = False) -> Path:
    """The cache folder of a commit, with the files `names` in it; `local` sends no request."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with progress_bars(not quiet):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=local))


def _check_disk_space(label: str, folder: Path, names: Iterable[str], listing: Listing) -> None:
    """Raise InputError where the weights cannot fit; what another commit brought already is not counted."""
    blobs = folder.parent.parent / "blobs"
    needed_bytes = sum(listing.sizes[name] for name in names if not (blobs / listing.sha256.get(name, "none")).exists())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"{label}: expected {needed_bytes / 1e9:.1f} GB of free space for the download in {folder}, "
            f"got {free_bytes / 1e9:.1f} GB. Free some, or set HF_HOME to a folder on a larger disk."
        )


def _find_in_cache(repo_id: str, revision: str | None, *, weights: bool, reason: str) -> Snapshot:
    """A complete copy in the cache. Raises InputError, with the reason for looking there, where there is none."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    label = label_of(repo_id, revision)
    advice = f"Download it where there is a network (`hf download {repo_id}`), or give a folder."
    try:
        folder = _snapshot(repo_id, revision or "main", [], quiet=True, local=True)
    except LocalEntryNotFoundError as error:
        raise InputError(f"{label}: no such folder, {reason}, and the cache holds no copy. {advice}") from error
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    known, needed = _expected_files(repo_id, folder, here)
    chosen: list[str] = []
    try:
        chosen = choose_weights(known, lambda name: (folder / name).read_bytes(), label)
    except (InputError, FileNotFoundError) as error:
        if weights:
            raise InputError(f"{label}: {reason}, and the copy in the cache has no usable weights. {advice}") from error
    missing = sorted({*needed, *(chosen if weights else ())} - here)
    if missing:
        raise InputError(f"{label}: {reason}, and the copy in the cache lacks {few(missing)}. {advice}")
    side = set(_side_files(dict.fromkeys(here, 0), False))
    used = [name for name in sorted(here) if name in chosen or name in side]
    sha256 = {name: digest for name in used if (digest := _stored_sha256(folder / name))}
    note = f"{label}: {reason}; commit {folder.name} from the cache is used"
    return Snapshot(folder, folder.name, sha256, bool(chosen) and here.issuperset(chosen), note)


def _expected_files(repo_id: str, folder: Path, here: set[str]) -> tuple[set[str], set[str]]:
    """The files of a cached commit as far as the cache knows them, and those without which the copy is incomplete."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        known = {file.path for file in get_cached_repo_tree(repo_id, revision=folder.name)}
        return known, known.intersection(NEEDED_FILES)
    except CachedRepoTreeNotFoundError:  # it came file by file, so nobody knows what else there is
        return here, set() if "adapter_config.json" in here else {"config.json"}


def _stored_sha256(path: Path) -> str | None:
    """The cache keeps a large file under its sha256, and links to it from the snapshot."""
    target = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return target if re.fullmatch("[0-9a-f]{64}", target) else None
