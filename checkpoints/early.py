"""End a command in one line on Ctrl-C, a polite kill or a closed terminal while it still imports: a command imports this first.

Until `commands.shell.run` takes over, Python would answer Ctrl-C with a traceback of whatever was being imported. In a program that is no
command of the toolkit, importing this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

COMMANDS = ("merge", "performAIM", "evaluate_model", "compare_models", "extract_lora", "tune_merge")
"""The scripts at the top, without `.py`."""
INSTALLED = ("merge-models", "perform-aim", "evaluate-model", "compare-models", "extract-lora", "tune-merge")
"""The same commands as `pip install -e .` puts them beside Python."""
INTERRUPTED = 130
SIGNALS = tuple(number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)))
name = os.path.basename(sys.argv[0]) if sys.argv else ""


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Say so and end, without what an interpreter does at its end: nothing has been begun."""
    try:
        os.write(2, f"{name}: interrupted; nothing is left behind.\n".encode(errors="replace"))
    finally:
        os._exit(INTERRUPTED)


def catch_interrupts() -> None:
    """End at once on a signal that would end the process anyway; one that is ignored (`nohup`) stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)


if name.removesuffix(".py") in (*COMMANDS, *INSTALLED) and threading.current_thread() is threading.main_thread():
    catch_interrupts()
