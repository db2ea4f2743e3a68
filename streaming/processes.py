"""The processes of one run, as torchrun and its like start them: what they tell each other, and how one learns of another's end.

    launch = launch_of(os.environ)              # None in a process that nobody started together with others
    with join(launch, wait_s=300) as processes:
        processes.agree(lambda: identity)       # all are about to do the same
        ...                                     # each its share
        processes.gather("done", b"...")        # the first hears that all are through

They meet in a `torch.distributed.TCPStore`: torchrun's own, or one that the first process holds. Large things go through the folder
that all of them write to. Nothing here is loaded by a run in one process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from checkpoints.errors import InputError
from checkpoints.process import Launch
from checkpoints.settings import setting
from checkpoints.work_folder import differences

BEAT_S = 0.5
"""Seconds between two signs of life."""
POLL_S = 0.02
END_S = 5.0
"""Seconds in which the others end, once one has."""
MOST_DIFFERENCES = 3
ENDED, SAID, VERDICT = "ended", "said", "verdict"


class ProcessEnded(InputError):
    """Another process ended the run.

    Args:
        message: says which, and why.
        code: its exit code.
        keeps_work: whether what is finished can be gone on with.
    """

    def __init__(self, message: str, code: int, *, keeps_work: bool):
        super().__init__(message)
        self.exit_code, self.keeps_work = code, keeps_work


class Processes:
    """One of the processes of a run; a context manager.

    Args:
        store: that all of them see.
        launch: which of them this is.
        wait_s: how long one is waited for that gives no sign of life.

    Attributes:
        rank: which one this is, from 0 on.
        size: how many there are.
        progress: the first calls it with the bytes that others have moved.
    """

    def __init__(self, store: Store, launch: Launch, wait_s: float):
        self.rank, self.size, self.launch, self.wait_s = launch.rank, launch.size, launch, wait_s
        self.progress: Callable[[int], object] = lambda count: None
        self.moved = 0
        self._store = store
        self._end: dict[str, Any] | None = None
        self._is_ending = False
        self._turn = 0
        self._over = threading.Event()
        self._hosts: list[str] = [socket.gethostname()] * self.size
        self._thread = threading.Thread(target=self._beat, name="processes", daemon=True)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks to the user, and finishes the folder."""
        return self.rank == 0

    def __enter__(self) -> Self:
        self._store.set(f"host/{self.rank}", self._hosts[self.rank])
        if self.is_first:
            self._meet()
        self._thread.start()
        if not self.is_first:
            self._wait_for_first()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):  # whoever holds the store may have gone
            if error is not None:
                self.fail(error)
            self._store.set(f"left/{self.rank}", "")
            if self.is_first:  # whose store it may be
                self._store.set(SAID, "")
                self._wait_briefly([f"left/{rank}" for rank in range(self.size)])
        self._over.set()
        self._thread.join(BEAT_S + 1)

    def name(self, rank: int) -> str:
        """A process, for people."""
        return f"process {rank} of {self.size} ({self._hosts[rank]})"

    # ---------------------------------------------------------------------------------------------------- beginning

    def _meet(self) -> None:
        """Wait for all others. Raises InputError with those that do not come."""
        missing = list(range(1, self.size))
        limit = time.monotonic() + self.wait_s
        while missing and time.monotonic() < limit:
            missing = [rank for rank in missing if not self._store.check([f"host/{rank}"])]
            time.sleep(POLL_S if missing else 0)
        if missing:
            named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            error = InputError(
                f"{setting('process_timeout')}: process {named} of {self.size} did not answer within {self.wait_s:g} s. See that every node runs the same "
                f"command and reaches {self.launch.address}:{self.launch.port}, or give them more time."
            )
            self._tell_end(error.marked, error.exit_code, keeps_work=True)
            raise error
        self._hosts = [self._store.get(f"host/{rank}").decode() for rank in range(self.size)]
        self._store.set("hosts", json.dumps(self._hosts))

    def _wait_for_first(self) -> None:
        limit = time.monotonic() + 2 * self.wait_s
        while not self._store.check(["hosts"]):
            self.check()
            if time.monotonic() > limit:
                raise InputError(
                    f"{setting('process_timeout')}: process 0 of {self.size} did not answer within {self.wait_s:g} s."
                )
            time.sleep(POLL_S)
        self._hosts = json.loads(self._store.get("hosts"))

    def agree(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Go on only where all processes are about to do the same; the beginning of each job that they share, where they share several.

        Args:
            identity: gives what this one is about to do, as JSON: inputs, recipe, versions.

        Raises: InputError: in the first, with what differs or is refused elsewhere; ProcessEnded: in the others.
        """
        self._settle({"identity": json.loads(json.dumps(identity()))})

    def _settle(self, seen: dict[str, Any], refused: InputError | None = None) -> None:
        """Tell the first what one is about to do, or refuses; the first decides."""
        self._turn += 1
        self.say(f"seen/{self.rank}", json.dumps(seen))
        if not self.is_first:
            verdict = json.loads(self.hear(VERDICT))
            if verdict is not None:
                raise ProcessEnded(verdict["message"], verdict["code"], keeps_work=True)
            return
        others = {rank: json.loads(self.hear(f"seen/{rank}")) for rank in range(1, self.size)}
        error = refused or self._compare(seen, others)
        if refused is not None:
            otherwise = [rank for rank, other in others.items() if other.get("refuses") != seen["refuses"]]
            if otherwise:
                error = _refusal(f"{self.name(0)}, not {self.name(otherwise[0])}", seen)
        verdict = None if error is None else {"message": error.marked, "code": error.exit_code}
        self.say(VERDICT, json.dumps(verdict))
        if error is not None:
            raise error

    def _compare(self, seen: Mapping[str, Any], others: Mapping[int, Mapping[str, Any]]) -> InputError | None:
        """What a process refuses that the first does not, or in what it differs; None where all are alike."""
        for rank, other in others.items():
            if "refuses" in other:
                return _refusal(self.name(rank), other)
            if other["identity"] != seen["identity"]:
                differ = differences(other["identity"], seen["identity"])
                more = f" and {len(differ) - MOST_DIFFERENCES} more" if len(differ) > MOST_DIFFERENCES else ""
                return InputError(
                    f"{self.name(rank)}: expected the inputs, flags and versions of {self.name(0)}, got others: "
                    f"{', '.join(differ[:MOST_DIFFERENCES])}{more}. Run the same command with the same files everywhere."
                )
        return None

    # ------------------------------------------------------------------------------------------- telling each other

    def say(self, key: str, content: str = "") -> None:
        """Tell all others something, once."""
        self._store.set(self._key(key), content)

    def _key(self, key: str) -> str:
        return f"{self._turn}/{key}"

    def hear(self, key: str) -> bytes:
        """Wait for what another tells, as long as it gives signs of life. Raises ProcessEnded: see `check`."""
        key = self._key(key)
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL_S)
        return bytes(self._store.get(key))

    @contextmanager
    def first_before_others(self, key: str) -> Iterator[None]:
        """A block that the first is through with before the others begin. Raises ProcessEnded: see `check`."""
        if not self.is_first:
            self.hear(key)
        yield
        if self.is_first:
            self.say(key)

    def gather(self, key: str, content: str) -> list[bytes]:
        """Tell the first something, which gets everybody's, in the order of the processes; the others get nothing.

        Raises: ProcessEnded: see `check`.
        """
        self.say(f"{key}/{self.rank}", content)
        return [self.hear(f"{key}/{rank}") for rank in range(self.size)] if self.is_first else []

    # ------------------------------------------------------------------------------------------------ life and ending

    def check(self) -> None:
        """Raise ProcessEnded where another process has ended the run, gives no sign of life, or cannot be reached."""
        end = self._end
        if end is not None and not self._is_ending:
            raise ProcessEnded(end["message"], end["code"], keeps_work=end["keeps_work"])

    def advance(self, count: int) -> None:
        """Count bytes that are moved; raises as `check`. From any thread."""
        self.check()
        self.moved += count

    def counting(self, progress: Callable[[int], object]) -> Callable[[int], object]:
        """What is told of bytes in a process: the first passes the others' on too, and each notices where another has ended."""
        if self.is_first:
            self.progress = progress

        def advance(count: int) -> None:
            self.advance(count)
            progress(count)

        return advance

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends the run; the first message counts."""
        if isinstance(error, ProcessEnded) or self._is_ending:
            return
        self._is_ending = True
        ours = error if isinstance(error, InputError) else None
        if ours is not None and not self._turn and not self._store.check([ENDED]):
            with suppress(InputError):
                self._settle({"refuses": ours.marked, "code": ours.exit_code}, ours)
            return
        words = ours.marked if ours else f"ended ({type(error).__name__}). Run the same command again to go on."
        message = words if self.is_first else f"{self.name(self.rank)}: {words}"
        keeps_work = ours is None or ours.keeps_work
        self._tell_end(message, ours.exit_code if ours else 1, keeps_work=keeps_work)

    def wait_until_stopped(self) -> None:
        """Have the first wait, some seconds at most, until no other process writes any more."""
        with suppress(RuntimeError):
            self._wait_briefly([self._key(f"stopped/{rank}") for rank in range(1, self.size)])

    def stop(self) -> None:
        """Say that this process writes no more."""
        with suppress(RuntimeError):
            self.say(f"stopped/{self.rank}")

    def has_been_said(self) -> bool:
        """Wait, some seconds at most, until the first has told the user why the run ended; whether it has."""
        with suppress(RuntimeError):
            return self._wait_briefly([SAID])
        return False

    def tell_said(self) -> None:
        """Say that the user knows why the run ended."""
        with suppress(RuntimeError):
            self._store.set(SAID, "")

    def _wait_briefly(self, keys: list[str]) -> bool:
        limit = time.monotonic() + END_S
        while not self._store.check(keys):
            if time.monotonic() > limit:
                return False
            time.sleep(POLL_S)
        return True

    def _tell_end(self, message: str, code: int, *, keeps_work: bool) -> None:
        end = json.dumps({"rank": self.rank, "message": message, "code": code, "keeps_work": keeps_work})
        self._end = json.loads(self._store.compare_set(ENDED, "", end))

    def _beat(self) -> None:
        """Give signs of life, and look for those of the others: of all by the first, of the first by all."""
        watched = [rank for rank in range(self.size) if rank != self.rank and (self.is_first or rank == 0)]
        seen = {rank: ("", time.monotonic()) for rank in watched}
        told = dict.fromkeys(watched, 0)
        number = 0
        while not self._over.wait(BEAT_S):
            number += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{number} {self.moved}")
                if self._end is None and self._store.check([ENDED]):
                    self._end = json.loads(self._store.get(ENDED))
                for rank in watched:
                    if self._store.check([f"left/{rank}"]):
                        continue
                    beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
                    if beat != seen[rank][0]:
                        seen[rank] = (beat, time.monotonic())
                        moved = int(beat.partition(" ")[2])
                        self.progress(moved - told[rank])
                        told[rank] = moved
                    elif time.monotonic() - seen[rank][1] > self.wait_s and self._end is None:
                        self._tell_lost(rank)
            except RuntimeError:  # the store's
                if self._end is None and not self._over.is_set():
                    self._end = {"rank": -1, "message": self._say_lost(0), "code": 1, "keeps_work": True}
                return

    def _tell_lost(self, rank: int) -> None:
        """End the run for a process that gives no sign of life, in the words of the one that misses it."""
        end = {"rank": rank, "message": self._say_lost(rank), "code": 1, "keeps_work": True}
        self._end = json.loads(self._store.compare_set(ENDED, "", json.dumps(end)))

    def _say_lost(self, rank: int) -> str:
        return (
            f"{self.name(rank)}: gives no sign of life any more ({setting('process_timeout')} {self.wait_s:g} s). See what became of it; run the "
            "same command again to go on, with as many processes as there are."
        )


def _refusal(who: str, seen: Mapping[str, Any]) -> InputError:
    """What a process refuses, as an error that says which."""
    error = InputError(f"{who}: {seen['refuses']}")
    error.exit_code = seen["code"]
    return error


def join(launch: Launch, wait_s: float) -> Processes:
    """Meet the other processes of a run.

    Args:
        launch: which of them this is.
        wait_s: how long one is waited for that gives no sign of life.

    Raises: InputError: nobody can be reached.
    """
    # torchrun holds a store itself, which stays when a process is started again; else the first process holds it.
    is_held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: Store = TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=launch.rank == 0 and not is_held,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"MASTER_ADDR={launch.address}, MASTER_PORT={launch.port}: process {launch.rank} of {launch.size} expected to reach process 0 there within "
            f"{wait_s:g} s, got no answer ({type(error).__name__}). See that it runs, and that the port is open between the nodes."
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Processes(PrefixStore(f"merge/{attempt}", store), launch, wait_s)
