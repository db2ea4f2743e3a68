"""Inside the jail, in a process of its own: the test. It asks the program for values and compares them here.

The judge runs nothing of the program. What it gets are plain values of exact types (values.py), made here. What is not
plain stays with the program: a `Remote` stands for it, which equals nothing but itself.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .channel import Channel, Closed
from .program import CALL, DETAIL_CHARACTERS, NAME, RUN, describe
from .values import REMOTE, BadValue, pack, unpack, update

FAILED = b"!"  # no token starts with it
HELD = b"="  # nor with this
IMPOSSIBLE = "assert False"
EXCEPTIONS = {
    n: kind for n, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}
# Raised by a function that is called in a loop of the test's, these would end the loop and not the test.
ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration, GeneratorExit)


def run(task: int, result: int, channel: int) -> NoReturn:
    """Judge what the descriptor `task` holds, and write one message to `result`: the token, or why not. Never returns.

    The task is the JSON of {"source", "test", "names", "token", "impossible"}. With "impossible" the test is followed by an
    assertion that cannot hold; if that is the only one which does not, the message starts with HELD, else with FAILED.
    There is no message where the program is gone before the end.
    """

    def end(message: bytes) -> NoReturn:
        os.write(result, message)
        os._exit(0)

    held = False
    try:
        with open(task, encoding="ascii") as file:
            wanted = json.load(file)
        test = compile(wanted["test"], "<test>", "exec", dont_inherit=True)
        names = names_in(wanted["test"]) if wanted["names"] is None else wanted["names"]
        module = types.ModuleType(NAME)
        vars(module).update(Program(Channel(channel), end).run(wanted["source"], names))
        exec(test, vars(module))
        held = True
        if wanted["impossible"]:
            exec(IMPOSSIBLE, vars(module))
    except BaseException as error:
        end((HELD if held else FAILED) + shown(error))
    end(wanted["token"].encode())


def names_in(test: str) -> list[str]:
    """The names that a test reads and that are not built in: where it does not say otherwise, they are the program's."""
    read = {
        node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return sorted(name for name in read if not hasattr(builtins, name))


class Program:
    """The program, seen from the judge.

    Attributes:
        end: called with the last message where the program is gone, or answers with what is no answer: no exception, as
            the test might catch it.
    """

    def __init__(self, channel: Channel, end: Callable[[bytes], NoReturn]) -> None:
        self.end = end
        self._channel = channel
        self._remotes: dict[int, Remote] = {}

    def run(self, source: str, names: list[str]) -> dict[str, Any]:
        """Run the source, and give those of the names that it has. Raises: BaseException: as the program did."""
        taken: dict[str, Any] = self._ask(RUN, [source, names])[0]
        return {name: taken[name] for name in names if name in taken}

    def do(self, operation: str, *arguments: Any) -> Any:
        """The result of one of program.OPERATIONS. Raises: BaseException: as the program did."""
        content = [pack(argument, _number) for argument in arguments]
        value, changed = self._ask(operation, content)
        if changed is not None:
            update(list(arguments[1:]), changed)
        return value

    def _ask(self, operation: str, content: list[Any]) -> tuple[Any, Any]:
        """(result, what became of a call's arguments or None)."""
        try:
            self._channel.send([operation, content])
            answer = self._channel.receive()
            if type(answer) is not dict:
                raise BadValue("expected an answer")
            if "raised" in answer:
                raised = _exception(answer["raised"])
            else:
                raised = None
                value = unpack(answer["value"], self._remote)
                changed = unpack(answer.get("changed"), self._remote)
        except Closed:
            self.end(b"")
        except (BadValue, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
            self.end(FAILED + f"the channel: {error}".encode(errors="replace"))
        if raised is not None:
            if operation != "next" and isinstance(raised, ENDS_OF_LOOPS):
                raised = RuntimeError(f"the program raised {type(raised).__name__}")
            raise raised
        return value, changed

    def _remote(self, content: Any) -> Remote:
        number, kind = content
        if type(number) is not int or type(kind) is not str:
            raise BadValue("expected an object's number and kind")
        return self._remotes.setdefault(number, Remote(self, number, kind))


class Remote:
    """An object that stays with the program: called, iterated over and asked for its parts through the channel.

    Every part arrives as a plain value or as a Remote. It has no comparison but identity and no arithmetic, and special
    methods are not looked up in it: what the test's tools do with it is decided by this class.
    """

    __slots__ = ("_kind", "_number", "_program")

    def __init__(self, program: Program, number: int, kind: str) -> None:
        for name, value in (("_program", program), ("_number", number), ("_kind", kind)):
            object.__setattr__(self, name, value)

    def __call__(self, /, *arguments: Any, **named: Any) -> Any:
        return self._program.do(CALL, self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.do("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.do("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.do("item", self, key)

    def __iter__(self) -> Any:
        return self._program.do("iter", self)

    def __next__(self) -> Any:
        return self._program.do("next", self)

    def __len__(self) -> Any:
        return self._program.do("len", self)

    def __bool__(self) -> Any:
        return self._program.do("bool", self)

    def __str__(self) -> Any:
        return self._program.do("str", self)

    def __repr__(self) -> str:
        return f"<{self._kind} of the program>"


def _number(value: Any) -> Any:
    """The encoding of what stays with the program."""
    if type(value) is not Remote:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the program")
    return {REMOTE: [value._number, value._kind]}


def _exception(content: Any) -> BaseException:
    """A built-in exception with the message of one that the program raised: of its class, or the nearest above it."""
    names, message, text = content
    if not all(type(item) is str for item in (*names, message, text)):
        raise BadValue("expected an exception")
    kind = next(EXCEPTIONS[name] for name in (*names, "Exception") if name in EXCEPTIONS)
    try:
        error = kind(message)
    except TypeError:  # some want more than a message
        error = Exception(message)
    error.add_note(text)
    return error


def shown(error: BaseException) -> bytes:
    """`TypeName: message`, in the program's own words where it raised the exception."""
    notes = getattr(error, "__notes__", None)
    return (notes[0] if notes else describe(error))[:DETAIL_CHARACTERS].encode(errors="replace")
