"""The output folder appears complete or not at all: work goes on in `OUT.partial/`, the last act is a rename.

Where `OUT` is a symbolic link, what it points to is meant: the work goes on beside that, on its disk. The journal of an
interrupted run is not believed: every byte that it speaks of is looked at before it is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import AlreadyComplete, InputError, Interrupted
from checkpoints.finished import Finished, find_finished, places_in, read_finished
from checkpoints.folder import Folder, ForeignFolder
from checkpoints.journal import Journal, journal_of, other_records
from checkpoints.save_path import check_existing
from checkpoints.settings import setting
from checkpoints.work_folder import (
    STATE,
    WorkFolder,
    digest_of,
    has_records,
    holds,
    lock,
    lock_members,
    member,
    remove_empty,
)


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
        others: records of other journals there: of the further processes of this run, or of an earlier one.
    """

    folder: Path
    work: Folder
    state: Folder
    journal: Journal
    finished: Finished
    identity: str
    notes: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def gather(self) -> Finished:
        """What all processes have finished by now, as their journals say it. Raises ForeignFolder."""
        self.others[:] = other_records(self.state, self.journal.path.name)
        return read_finished([*self.others, *self.journal.records])


def refuse_if_written(save_path: Path, folders: Sequence[str], identity: Mapping[str, Any]) -> None:
    """Raise AlreadyComplete where an earlier run has written this very output.

    Args:
        save_path: the folder to be.
        folders: below it, one for each checkpoint, `""` for the folder itself.
        identity: see `staged`.
    """
    if holds(save_path, folders, digest_of(identity)):
        raise AlreadyComplete(f"{save_path}: is complete already, made of the same inputs in the same way.")


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
        folders: of the checkpoints, as in `refuse_if_written`.
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
    job = WorkFolder(target, json.loads(json.dumps(dict(identity or {}))), digest_of(identity or {}), known)
    made = [parent for parent in reversed(job.path.parents) if not parent.exists()]
    journal: Journal | None = None
    others: list[dict[str, Any]] = []
    # Open the work folder, and remove on failure what was made on the way to it.
    try:
        work = job.open()
    except OSError as error:
        remove_empty(made)
        raise InputError(
            f"{job.path}: cannot be created: {error.strerror}. Choose another {setting('save_path')}."
        ) from error
    try:
        with work:
            # The lock ends with this process.
            if not lock(work):
                raise InputError(
                    f"{save_path}: another run is writing it. Wait for that run, or choose another {setting('save_path')}."
                )
            done = resume and job.lacks_only_its_rename(work, folders)
            try:
                # Once more, now that no other run can publish: one may have done so since the plan was made.
                problem = check_existing(target, overwrite=overwrite)
                if problem:
                    raise problem
                # Work in it, unless only the rename is left to do.
                if not done:
                    state = job.claim(work, resume=resume)
                    if not lock_members(state):
                        raise ForeignFolder(
                            f"{save_path}: a process of an earlier run is still writing it. Wait for it to end, or choose another {setting('save_path')}."
                        )
                    journal = Journal(state)
                    others += other_records(state)
                    finished = find_finished(work, [*others, *journal.records])
                    if finished.lost:
                        job.notes.append(_say_lost(job.path, finished))
                    yield Stage(job.path, work, state, journal, finished, job.digest, job.notes, others)
                job.publish(work, {} if journal is None else places_in([*others, *journal.records]))
            except ForeignFolder:
                raise
            except BaseException as error:
                # A failing disk, Ctrl-C or a crash leaves what can be gone on with; an input that is at fault leaves nothing.
                stays = not isinstance(error, InputError) or error.keeps_work
                has_done = journal is not None and bool(journal.records or others or has_records(state))
                if journal is not None and not (stays and has_done):
                    job.discard(work)
                elif journal is not None and isinstance(error, KeyboardInterrupt):
                    raise Interrupted(
                        f"interrupted. Run the same command again to go on; {job.path} holds what is done."
                    ) from None
                raise
            finally:
                if journal is not None:
                    journal.close()
                remove_empty([*made, job.path])
        if done:
            raise AlreadyComplete(f"{save_path}: is complete now; an earlier run had left only its renaming to do.")
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def joined(save_path: Path, process: int, token: str, finished: Finished, identity: str) -> Iterator[Stage | None]:
    """Give a further process of a run the folder that the first one has staged; None where it is not the same folder.

    Args:
        save_path: the folder to be.
        process: which one, from 1 on: it has a journal of its own.
        token: that the first process wrote (`checkpoints.work_folder.member`).
        finished, identity: what the first process found.
    """
    job = WorkFolder(save_path.resolve(), {}, identity, None)
    if not (job.path / STATE).is_dir():
        yield None
        return
    with job.open() as work:
        state = work.subfolder(STATE)
        with member(state, token, writes=False) as is_ours:
            if not is_ours:
                yield None
                return
            journal = Journal(state, journal_of(process))
            try:
                yield Stage(job.path, work, state, journal, finished, identity)
            finally:
                journal.close()


def _say_lost(path: Path, finished: Finished) -> str:
    count = len(finished.lost)
    return (
        f"{path}: {count:,} tensor{'s' * (count != 1)} that an earlier run finished {'are' if count != 1 else 'is'} not on the disk "
        f"as written, or without a checksum ({finished.lost[0]}{', ...' if count > 1 else ''}), and made again."
    )
