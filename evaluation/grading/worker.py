"""A worker process of `pool`: says that it is ready, then reads one JSON list of arguments per line and writes one JSON result.

python -m evaluation.grading.worker evaluation.grading.maths:compare
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import sys

MEMORY_BYTES = 8 << 30
SEED = 0


def main(target: str) -> int:
    """Serve until standard input ends. Whatever libraries print goes to standard error."""
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
        try:
            reply({"result": function(*json.loads(line))})
        except Exception as error:  # the item's own fault; the worker serves the next one
            reply({"error": f"{type(error).__name__}: {error}"[:300]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
