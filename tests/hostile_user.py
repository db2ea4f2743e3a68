"""The sandbox as an unprivileged user meets it: which levels work, right verdicts, and hostile programs that are held.

Started by tests/test_sandbox.py as a user without an account; prints one line of JSON for each level: {"level", "problem": why
it does not work or null, "ran": hostile programs run, "wrong": what went wrong}.
"""

from __future__ import annotations

import json
import os
import warnings

from evaluation.sandbox import LOCKED, Level, Program, Sandbox, why_not
from tests.hostile_programs import CHANNEL, CONTROLLED, MEMORY_BYTES, TOOLS
from tests.hostile_world import World

EXPECTED = [
    ("passed", Program("def f(x): return x + 1", "assert f(1) == 2", 10.0)),
    ("failed", Program("def f(x): return x", "assert f(1) == 2", 10.0)),
    ("failed", Program("import os\nos._exit(0)", "", 10.0)),
    ("timeout", Program("while True: pass", "", 0.1)),
]


def main(user: int) -> None:
    """Try every level as `user`, who is nobody yet known; root becomes that user for good."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    assert 0 not in (*os.getresuid(), *os.getresgid()), "still root"
    warnings.simplefilter("ignore")
    for level in LOCKED:
        row = {"level": level.value, "problem": why_not(level), "ran": 0, "wrong": []}
        if row["problem"] is None:
            row.update(tried(level))
        print(json.dumps(row), flush=True)


def tried(level: Level) -> dict[str, object]:
    """What a level that works does: verdicts, and hostile programs with a target, or aimed at the test."""
    wrong: list[object] = []
    with World() as world, Sandbox(level, workers=1, memory_bytes=MEMORY_BYTES) as sandbox:
        for status, program in EXPECTED:
            found = sandbox.run([program])[0]
            if found.status != status:
                wrong.append((program.source, found.status, found.detail))
        hostile = [program for program in (*CONTROLLED, *TOOLS, *CHANNEL) if level not in program.open_at]
        for program in hostile:
            world.renew()
            found = sandbox.run([Program(world.constants() + program.source, program.test, program.timeout_s)])[0]
            effects = sorted(world.effects(found.detail))
            if effects or found.status not in ("failed", "timeout", "forged"):
                wrong.append((program.name, effects, found.status, found.detail))
    return {"ran": len(hostile), "wrong": wrong}
