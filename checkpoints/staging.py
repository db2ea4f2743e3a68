"""The output folder appears complete or not at all: work goes on in `OUT.partial/`, the last act is a rename.

Where `OUT` is a symbolic link, what it points to is meant: the work goes on beside that, on its disk.

What an interrupted run leaves in `OUT.partial/` is gone on with by a run of the same identity: a mapping of everything that
decides the output's bytes. It lies in `OUT.partial/.merge-in-progress/`, with a journal of what is on the disk for good. The
journal is not believed: every byte that it speaks of is looked at before it is gone on with. Nobody else may write to
`OUT.partial`, and what no run of ours put there is neither touched nor published.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import AlreadyComplete, ArgumentError, InputError, Interrupted, WriteError
from checkpoints.finished import Finished, find_finished, find_lost, is_record, places_in
from checkpoints.folder import Folder, ForeignFolder, umask
from checkpoints.journal import FILE as JOURNAL
from checkpoints.journal import Journal

RECIPE_FILE = "merge_recipe.json"
SWEEP_PREFIX = "omega_"
"""What the folders of a sweep are called, one checkpoint each: `omega_0.2`."""
STATE = ".merge-in-progress"
"""Folder in the work folder, which no result has: what it is (`work-folder`), whose run (`run.json`), its journal, and what else
the run keeps."""
RUN = "run.json"
MARKER = "work-folder"
WHAT = "the work folder of an unfinished run of merge.py or performAIM.py"
FORMAT = 2
"""1 had no marker, and no checksums in its journal: what it finished is made again."""


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run left in its folder, without its report; None where there is none that can be read."""
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return {key: value for key, value in recipe.items() if key != "report"} if isinstance(recipe, dict) else None


def partial_folder(save_path: Path) -> Path:
    """Where the work for `save_path` goes on: beside it, so that the rename stays on one file system."""
    target = save_path.resolve()
    return target.with_name(target.name + ".partial")


def _replaced_folder(target: Path) -> Path:
    """Where an earlier result lies for the moment between two renames."""
    return target.with_name(target.name + ".replaced")


def check_save_path(save_path: Path, inputs: Iterable[Path], *, overwrite: bool) -> list[InputError]:
    """Everything that keeps an output folder from being written, known without touching it.

    Args:
        save_path: the folder to be.
        inputs: folders that are read; none may be the output, lie in it or hold it.
        overwrite: whether an earlier result may be replaced.
    """
    try:
        save_path.resolve()
    except RuntimeError:
        return [ArgumentError(f"--save_path {save_path}: its symbolic links lead in a circle. Choose another path.")]
    problem = (
        _check_overlap(save_path, [folder.resolve() for folder in inputs])
        or _check_existing(save_path, overwrite=overwrite)
        or _check_parent(save_path)
    )
    return [problem] if problem else []


def _check_overlap(save_path: Path, inputs: Iterable[Path]) -> InputError | None:
    """A refusal where the output and an input, or the folder we are in, share files."""
    target = save_path.resolve()
    for folder in inputs:
        if target == folder:
            return ArgumentError(f"--save_path {save_path}: is the input {folder}. Choose another folder.")
        if target in folder.parents:
            return ArgumentError(f"--save_path {save_path}: holds the input {folder}. Choose another folder.")
        if folder in target.parents and (folder / "config.json").exists():
            return ArgumentError(f"--save_path {save_path}: lies inside the input {folder}. Choose another folder.")
    here = Path.cwd()
    if target in (here, *here.parents):
        return ArgumentError(
            f"--save_path {save_path}: is the current folder or holds it, which cannot be replaced. Name a new folder."
        )
    return None


def _check_existing(save_path: Path, *, overwrite: bool) -> InputError | None:
    """A refusal where something is at `save_path` that must stay."""
    replaced = _replaced_folder(save_path.resolve())
    if replaced.exists():
        return ArgumentError(
            f"--save_path {save_path}: {replaced} holds an earlier result, from a run that was cut off. Move it back or remove it."
        )
    if not save_path.exists():
        return None
    if not save_path.is_dir():
        return ArgumentError(f"--save_path {save_path}: expected a folder, got a file. Choose another path.")
    if not any(save_path.iterdir()):
        return None
    if not overwrite:
        return ArgumentError(f"--save_path {save_path}: the folder is not empty. Choose another, or add --overwrite.")
    if not _is_result(save_path):
        return ArgumentError(
            f"--save_path {save_path}: --overwrite replaces only a folder that holds a {RECIPE_FILE}, or nothing but the folders of a sweep that do. Choose another folder."
        )
    return None


def _is_result(folder: Path) -> bool:
    """Whether a run wrote the folder: one checkpoint, or a sweep of them and nothing beside it."""
    if (folder / RECIPE_FILE).is_file():
        return True
    return all(entry.name.startswith(SWEEP_PREFIX) and (entry / RECIPE_FILE).is_file() for entry in folder.iterdir())


def _check_parent(save_path: Path) -> InputError | None:
    """A refusal where the folder above `save_path` cannot be made or written to."""
    ancestor = existing_ancestor(save_path)
    if not ancestor.is_dir():
        return ArgumentError(f"--save_path {save_path}: {ancestor} is a file, no folder. Choose another path.")
    if not is_writable(ancestor):
        return InputError(
            f"--save_path {save_path}: {ancestor} cannot be written to. Choose another folder or change its permissions."
        )
    return None


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, found by trying: permissions do not tell of read-only and virtual disks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def existing_ancestor(save_path: Path) -> Path:
    """The nearest folder above `save_path` that is there."""
    return next(parent for parent in save_path.resolve().parents if parent.exists())


def check_space(save_path: Path, needed: int) -> list[InputError]:
    """A refusal where the disk of `save_path` has fewer than `needed` bytes free; what an interrupted run took counts as free."""
    ancestor = existing_ancestor(save_path)
    work = partial_folder(save_path)
    taken = sum(path.lstat().st_blocks * 512 for path in work.rglob("*")) if work.is_dir() else 0
    free = shutil.disk_usage(ancestor).free + taken
    if needed <= free:
        return []
    return [
        InputError(
            f"--save_path {save_path}: the output needs {needed:,} bytes, {ancestor} has {free:,} free. Free space or choose another disk."
        )
    ]


@dataclass(frozen=True)
class Stage:
    """A folder to work in, which becomes the output.

    Attributes:
        folder: for the output's files.
        work: the same, open.
        state: for what the run keeps until it is complete.
        journal: what of the run is on the disk for good; records of earlier runs among them.
        finished: what an earlier run has done, as far as its files bear the journal out.
        identity: digest of what decides the output's bytes, for merge_recipe.json.
        notes: what a user should know of the folder.
    """

    folder: Path
    work: Folder
    state: Folder
    journal: Journal
    finished: Finished
    identity: str
    notes: list[str] = field(default_factory=list)


def digest_of(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity, the same for equal ones."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_complete(save_path: Path, folders: Sequence[str], identity: Mapping[str, Any]) -> None:
    """Raise AlreadyComplete where an earlier run has written this very output.

    Args:
        save_path: the folder to be; folders: below it, one for each checkpoint, `""` for the folder itself.
        identity: see `staged`.
    """
    if _holds(save_path, folders, digest_of(identity)):
        raise AlreadyComplete(f"{save_path}: is complete already, made of the same inputs in the same way.")


def _holds(folder: Path, parts: Sequence[str], identity: str) -> bool:
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


@contextmanager
def staged(
    save_path: Path,
    *,
    overwrite: bool,
    folders: Sequence[str] = ("",),
    files: Collection[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Iterator[Stage]:
    """Give a folder to work in; rename it to `save_path` at the end.

    Where the run is cut off (Ctrl-C, a full disk, `kill -9`), what its journal has stays for the next run of the same
    identity, which looks at every byte of it. Where an input is at fault, nothing stays.

    Args:
        save_path: the folder to be.
        overwrite: whether an earlier result may be replaced, which happens by rename; it is back where a step fails.
        folders: of the checkpoints, as in `check_complete`.
        files: what will be in each of them, by name; anything else is refused, before and after the run. None where any may.
        identity: everything that decides the output's bytes, for JSON.
        resume: go on with what an interrupted run of this identity left; without, begin again, whoever's it is.

    Raises:
        InputError: another run works on the same output, or has just written it; it cannot be made.
        ForeignFolder: the work folder holds an unfinished run of another identity, or something else; it belongs to
            another user, or others may write to it.
        AlreadyComplete: an earlier run was cut off just before the rename, which has been done now.
        Interrupted: Ctrl-C, with something to go on with.
    """
    target = save_path.resolve()
    known = None if files is None else {f"{folder}/{name}" if folder else name for folder in folders for name in files}
    job = _Staging(target, json.loads(json.dumps(dict(identity or {}))), digest_of(identity or {}), known)
    made = [parent for parent in reversed(job.path.parents) if not parent.exists()]
    journal: Journal | None = None
    try:
        work = job.open()
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"{job.path}: cannot be created: {error.strerror}. Choose another --save_path.") from error
    try:
        with work:
            if not _lock(work):
                raise InputError(
                    f"{save_path}: another run is writing it. Wait for that run, or choose another --save_path."
                )
            done = resume and job.lacks_only_its_rename(work, folders)
            try:
                # Once more, now that no other run can publish: one may have done so since the plan was made.
                problem = _check_existing(target, overwrite=overwrite)
                if problem:
                    raise problem
                if not done:
                    state = job.claim(work, resume=resume)
                    journal = Journal(state)
                    finished = find_finished(work, journal.records)
                    if finished.lost:
                        job.notes.append(_say_lost(job.path, finished))
                    yield Stage(job.path, work, state, journal, finished, job.digest, job.notes)
                job.publish(work, {} if journal is None else places_in(journal.records))
            except ForeignFolder:
                raise
            except BaseException as error:
                stays = isinstance(error, WriteError) or not isinstance(error, InputError)
                if journal is not None and not (stays and journal.records):
                    job.discard(work)
                elif journal is not None and isinstance(error, KeyboardInterrupt):
                    raise Interrupted(
                        f"interrupted. Run the same command again to go on; {job.path} holds what is done."
                    ) from None
                raise
            finally:
                if journal is not None:
                    journal.close()
                _remove_empty([*made, job.path])
        if done:
            raise AlreadyComplete(f"{save_path}: is complete now; an earlier run had left only its renaming to do.")
    except BaseException:
        _remove_empty(made)
        raise


def _say_lost(path: Path, finished: Finished) -> str:
    count = len(finished.lost)
    return (
        f"{path}: {count:,} tensor{'s' * (count != 1)} that an earlier run finished {'are' if count != 1 else 'is'} not on the disk "
        f"as written, or without a checksum ({finished.lost[0]}{', ...' if count > 1 else ''}), and made again."
    )


@dataclass
class _Staging:
    """The steps of `staged`.

    Attributes:
        target: the folder to be; identity: as JSON gives it back; digest: of the identity; known: names of files that may be in
            the work folder; notes: see `Stage`.
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
        found = os.fstat(work.descriptor)
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid == os.geteuid() and not mode & 0o022:
            if mode & 0o077:
                with suppress(PermissionError):  # a file system without modes
                    os.fchmod(work.descriptor, mode & ~0o077)
            return
        tells_users, tells_modes = _what_is_told(work)
        if found.st_uid != os.geteuid() and tells_users:
            raise ForeignFolder(
                f"{self.path}: belongs to another user (number {found.st_uid}), who could change what is written there. "
                "Remove it, or choose another --save_path."
            )
        if mode & 0o022 and tells_modes:
            raise ForeignFolder(
                f"{self.path}: others may write to it (mode {mode:o}). If nobody has, take that from them "
                f"(chmod go-w {self.path}); else remove it, or choose another --save_path."
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
        if resume and _has_records(state):
            differs = (
                ", ".join(_differences(earlier, self.identity))
                if earlier is not None
                else f"{STATE}/{RUN}, which cannot be read"
            )
            raise ForeignFolder(
                f"{self.path}: holds an unfinished run that differs in {differs}. Run that command again "
                "to go on with it, add --no_resume to begin anew, or choose another --save_path."
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
                "--no_resume to begin anew, or choose another --save_path."
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
                    "another --save_path."
                )
        return mark

    def lacks_only_its_rename(self, work: Folder, folders: Sequence[str]) -> bool:
        """Whether an earlier run of this identity was cut off between taking its mark away and the last rename.

        Its mark is then beside the work folder, and every byte is as written; a finished result of that name has no mark.
        """
        mark = self._read_mark()
        if mark is None or mark.get("identity") != self.digest or STATE in work.names():
            return False
        if work.strangers(self.known) or not _holds(self.path, folders, self.digest):
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
        replaced = _replaced_folder(self.target)
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
        found = os.fstat(descriptor)
        return found.st_uid == os.geteuid(), stat.S_IMODE(found.st_mode) == 0o600
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
        found = json.loads(content or b"")
        return found if isinstance(found, dict) else None
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
    if _is_result(work.path):
        return f"{work.path}: holds a finished result, which stays as it is. Move it, or choose another --save_path."
    return f"{work.path}: holds files that no run of ours put there. Move them, or choose another --save_path."


def _say_strangers(path: Path, names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{path}: holds {listed}, which no run of ours put there. Remove that, or choose another --save_path."


def _lock(work: Folder) -> bool:
    """Take the lock on an open folder, which dies with its process, so that a crash leaves none behind.

    False where another run holds it, or held it and has renamed or removed the folder since we opened it.
    """
    try:
        fcntl.flock(work.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(work.descriptor), os.stat(work.path))
    except OSError:
        return False


def _has_records(state: Folder) -> bool:
    """Whether a journal has anything to go on with."""
    found = state.look(JOURNAL)
    return found is not None and found.st_size > 0


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two identities differ, as `recipe.parameters.lambda (0.5 there, 1.0 here)`."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [
            line
            for key in keys
            if one.get(key) != other.get(key)
            for line in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for at, (a, b) in pairs if a != b for line in _differences(a, b, f"{path}[{at}]")]
    texts = [json.dumps(value) for value in (one, other)]
    return [f"{path} ({texts[0]} there, {texts[1]} here)" if max(map(len, texts)) < 80 else path]


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those folders, the last first, that exist and hold nothing."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
