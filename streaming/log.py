"""A run's log: one JSON object a line, for programs and for whoever is asked for help."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError
from checkpoints.settings import setting

Log = Callable[..., object]
"""Called with the name of an event and what belongs to it, as keywords; from any thread."""


def no_log(event: str, **fields: Any) -> None:
    """Log nothing."""


class RunLog:
    """Appends events to a file.

    Args:
        path: of the file, made where it is missing; its folder exists.

    Raises: ArgumentError: it cannot be written.
    """

    def __init__(self, path: Path):
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(
                f"{setting('log_file', path)}: cannot be written: {error.strerror}. Name another file."
            ) from error
        self._lock = threading.Lock()

    def __call__(self, event: str, **fields: Any) -> None:
        """Write one line: time (UTC), event, and the fields."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(), "event": event, **fields}, ensure_ascii=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
