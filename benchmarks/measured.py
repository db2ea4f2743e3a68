"""Run a command and measure it whole: time by the clock, processor time, memory of all its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.02
SHOWN_LINES = 12


class CommandFailed(RuntimeError):
    """A measured command ended with an error; the message says which, and shows what it wrote last."""


@dataclass(frozen=True)
class Run:
    """One run of a command.

    seconds: by the clock, the start of its interpreter included; cpu_seconds: of all its processes.
    peak_bytes: largest anonymous resident memory of all its processes together, sampled; None where the system has no /proc.
    stdout: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None
    stdout: str


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    accept: Sequence[int] = (0,),
    seconds_at_most: float | None = None,
) -> Run:
    """Run a command to its end.

    Args:
        command: program and arguments.
        env: added to the environment.
        accept: exit codes that are no error.
        seconds_at_most: after which it is killed, with all that it started.

    Raises: CommandFailed: any other exit code, or it took too long.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            env={**os.environ, **(env or {})},
            start_new_session=seconds_at_most is not None,
        )
        memory = _Memory(process.pid)
        late = threading.Timer(seconds_at_most or 0, lambda: os.killpg(process.pid, signal.SIGKILL))
        if seconds_at_most is not None:
            late.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            seconds = time.monotonic() - started
            late.cancel()
            memory.stop()
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen does not wait for it a second time
        out.seek(0)
        err.seek(0)
        printed, said = (file.read().decode(errors="replace") for file in (out, err))
    if seconds_at_most is not None and process.returncode == -signal.SIGKILL and seconds >= seconds_at_most:
        raise CommandFailed(f"stopped after {seconds_at_most:.0f} s: {' '.join(command)}")
    if process.returncode not in accept:
        last = "\n".join((said or printed).splitlines()[-SHOWN_LINES:])
        raise CommandFailed(f"exit code {process.returncode}: {' '.join(command)}\n{last}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, memory.peak_bytes, printed)


class _Memory:
    """Samples the anonymous resident memory of a process and all below it until it is stopped.

    Anonymous: what cannot be dropped and read again. Mapped files and the page cache are not in it.
    """

    def __init__(self, process: int):
        self.peak_bytes: int | None = None
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if sys.platform == "linux":
            self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            now = sum(map(anonymous_bytes, processes_below(self._process)))
            self.peak_bytes = max(self.peak_bytes or 0, now)

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()


def processes_below(process: int) -> Iterator[int]:
    """A process, its children, theirs, and so on. Linux only."""
    yield process
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from processes_below(int(child))


def anonymous_bytes(process: int) -> int:
    """Anonymous resident memory of one process; 0 where it has ended. Linux only."""
    try:
        return int(Path(f"/proc/{process}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0
