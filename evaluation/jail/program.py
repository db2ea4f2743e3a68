"""Inside the jail, in a process of its own: the program. It does what the judge asks for, and answers with values.

This process holds neither the test nor the token; what a program finds in its frames, its memory and its descriptors is
its own source, and the arguments that its functions were called with.
"""

from __future__ import annotations

import operator
import os
import sys
import types
from typing import Any, NoReturn

from .channel import Channel
from .values import REMOTE, pack, unpack

NAME = "program"
DETAIL_CHARACTERS = 500
TYPE_NAME_CHARACTERS = 100
CALL = "call"
RUN = "run"
OPERATIONS: dict[str, Any] = {
    CALL: lambda function, arguments, named: function(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}


def serve(channel: int) -> NoReturn:
    """Answer requests on the descriptor `channel` until it is closed. Never returns.

    A request is [operation, its arguments], an answer {"value": ..., "changed": ...} with what became of the arguments
    of a call where that is not what they were, or {"raised": [names of the exception's classes, message, description]}.
    """
    try:
        program = Running(Channel(channel))
        while True:
            program.answer()
    finally:
        os._exit(1)


class Running:
    """A program, and those of its objects that the judge has a hold of."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._held: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self) -> None:
        """Do one request. Whatever the program raises is an answer too."""
        operation, content = self._channel.receive()
        try:
            if operation == RUN:
                answer = {"value": self._run(*content)}
            else:
                arguments = [unpack(item, self._look_up) for item in content]
                answer = {"value": self._pack(OPERATIONS[operation](*arguments))}
                if operation == CALL:
                    changed = [self._pack(item) for item in arguments[1:]]
                    if changed != content[1:]:
                        answer["changed"] = changed
            self._channel.send(answer)
        except BaseException as error:
            names = [kind.__name__[:TYPE_NAME_CHARACTERS] for kind in type.mro(type(error))]
            shown = describe(error)
            self._channel.send({"raised": [names, shown.partition(": ")[2], shown]})

    def _run(self, source: str, names: list[str]) -> Any:
        """Run the program's source in a module that is not `__main__`, as in the published checkers.

        Returns: the encoded mapping of those names to its globals that exist.
        """
        module = types.ModuleType(NAME)
        sys.modules[NAME] = module
        sys.argv = [NAME]
        exec(compile(source, "<program>", "exec", dont_inherit=True), vars(module))
        return self._pack({name: vars(module)[name] for name in names if name in vars(module)})

    def _pack(self, value: Any) -> Any:
        try:
            return pack(value, self._hold)
        except RecursionError:  # nested too deep, or in itself
            return self._hold(value)

    def _hold(self, value: Any) -> Any:
        """What is not plain stays here, under a number."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._held)
            self._held.append(value)
        return {REMOTE: [number, type(value).__name__[:TYPE_NAME_CHARACTERS]]}

    def _look_up(self, content: Any) -> Any:
        return self._held[content[0]]


def describe(error: BaseException) -> str:
    """`TypeName: message`, shortened; the message of a hostile exception may itself fail."""
    name = type.__getattribute__(type(error), "__name__")[:TYPE_NAME_CHARACTERS]
    try:
        text = f"{name}: {error}"
    except BaseException:
        text = f"{name}: a message that cannot be shown"
    return text[:DETAIL_CHARACTERS]
