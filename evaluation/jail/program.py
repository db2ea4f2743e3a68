"""Inside the jail, in a process of its own: run a program and then its tests, and say so with a token."""

from __future__ import annotations

import json
import os
import sys
import types

NAME = "program"
FAILED = b"!"  # no token starts with it
DETAIL_CHARACTERS = 500
IMPOSSIBLE = "\n\nassert False\n"


def run(task: int, result: int) -> None:
    """Run what the descriptor `task` holds and write one message to `result`: the token, or why not. Never returns.

    The task is the JSON of {"source", "test", "token", "impossible"}; with "impossible" the test ends in an assertion
    that cannot hold. Program and test are compiled apart, so that the one cannot swallow the other, and run in one
    module whose name is not `__main__`, as in the published checkers.

    All names used after the program began are local: it may replace builtins, `os.write` and `os._exit`. It can still
    find the token in this frame; who uses it passes the impossible test too, and is caught by that.
    """
    write, leave, execute = os.write, os._exit, exec
    try:
        with open(task, encoding="ascii") as file:
            wanted = json.load(file)
        token = wanted["token"].encode()
        module = types.ModuleType(NAME)
        sys.modules[NAME] = module
        sys.argv = [NAME]
        names = vars(module)
        test = wanted["test"] + (IMPOSSIBLE if wanted["impossible"] else "")
        program_code = compile(wanted["source"], "<program>", "exec", dont_inherit=True)
        test_code = compile(test, "<test>", "exec", dont_inherit=True)
        del wanted, test
        execute(program_code, names)
        execute(test_code, names)
    except BaseException as error:
        write(result, FAILED + describe(error))
        leave(1)
    write(result, token)
    leave(0)


def describe(error: BaseException) -> bytes:
    """`TypeName: message`, shortened; the message of a hostile exception may itself fail."""
    name = type.__getattribute__(type(error), "__name__")
    try:
        text = f"{name}: {error}"
    except BaseException:
        text = f"{name}: a message that cannot be shown"
    return text[:DETAIL_CHARACTERS].encode(errors="replace")
