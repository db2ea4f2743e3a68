"""Regular expressions and chat templates of strangers, run by Python's own `re` and by transformers in a process with limits.

Both are small programs: `(a|a)*$` on a tensor's name takes longer than the universe has, and so may two loops in a template. Nothing
inside Python stops them for sure, so they run in a child process, which the system ends when it takes too much processor time, and
this one when the clock runs out.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("strangers_program.py")
SECONDS = 5
"""Of processor time for one request: what is well meant takes milliseconds."""
CLOCK_SECONDS = 120.0
"""Until an answer, on a machine that is busy with other things."""
MEMORY_BYTES = 512 << 20
"""For one request, on Linux; elsewhere the clock alone limits it."""
LONGEST_ANSWER = 64 << 20


class StrangersError(Exception):
    """What a stranger's text asks for cannot be done; the message says why, as the end of a sentence.

    Attributes:
        kind: name of the error's class, `Limit` where it took too much.
        line: of the template, where that is known.
    """

    def __init__(self, message: str, kind: str, line: int | None = None):
        super().__init__(message)
        self.kind = kind
        self.line = line


class Strangers:
    """The child process: started by the first request and by the first after it had to be ended.

    Args:
        seconds: processor time for each request.
        memory_bytes: what it may allocate.
        clock_seconds: until the answer.
    """

    def __init__(self, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES, clock_seconds: float = CLOCK_SECONDS):
        self.seconds, self.memory_bytes, self.clock_seconds = seconds, memory_bytes, clock_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, task: str, **keywords: Any) -> Any:
        """The result of a task of `strangers_program`. Raises StrangersError: it fails, or takes too long or too much memory."""
        request = json.dumps([task, keywords]).encode() + b"\n"
        with self._lock:
            child = self._running()
            try:
                line = self._exchange(child, request)
            except TimeoutError:
                self._end()
                raise StrangersError(self._too_long(), "Limit") from None
            except BaseException:
                self._end()
                raise
            if line is None:
                code = self._end()
                raise StrangersError(self._why_ended(code), "Limit")
        answer = json.loads(line)
        if "error" not in answer:
            return answer["result"]
        if answer["kind"] == "MemoryError":
            raise StrangersError(f"it needs more than {self.memory_bytes >> 20} MiB of memory", "Limit")
        raise StrangersError(answer["error"] or answer["kind"], answer["kind"], answer["line"])

    def _why_ended(self, code: int) -> str:
        # SIGKILL and SIGXCPU come from the system's clock; others from a stack or memory that ran out.
        return self._too_long() if code in (-9, -24) else "it takes too much memory"

    def _too_long(self) -> str:
        return f"it takes more than {self.seconds} seconds"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner != os.getpid():  # the process that forked this one talks to it
            self._child = None
        if self._child is None or self._child.poll() is not None:
            self._end()
            limits = (str(self.seconds), str(self.memory_bytes))
            # -P: a module of the current folder must not be taken for one of Python's.
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd=PROGRAM.parent,  # the current folder may have been deleted
            )
            self._owner = os.getpid()
        return self._child

    def _exchange(self, child: subprocess.Popen[bytes], request: bytes) -> bytes | None:
        """The line of the answer; None where the process ends. Raises TimeoutError: it has not answered in time."""
        assert child.stdin is not None
        assert child.stdout is not None
        end = time.monotonic() + self.clock_seconds
        answer = bytearray()
        with suppress(BrokenPipeError):
            child.stdin.write(request)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while len(answer) < LONGEST_ANSWER:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                part = os.read(child.stdout.fileno(), 1 << 20)
                if not part:
                    return None
                answer += part
                if answer.endswith(b"\n"):
                    return bytes(answer)
        return None

    def _end(self) -> int:
        """End the process; returns how it ended."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return 0
        if child.stdin is not None and child.stdout is not None:
            child.stdin.close()
            child.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.05)
        child.kill()
        return child.wait()

    @property
    def open_files(self) -> int:
        """How many files of this process the talk to the other one takes."""
        return 0 if self._child is None else 2

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()


STRANGERS = Strangers()
"""What the toolkit asks; one process at most, which lives as long as this one."""
atexit.register(STRANGERS.close)
