"""Make, check and publish the folder that a run works in: nobody else's, looked at before a run goes on in it, renamed at the end.

What an interrupted run leaves in `OUT.partial/` is gone on with by a run of the same identity: a mapping of everything that
decides the output's bytes. It lies in `OUT.partial/.merge-in-progress/`, with a journal of what is on the disk for good. Nobody
else may write to `OUT.partial`, and what no run of ours put there is neither touched nor published.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import WriteError
from checkpoints.finished import find_lost, is_record
from checkpoints.folder import Folder, ForeignFolder, umask
from checkpoints.journal import ANY_FILE as JOURNALS
from checkpoints.save_path import RECIPE_FILE, is_result, partial_folder, replaced_folder
from checkpoints.settings import setting

STATE = ".merge-in-progress"
"""Folder in the work folder, which no result has: what it is (`work-folder`), whose run (`run.json`), its journal, and what else
the run keeps."""
RUN = "run.json"
MEMBERS = "processes"
"""File in the state of a run in several processes: a token of the first, which the others have to see; each holds a lock on it."""
MARKER = "work-folder"
WHAT = "the work folder of an unfinished run of merge.py or performAIM.py"
FORMAT = 2
"""1 had no marker, and no checksums in its journal: what it finished is made again."""


def digest_of(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity, the same for equal ones."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def holds(folder: Path, parts: Sequence[str], identity: str) -> bool:
    """Whether a folder has every checkpoint of a run: its recipe, which is written last, and files of the sizes it names."""
    for part in parts:
        try:
            if not (folder / part / RECIPE_FILE).is_file():  # a pipe would be waited for
                return False
            recipe = json.loads((folder / part / RECIPE_FILE).read_bytes())
            files = {**recipe["outputs"], **recipe.get("side_files", {})}
            sizes = {name: entry["bytes"] for name, entry in files.items()}
            if recipe.get("identity") != identity:
                return False
            if any((folder / part / name).stat().st_size != size for name, size in sizes.items()):
                return False
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False
    return True


@dataclass
class WorkFolder:
    """The work folder of one output.

    Attributes:
        target: the folder to be.
        identity: of the run, as JSON gives it back.
        digest: of the identity.
        known: names of files that may be in the work folder; None where any may.
        notes: what a user should know of it.
    """

    target: Path
    identity: dict[str, Any]
    digest: str
    known: set[str] | None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Of the work folder."""
        return partial_folder(self.target)

    def open(self) -> Folder:
        """The work folder, made where there is none, for nobody but us.

        Raises: OSError: it cannot be made; ForeignFolder: it is another user's, or others may write to it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(self.path.lstat().st_mode):
                raise
        work = Folder.open(self.path, follow=False)
        try:
            self._make_private(work)
        except BaseException:
            work.close()
            raise
        return work

    def _make_private(self, work: Folder) -> None:
        """See that nobody else can write to the work folder; say so where the file system cannot tell."""
        status = os.fstat(work.descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid == os.geteuid() and not mode & 0o022:
            if mode & 0o077:
                with suppress(PermissionError):  # a file system without modes
                    os.fchmod(work.descriptor, mode & ~0o077)
            return
        tells_users, tells_modes = _what_is_told(work)
        if status.st_uid != os.geteuid() and tells_users:
            raise ForeignFolder(
                f"{self.path}: belongs to another user (number {status.st_uid}), who could change what is written there. "
                f"Remove it, or choose another {setting('save_path')}."
            )
        if mode & 0o022 and tells_modes:
            raise ForeignFolder(
                f"{self.path}: others may write to it (mode {mode:o}). If nobody has, take that from them "
                f"(chmod go-w {self.path}); else remove it, or choose another {setting('save_path')}."
            )
        self.notes.append(
            f"{self.path}: this file system keeps no {'users' if tells_modes else 'modes'}, so that whoever may write to it can change "
            "what is written there while the run goes on."
        )

    def claim(self, work: Folder, *, resume: bool) -> Folder:
        """Make a work folder ours: as it is where a run of this identity left it, else emptied.

        Returns: the open state folder.
        Raises: ForeignFolder: it holds something else, or what a run of another identity can go on with.
        """
        if STATE not in work.names():
            if work.names():
                self._check_marked(work, resume=resume)
            return self._begin(work)
        if work.fault(STATE) is not None:
            raise ForeignFolder(_say_strangers(self.path, [f"{STATE} ({work.fault(STATE)})"]))
        state = work.subfolder(STATE)
        strange = [f"{STATE}/{name}" for name in state.strangers(None)]
        if strange:
            raise ForeignFolder(_say_strangers(self.path, strange))
        known = None if self.known is None else {*self.known, *_files_of(state), *_state_names(work)}
        strange = work.strangers(known)
        if strange:
            raise ForeignFolder(_say_strangers(self.path, strange))
        earlier = _read_object(state, RUN)
        if resume and earlier == self.identity:
            self._mark_state(state)
            return state
        if resume and has_records(state):
            differs = (
                ", ".join(differences(earlier, self.identity))
                if earlier is not None
                else f"{STATE}/{RUN}, which cannot be read"
            )
            raise ForeignFolder(
                f"{self.path}: holds an unfinished run that differs in {differs}. Run that command again "
                f"to go on with it, add {setting('resume', 'false')} to begin anew, or choose another {setting('save_path')}."
            )
        return self._begin(work)

    def _check_marked(self, work: Folder, *, resume: bool) -> None:
        """Raise ForeignFolder where a folder without a state may not be emptied: only what a run was about to rename may."""
        mark = self._read_mark()
        number = os.fstat(work.descriptor).st_ino
        if mark is None or mark.get("inode") != number:
            raise ForeignFolder(_say_foreign(work))
        if resume and mark.get("identity") != self.digest:
            raise ForeignFolder(
                f"{self.path}: holds the result of another command, which lacks only its renaming. Run that command again, add "
                f"{setting('resume', 'false')} to begin anew, or choose another {setting('save_path')}."
            )
        strange = work.strangers(self.known)
        if strange:
            raise ForeignFolder(_say_strangers(self.path, strange))
        self.notes.append(f"{self.path}: the result of an earlier run is damaged or not wanted, and made again.")

    def discard(self, work: Folder) -> None:
        """Remove what is in the work folder, but for what no run of ours put there."""
        with suppress(WriteError, ForeignFolder):
            if not work.strangers(self._all_known(work)):
                work.clear(last=(STATE,))
                with _parent(self.target) as parent:
                    parent.remove(_mark_name(self.target))

    def _all_known(self, work: Folder) -> set[str] | None:
        return None if self.known is None else {*self.known, *_state_names(work)}

    def _begin(self, work: Folder) -> Folder:
        """Empty the work folder and put our mark there."""
        work.clear(last=(STATE,))
        with _parent(self.target) as parent:
            parent.remove(_mark_name(self.target))
            state = work.subfolder(STATE)
            self._mark_state(state)
            state.replace(RUN, [json.dumps(self.identity, indent=1).encode()])
            work.sync()
            parent.sync()
        return state

    def _mark_state(self, state: Folder) -> None:
        """Say what the folder is, and what will be in it; a folder of an earlier version says so from now on."""
        content = {"what": WHAT, "format": FORMAT, "files": sorted(self.known or ())}
        if _read_object(state, MARKER) != content:
            state.replace(MARKER, [json.dumps(content, indent=1).encode()])

    def _read_mark(self) -> dict[str, Any] | None:
        """What the mark of a complete result beside the work folder says; None where there is none. Raises ForeignFolder."""
        with _parent(self.target) as parent:
            mark = _read_object(parent, _mark_name(self.target))
            if mark is None and parent.look(_mark_name(self.target)) is not None:
                raise ForeignFolder(
                    f"{parent / _mark_name(self.target)}: expected what a run of ours left, got something else. Move it, or choose "
                    f"another {setting('save_path')}."
                )
        return mark

    def lacks_only_its_rename(self, work: Folder, folders: Sequence[str]) -> bool:
        """Whether an earlier run of this identity was cut off between taking its mark away and the last rename.

        Its mark is then beside the work folder, and every byte is as written; a finished result of that name has no mark.
        """
        mark = self._read_mark()
        if mark is None or mark.get("identity") != self.digest or STATE in work.names():
            return False
        if work.strangers(self.known) or not holds(self.path, folders, self.digest):
            return False
        written = mark.get("written")
        if not isinstance(written, dict) or not is_record({"tensors": {}, "written": written}):
            return False
        return not find_lost(work, written) and all(_has_side_files(work, folder) for folder in folders)

    def publish(self, work: Folder, written: Mapping[str, Any]) -> None:
        """Take our mark away and rename the folder, so that a crash at any moment leaves one or the other."""
        strange = work.strangers(self._all_known(work))
        if strange:
            raise ForeignFolder(_say_strangers(self.path, strange))
        work.sync_all()
        with _parent(self.target) as parent:
            if STATE in work.names():
                mark = {
                    "what": WHAT,
                    "format": FORMAT,
                    "identity": self.digest,
                    "inode": os.fstat(work.descriptor).st_ino,
                }
                parent.replace(_mark_name(self.target), [json.dumps({**mark, "written": written}).encode()])
                work.remove(STATE)
                work.sync()
            mode = stat.S_IMODE(os.fstat(work.descriptor).st_mode)
            with suppress(PermissionError):  # a file system without modes
                os.fchmod(work.descriptor, (mode & ~0o777) | (0o777 & ~umask()))
            self._rename()
            parent.sync()
            with suppress(WriteError):
                parent.remove(_mark_name(self.target))

    def _rename(self) -> None:
        if not (self.target.exists() and any(self.target.iterdir())):
            os.rename(self.path, self.target)  # an empty folder gives way
            return
        replaced = replaced_folder(self.target)
        os.rename(self.target, replaced)
        try:
            os.rename(self.path, self.target)
        except BaseException:
            os.rename(replaced, self.target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _what_is_told(folder: Folder) -> tuple[bool, bool]:
    """Whether the file system keeps users, and modes, found by making a file."""
    probe = f".partial-{secrets.token_hex(16)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder.descriptor)
    try:
        status = os.fstat(descriptor)
        return status.st_uid == os.geteuid(), stat.S_IMODE(status.st_mode) == 0o600
    finally:
        os.close(descriptor)
        os.unlink(probe, dir_fd=folder.descriptor)


def _parent(target: Path) -> Folder:
    return Folder.open(target.parent)


def _mark_name(target: Path) -> str:
    """What lies beside the work folder, for the moment in which that has no mark of its own."""
    return f".{target.name}.merge-complete"


def _state_names(work: Folder) -> list[str]:
    return [STATE, *(f"{STATE}/{name}" for name in work.subfolder(STATE).names())] if STATE in work.names() else []


def _files_of(state: Folder) -> set[str]:
    """The files that a marker says the run writes; none where an earlier version of ours wrote no marker."""
    files = (_read_object(state, MARKER) or {}).get("files")
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def _read_object(folder: Folder, name: str) -> dict[str, Any] | None:
    """A JSON object of ours; None where there is none that can be read. Raises ForeignFolder: a link, a pipe and the like."""
    content = folder.read(name)
    with suppress(ValueError, RecursionError):
        parsed = json.loads(content or b"")
        return parsed if isinstance(parsed, dict) else None
    return None


def _has_side_files(work: Folder, folder: str) -> bool:
    """Whether the small files of a checkpoint are as its recipe says."""
    inner = work.subfolder(folder) if folder else work
    recipe = _read_object(inner, RECIPE_FILE) or {}
    for name, entry in recipe.get("side_files", {}).items():
        *parents, last = name.split("/")
        place = inner
        for parent in parents:
            place = place.subfolder(parent)
        if hashlib.sha256(place.read(last) or b"").hexdigest() != entry.get("sha256"):
            return False
    return True


def _say_foreign(work: Folder) -> str:
    if is_result(work.path):
        return f"{work.path}: holds a finished result, which stays as it is. Move it, or choose another {setting('save_path')}."
    return (
        f"{work.path}: holds files that no run of ours put there. Move them, or choose another {setting('save_path')}."
    )


def _say_strangers(path: Path, names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{path}: holds {listed}, which no run of ours put there. Remove that, or choose another {setting('save_path')}."


def lock(work: Folder) -> bool:
    """Take the lock on an open folder, which dies with its process, so that a crash leaves none behind.

    False where another run holds it, or held it and has renamed or removed the folder since we opened it.
    """
    try:
        fcntl.flock(work.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(work.descriptor), os.stat(work.path))
    except OSError:
        return False


def lock_members(state: Folder) -> bool:
    """Whether no process of an earlier run in several still writes: each holds a lock on a file as long as it lives."""
    members = state.open_file(MEMBERS)
    if members is None:
        return True
    try:
        fcntl.flock(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(members)


@contextmanager
def member(state: Folder, token: str, *, writes: bool) -> Iterator[bool]:
    """Be one of a run's processes for the length of the context. Yields whether the token is the one that the first has written.

    Args:
        writes: whether we are the first, and write it.
    """
    opened = state.open_file(MEMBERS)
    members = opened if opened is not None or not writes else state.new_file(MEMBERS)
    if members is None:
        yield False
        return
    try:
        fcntl.flock(members, fcntl.LOCK_SH)
        if writes:
            os.ftruncate(members, 0)
            os.pwrite(members, token.encode(), 0)
            os.fsync(members)
        yield os.pread(members, len(token) + 1, 0) == token.encode()
    finally:
        os.close(members)


def has_records(state: Folder) -> bool:
    """Whether a journal has anything to go on with."""
    found = (state.look(name) for name in state.names() if JOURNALS.fullmatch(name))
    return any(status is not None and status.st_size > 0 for status in found)


def differences(earlier: Any, other: Any, path: str = "") -> list[str]:
    """Where two identities differ, as `recipe.parameters.lambda (0.5 there, 1.0 here)`."""
    if isinstance(earlier, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*earlier, *other])
        return [
            line
            for key in keys
            if earlier.get(key) != other.get(key)
            for line in differences(earlier.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(earlier, list) and isinstance(other, list) and len(earlier) == len(other):
        pairs = enumerate(zip(earlier, other, strict=True))
        return [line for at, (a, b) in pairs if a != b for line in differences(a, b, f"{path}[{at}]")]
    texts = [json.dumps(value) for value in (earlier, other)]
    return [f"{path} ({texts[0]} there, {texts[1]} here)" if max(map(len, texts)) < 80 else path]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those folders, the last first, that exist and hold nothing."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
