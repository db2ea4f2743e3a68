"""The errors a user can cause: one clear message, an exit code, never a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from checkpoints.settings import CLOSE, OPEN, VALUE, Show, as_in_python, in_file, show_settings

LONGEST_MESSAGE = 2000
MOST_PROBLEMS = 10
"""Problems that a message lists; a program finds all of them in `Refusals.problems`."""


class InputError(Exception):
    """Something the user handed us does not fit: a checkpoint, a data file, a full disk. Exit code 1.

    Args:
        message: reads `<where>: expected X, got Y. What to do.` It may quote what a stranger wrote: see `printable`. A
            setting is named by `checkpoints.settings.setting`.
        more: further lines, such as commands to be copied.

    Attributes:
        marked: the message with its settings marked, for a door that shows them in its own way; `str` gives their bare names.
    """

    exit_code = 1
    keeps_work = False
    """Whether what a run has finished can be gone on with: the inputs are not at fault."""

    def __init__(self, message: str, *more: str):
        self.marked = "\n".join(map(printable, (message, *more)))
        super().__init__(show_settings(self.marked, as_in_python))

    def shown(self, show: Show) -> Self:
        """This error with its settings as one door shows them; see `checkpoints.settings`."""
        other = type(self).__new__(type(self), *self.args)
        vars(other).update(vars(self), marked=show_settings(self.marked, show))
        other.args = (other.marked,)
        return other.with_traceback(self.__traceback__)


class ArgumentError(InputError):
    """A flag or a recipe key is wrong, whatever the files hold. Exit code 2."""

    exit_code = 2


class UnknownClass(InputError):
    """What was asked needs the class of a model that transformers does not know."""


class Refusals(InputError):
    """Everything found wrong, in one message, so that a user mends it all at once.

    Args:
        problems: one sentence or more each; the exit code is 2 where all of them are argument errors.
    """

    def __init__(self, problems: Iterable[str | InputError]):
        self.problems = [problem if isinstance(problem, InputError) else InputError(problem) for problem in problems]
        if all(isinstance(problem, ArgumentError) for problem in self.problems):
            self.exit_code = ArgumentError.exit_code
        lines = [printable(problem.marked) for problem in self.problems]
        listed = [f"- {line}" for line in lines[:MOST_PROBLEMS]]
        if len(lines) > MOST_PROBLEMS:
            listed.append(f"- and {len(lines) - MOST_PROBLEMS} more")
        self.marked = lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *listed])
        Exception.__init__(self, show_settings(self.marked, as_in_python))

    def shown(self, show: Show) -> Self:
        """These problems with their settings as one door shows them."""
        return type(self)(problem.shown(show) for problem in self.problems)


class WriteError(InputError):
    """The output's disk is full or fails. What is finished stays, and the same command goes on with it.

    Args:
        path: what was written.
        error: what the system says.

    Attributes:
        reason: the system's words.
    """

    keeps_work = True

    def __init__(self, path: Path, error: OSError):
        self.reason = error.strerror
        super().__init__(
            f"{path}: cannot be written: {error.strerror}. Free space and run the same command again, which goes on with what "
            "is finished; or choose another place."
        )


class Interrupted(InputError):
    """A user or the system ended the run; what is done can be gone on with. Exit code 130, as a shell has it for Ctrl-C."""

    exit_code = 130


class AlreadyComplete(Exception):
    """What was asked for is there: nothing is wrong, and nothing to do."""


@contextmanager
def named_by(places: Mapping[str, str]) -> Iterator[None]:
    """Have what the block refuses name the settings of a file by their places in it; see `checkpoints.settings.in_file`."""
    try:
        yield
    except InputError as error:
        if not places:
            raise
        raise error.shown(in_file(places)) from error.__cause__


def cannot_open(where: str, error: OSError) -> InputError:
    """That something could not be opened, and what to do where that was for the number of open files."""
    advice = " Allow this process more of them (ulimit -n)." if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return InputError(f"{where}: cannot be opened: {error.strerror}.{advice}")


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line that can stand inside a sentence."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{line.strip().rstrip('.'):.300}"


def printable(text: str) -> str:
    """One line of bounded length that no terminal obeys: what cannot be printed is escaped, the middle of a long text cut out.

    The marks of a setting stay; what is left of them in the end is invisible.
    """
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - 500]} [...] {text[-500:]}"
    return "".join(
        character
        if character.isprintable() or character in (OPEN, VALUE, CLOSE)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown KIND 'NAME'`, the nearest known name if one is near, and the list of all."""
    names = sorted(known)
    bare = {known_name.lstrip("-"): known_name for known_name in names}  # the dashes of flags make all of them alike
    near = difflib.get_close_matches(name.lower().lstrip("-"), bare, n=1, cutoff=0.6)
    hint = f" Did you mean '{bare[near[0]]}'?" if near else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}."
