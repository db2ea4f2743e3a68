"""The command line: a parser with a short help and a whole one, flags' values, and how a setting looks to whoever types flags."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from checkpoints import VERSION
from checkpoints.errors import ArgumentError, unknown
from checkpoints.settings import as_flag, setting

FLAGS = {
    "weight": "weights",
    "out_dtype": "dtype",
    "models": "models_to_merge",
    "statistics": "activations",
    "calibration.source": "calibration_data",
    "max_shard_bytes": "max_shard_size",
}
"""Setting -> its flag, where that has another name."""
SIZE_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def show_flag(name: str, value: str | None) -> str:
    """A setting as a user of a command types it: `--weights 0.5`, `--no-normalize`."""
    if (name, value) == ("resume", "false"):
        return as_flag("no_resume", None)
    flag = FLAGS.get(name, name)
    if value in ("true", "false"):
        return as_flag(flag if value == "true" else f"no-{flag}", None)
    return as_flag(flag, value)


class Help(argparse.Action):
    """Print the help and exit: the common flags for `--help`, every flag for `--help-all`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **keywords)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.help_text(whole=option == "--help-all"), end="")
        parser.exit()


class Group(argparse._ArgumentGroup):
    """Flags under one title, each common or not.

    Attributes:
        common: those that `--help` shows; the others are left to `--help-all`.
    """

    def __init__(self, container: argparse.ArgumentParser, *names: Any, **keywords: Any):
        super().__init__(container, *names, **keywords)
        self.common: list[argparse.Action] = []

    @property
    def flags(self) -> list[argparse.Action]:
        """All of them."""
        return self._group_actions

    def add_argument(self, *names: str, common: bool = False, **keywords: Any) -> argparse.Action:
        """Add a flag as argparse does, a common one where most runs need it; one that is required always is."""
        action = super().add_argument(*names, **keywords)
        if common or action.required:
            self.common.append(action)
        return action


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with a short help and a whole one, with `--version`, and with the nearest flag named
    where one is unknown.

    Attributes:
        groups: the groups of flags, in the order of the help.
    """

    def __init__(self, **keywords: Any):
        self.groups: list[Group] = []
        super().__init__(
            allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords
        )
        self.groups.clear()  # of argparse's own two, which stay empty
        self._about = Group(self, "about this command")
        self._about.add_argument("-h", "--help", action=Help, common=True, help="show the flags that most runs need")
        self._about.add_argument("--help-all", action=Help, common=True, help="show every flag")
        self._about.add_argument("--version", action="version", common=True, version=f"%(prog)s {VERSION}", help="show the version")  # fmt: skip

    def add_argument_group(self, *names: Any, **keywords: Any) -> Group:
        """A group whose flags can be common."""
        group = Group(self, *names, **keywords)
        self.groups.append(group)
        return group

    def help_text(self, *, whole: bool) -> str:
        """What the command does, and its flags in groups: every flag, or the common ones."""
        formatter = self.formatter_class(prog=self.prog)
        groups = [*self.groups, self._about]
        required = [action for group in groups for action in group.flags if action.required]
        needed = " ".join(f"{' '.join([*action.option_strings[:1], str(action.metavar)])}" for action in required)
        formatter.add_usage(f"%(prog)s {f'{needed} ' if needed else ''}[flags]", [], [])
        formatter.add_text(self.description)
        for group in groups:
            flags = group.flags if whole else group.common
            if flags:
                formatter.start_section(group.title)
                formatter.add_arguments(flags)
                formatter.end_section()
        left = sum(len(group.flags) - len(group.common) for group in groups)
        if left and not whole:
            formatter.add_text(f"{left} more flags: {self.prog} --help-all, or docs/flags.md.")
        return formatter.format_help()

    def format_help(self) -> str:
        """The short help, as `--help` prints it."""
        return self.help_text(whole=False)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse; a list that starts with a negative number may stand apart from its flag (`--weights -1,0.5`)."""
        joined: list[str] = []
        for argument in sys.argv[1:] if argv is None else argv:
            number = re.match(r"-([\d.]|inf|nan)", argument)
            if number and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        parsed, rest = self.parse_known_args(joined)
        if rest and not rest[0].startswith("-"):
            self.error(f"'{rest[0]}' belongs to no flag. Separate models by commas, and quote what has spaces in it.")
        if rest:
            flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            self.error(unknown("flag", rest[0].partition("=")[0], flags))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Exit 2 with one line."""
        message = message.removeprefix("argument ").removesuffix(".")
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def parse_yes_or_no(name: str, text: str | None) -> bool | None:
    """Whether the flag of a setting says yes or no; None where it was not given. Raises ArgumentError."""
    if text is None:
        return None
    return parse_choice(name, text.lower(), ("yes", "no")) == "yes"


def whole(text: str) -> int:
    """A flag's whole number."""
    if not re.fullmatch(r"-?\d{1,20}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'")
    return int(text)


def positive(text: str) -> int:
    """A flag's whole number above 0."""
    if not re.fullmatch(r"\d{1,20}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got '{text}'")
    return int(text)


def parse_save_path(text: str) -> Path:
    """The folder of `--save_path`, `~` expanded. Raises ArgumentError where it is empty."""
    if not text.strip():
        raise ArgumentError("--save_path: expected a folder, got nothing. Name one that does not exist yet.")
    return Path(os.path.expanduser(text))


def parse_size(name: str, text: str) -> int:
    """Bytes from `5GB`, `500M`, `1GiB` or a plain number. Raises ArgumentError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?", text.strip().upper())
    size = int(float(match[1]) * SIZE_UNITS[match[2]]) if match else 0
    if size < 1:
        raise ArgumentError(f"{setting(name)}: expected a size such as 500MB or 5GB, got {text!r}.")
    return size


def parse_choice(name: str, text: str, choices: Sequence[str]) -> str:
    """`text`, where it is one of the choices. Raises ArgumentError with the nearest one."""
    if text not in choices:
        raise ArgumentError(f"{setting(name)}: {unknown('value', text, choices)}")
    return text
