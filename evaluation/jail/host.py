"""Outside: starts a zygote, hands it one program at a time, holds the clock, and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .judge import FAILED, HELD
from .program import DETAIL_CHARACTERS
from .settings import Settings

START_S = 30.0
TEARDOWN_S = 60.0
MESSAGE_BYTES = 4 * DETAIL_CHARACTERS + 1
CODE = Path(__file__).resolve().parent
CODE_INSIDE = "/code"
BOOT = "import sys; sys.path.append(sys.argv.pop()); from jail.zygote import main; main(sys.argv[1:])"


class JailError(Exception):
    """A jail did not start, or did not answer; says nothing about a program."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        passed: the token came back, alone and in time.
        held: all of the test held, and only the impossible assertion did not.
    """

    passed: bool
    held: bool
    timed_out: bool
    detail: str
    seconds: float


class Jail:
    """One zygote, and what it takes to run one program after the other in it.

    With it dies everything in it, and it dies with the thread that made it (as bwrap and prctl have it).
    """

    def __init__(self, python: str, settings: Settings, room: list[str] | None = None, stdout: IO[bytes] | None = None):
        """Start and wait until it is ready.

        Args:
            python: the interpreter, as the room shows it.
            settings: for the zygote.
            room: the start of a command that runs the rest in a room; empty where the zygote makes its own or has none.
            stdout: where programs' output goes; nowhere unless given.
        Raises: JailError: it did not start; with its own words on why.
        """
        code = CODE_INSIDE if room else str(CODE.parent)
        command = [*(room or []), python, "-I", "-S", "-B", "-c", BOOT, settings.to_json(), code]
        self._control, inside = socket.socketpair()
        with tempfile.TemporaryFile() as errors, inside:
            output = stdout or subprocess.DEVNULL
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=inside.fileno(),
                    stdout=output,
                    stderr=errors,
                    env={},
                    cwd="/",
                    start_new_session=True,  # away from the terminal: Ctrl-C is for the caller
                )
            except OSError as error:
                self._control.close()
                raise JailError(f"{command[0]}: {error.strerror}") from error
            inside.close()
            try:
                self._receive(START_S, expected=b"ready")
            except JailError as error:
                self.close()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise JailError(said[-1] if said else str(error)) from error

    def attempt(
        self,
        source: str,
        test: str,
        timeout_s: float,
        *,
        names: tuple[str, ...] | None = None,
        impossible: bool = False,
        patience: float = 1.0,
    ) -> Outcome:
        """Run one program and its tests; when this returns, every process of the run is dead.

        Args:
            source, test, names, impossible: as in judge.run.
            timeout_s: how long it may take.
            patience: times timeout_s is how long it may take on the clock. With 1 the clock decides; with more, it
                is the program's processor time that may be no more than timeout_s: a busy machine does not count.
        Raises: JailError: the run could not be set up, or the zygote is gone; this jail is of no more use.
        """
        started = time.monotonic()
        clock_s = timeout_s * patience
        token = secrets.token_hex(16)
        task = {"source": source, "test": test, "names": names, "token": token, "impossible": impossible}
        result, result_inside = os.pipe()
        leash_inside, leash = os.pipe()
        try:
            try:
                with _nameless_file(json.dumps(task).encode("ascii")) as content:
                    descriptors = [content.fileno(), result_inside, leash_inside]
                    socket.send_fds(self._control, [f"{timeout_s!r} {clock_s!r}".encode()], descriptors)
            except OSError as error:
                raise JailError(f"the jail is gone: {error.strerror}") from error
            finally:
                os.close(result_inside)
                os.close(leash_inside)
            message, timed_out = _read(result, started + clock_s)
            seconds = time.monotonic() - started
            with contextlib.suppress(BrokenPipeError):  # a run that never started has let go of it
                os.write(leash, b".")
        finally:
            os.close(result)
            os.close(leash)
        answer = json.loads(self._receive(TEARDOWN_S))
        if answer["problem"]:
            raise JailError(answer["problem"])
        timed_out |= answer["late"]
        passed = not timed_out and message == token.encode()
        detail = "" if passed else _reason(message, timed_out, answer["status"])
        return Outcome(passed, not timed_out and message.startswith(HELD), timed_out, detail, seconds)

    def close(self) -> None:
        """End the zygote and all that is in the jail."""
        self._control.close()
        self.process.kill()
        self.process.wait()

    def _receive(self, patience_s: float, expected: bytes = b"") -> bytes:
        """One message of the zygote."""
        self._control.settimeout(patience_s)
        try:
            message = self._control.recv(1 << 16)
        except OSError as error:
            raise JailError(f"the jail did not answer: {error}") from error
        if not message or (expected and message != expected):
            raise JailError("the jail ended")
        return message


def _nameless_file(content: bytes) -> IO[bytes]:
    """A file without a name that holds the content, at its start."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("task")
    else:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
    file = os.fdopen(descriptor, "w+b")
    file.write(content)
    file.seek(0)
    return file


def _read(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """(what a program writes until it ends, not much more than what is expected of it; whether time ran out)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    message = b""
    while len(message) <= MESSAGE_BYTES:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            return message, True
        part = os.read(descriptor, MESSAGE_BYTES + 1)
        if not part:
            break
        message += part
    return message, False


def _reason(message: bytes, timed_out: bool, status: int) -> str:
    """Why a run did not pass, in few words; what comes from the program is shown as printable text only."""
    if timed_out:
        return "time limit"
    if message.startswith((FAILED, HELD)):
        text = message[1:].decode(errors="replace")
        return "".join(c if c.isprintable() else " " for c in text)[:DETAIL_CHARACTERS]
    if message:
        return "wrote something else than the token"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by signal {-code}" if code < 0 else f"ended with status {code} before its tests did"
