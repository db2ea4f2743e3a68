"""The folder that several processes write to: staged by the first, joined by the others."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from checkpoints.errors import AlreadyComplete, InputError
from checkpoints.finished import Finished, Part
from checkpoints.settings import setting
from checkpoints.staging import Stage, joined
from checkpoints.work_folder import member
from streaming.processes import Processes


class NotShared(InputError):
    """A process does not see what the first has written."""

    keeps_work = True


@contextmanager
def lead(staged: Callable[[], AbstractContextManager[Stage]], processes: Processes) -> Iterator[Stage]:
    """Stage the folder as the first process, tell the others, and let them go when it has been renamed.

    Args:
        staged: opens it.

    Raises: as `checkpoints.staging.staged`; ProcessEnded: another process has ended the run.
    """
    token = secrets.token_hex(16)
    try:
        with staged() as stage, member(stage.state, token, writes=True):
            told = {"token": token, "identity": stage.identity, "finished": _pack(stage.finished)}
            processes.say("stage", json.dumps(told))
            try:
                for rank in range(1, processes.size):
                    processes.hear(f"in/{rank}")
                yield stage
            except BaseException as error:
                processes.fail(error)
                if isinstance(error, InputError) and not error.keeps_work:  # the folder will go
                    processes.wait_until_stopped()
                raise
    except AlreadyComplete as done:
        processes.say("stage", json.dumps({"complete": str(done)}))
        raise
    processes.say("published")


@contextmanager
def follow(save_path: Path, processes: Processes) -> Iterator[Stage]:
    """Work in the folder that the first process has staged, until that has renamed it.

    Raises: AlreadyComplete: nothing is to do; NotShared: it is another folder here; ProcessEnded: see `lead`.
    """
    told = json.loads(processes.hear("stage"))
    if "complete" in told:
        raise AlreadyComplete(told["complete"])
    try:
        with joined(save_path, processes.rank, told["token"], _unpack(told["finished"]), told["identity"]) as stage:
            if stage is None:
                raise NotShared(
                    f"{setting('save_path', save_path)}: expected the folder that {processes.name(0)} writes to, got another, or none: it is not shared. Name one "
                    "on a file system that every node has at the same place."
                )
            processes.say(f"in/{processes.rank}")
            yield stage
    finally:
        processes.stop()
    processes.hear("published")


def _pack(finished: Finished) -> dict[str, object]:
    return asdict(finished) | {"changed": sorted(finished.changed)}


def _unpack(packed: dict[str, object]) -> Finished:
    fields = dict(packed)
    fields["changed"] = frozenset(fields["changed"])  # type: ignore[call-overload]
    fields["parts"] = {name: [Part(**part) for part in parts] for name, parts in fields["parts"].items()}  # type: ignore[attr-defined]
    return Finished(**fields)  # type: ignore[arg-type]
