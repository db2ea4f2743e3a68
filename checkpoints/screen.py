"""Standard output and error of a command: what strangers wrote is shown and not obeyed, and no stream that is closed stops a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from checkpoints.escaping import terminal


class Screen:
    """A stream of text on which everything but the ends of lines is as `escaping.visible`; otherwise that stream itself."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(terminal(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shown_safely() -> Iterator[None]:
    """What the block prints on standard output goes through a `Screen`."""
    with redirect_stdout(Screen(sys.stdout)):
        yield


def say(line: str) -> None:
    """Print a line on standard error, for people; nothing where nobody listens any more."""
    with suppress(OSError, ValueError):
        print(terminal(line), file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Give a process the streams that it was started without (`>&-`): else the first file that it opens would be one, and printing
    fails."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(number), "w", encoding="utf-8", errors="backslashreplace"))


def discard(*streams: Any) -> None:
    """Send what these streams still hold, and what follows, nowhere: whoever read them has gone, or their disk is full. The
    interpreter would flush once more at its end, and fail."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def flush_all() -> None:
    """Flush both streams for the last time; what cannot be written any more is discarded."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)
