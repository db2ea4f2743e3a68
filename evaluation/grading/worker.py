"""A worker process of `pool`: says that it is ready, then reads one JSON list of arguments per line and writes one JSON result.

It ends with the thread that started it, however that ends, and where an item takes more processor time than it may.

python -m evaluation.grading.worker evaluation.grading.maths:compare TIMEOUT_S PARENT
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import random
import resource
import signal
import sys
import time

from evaluation.jail import kernel

MEMORY_BYTES = 8 << 30
SEED = 0


def main(target: str, timeout_s: float, parent: int) -> int:
    """Serve until standard input ends. Whatever libraries print goes to standard error.

    Args:
        target: `module:function`.
        timeout_s: processor time for one item, in seconds; importing the function does not count.
        parent: the process that started this one.
    """
    die_with(parent)
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)

    def reply(content: dict[str, object]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    reply({"ready": True})
    for line in sys.stdin:
        random.seed(SEED)
        limit_processor_time(timeout_s)
        try:
            reply({"result": function(*json.loads(line))})
        except Exception as error:  # the item's own fault; the worker serves the next one
            reply({"error": f"{type(error).__name__}: {error}"[:300]})
    return 0


def die_with(parent: int) -> None:
    """Be killed when the thread that started this process ends; at once, if it has ended. Linux only."""
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call above
            os._exit(1)


def limit_processor_time(seconds: float) -> None:
    """Let the kernel end this process when it has used that much more processor time."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds) + 1
    if hard == resource.RLIM_INFINITY or soft <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
