"""The process in which regular expressions and chat templates of strangers run: `checkpoints.strangers` starts it and ends it.

It reads a request of one line of JSON, `[task, keywords]`, and answers in one, `{"result": ...}` or `{"error": ..., "kind": ...}`. Each
request has a share of processor time and of memory; where it takes more, the system ends the process, or it says so.
"""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONGEST_RESULT = 4_000_000
"""Characters of a rendered chat; the longest prompts that a model reads are a tenth of that."""


def main() -> None:
    """Answer requests until there are none. Arguments: seconds of processor time for each; bytes of memory on top of its own."""
    seconds, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this by closing the pipe
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        task, keywords = json.loads(line)
        prepare, run = TASKS[task]
        prepare()
        _limit(seconds, memory_bytes)
        try:
            answer = {"result": run(**keywords)}
        except BaseException as error:  # whatever a stranger's text makes of Python, RecursionError and MemoryError too
            answer = {"error": str(error)[:2000], "kind": type(error).__name__, "line": getattr(error, "lineno", None)}
        _limit(None, None)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit(seconds: int | None, memory_bytes: int | None) -> None:
    """Limit what is used from now on; None lifts a limit."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (hard if seconds is None else spent + seconds + 1, hard))
    with suppress(OSError, ValueError, IndexError):  # only Linux says how much is in use
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (hard if memory_bytes is None else in_use + memory_bytes, hard))


# ------------------------------------------------------------------------------------------------- regular expressions


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def check(pattern: str) -> None:
    """Whether it is a regular expression."""
    _compiled(pattern)


def find(pattern: str, texts: list[str]) -> list[bool]:
    """In which of the texts it is found."""
    search = _compiled(pattern).search
    return [search(text) is not None for text in texts]


# ------------------------------------------------------------------------------------------------------ chat templates


def _import_transformers() -> None:
    import transformers.utils.chat_template_utils as rendering

    rendering._compile_jinja_template("{{ messages }}").render(messages=[])


def compile_template(template: str) -> None:
    """Whether transformers can compile it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template([], chat_template=template)  # of no chat at all: compiles it and runs nothing


def render(**keywords: Any) -> list[str]:
    """Chats as a template writes them: transformers' `render_jinja_template`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[str] = render_jinja_template(**keywords)[0]
    if any(len(text) > LONGEST_RESULT for text in texts):
        raise ValueError(f"it writes more than {LONGEST_RESULT:,} characters")
    return texts


TASKS: dict[str, tuple[Callable[[], object], Callable[..., Any]]] = {
    "check": (lambda: None, check),
    "find": (lambda: None, find),
    "compile_template": (_import_transformers, compile_template),
    "render": (_import_transformers, render),
}

if __name__ == "__main__":
    main()
