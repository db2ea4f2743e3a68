"""The page of all flags, docs/flags.md, made from the parsers of the commands.

python -m commands.flags_page            # print it
python -m commands.flags_page --write    # write docs/flags.md
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from commands.command_line import Group, Parser

COMMANDS = {
    "merge.py": "commands.merge",
    "performAIM.py": "commands.perform_aim",
    "evaluate_model.py": "commands.evaluate_model",
    "compare_models.py": "commands.compare_models",
    "extract_lora.py": "commands.extract_lora",
    "tune_merge.py": "commands.tune_merge",
}
"""Script -> the module whose `build_parser` has its flags, in the order of the page."""
PAGE = Path(__file__).resolve().parent.parent / "docs/flags.md"
HEAD = """# Flags

<!-- Made by `python -m commands.flags_page --write`; a test holds it to the commands. -->

```sh
python merge.py --help                  # the flags that most merges need
python merge.py --method ties --help    # and those of a method
python merge.py --help-all              # all of them
```

Every flag of every command, as `--help-all` says them; **bold** ones are those of `--help`. `--lambda 0.5` and `--lambda=0.5` are the same. A flag that
is not known, or that has no effect beside the others, is an error. [methods.md](methods.md) says what each method makes of its parameters, and a
recipe file ([from-mergekit.md](from-mergekit.md)) has a key for most flags.

"""


def make_page() -> str:
    """The whole page, as Markdown."""
    parsers = {name: importlib.import_module(module).build_parser() for name, module in COMMANDS.items()}
    contents = " · ".join(f"[{name}](#{anchor(name)})" for name in parsers)
    return f"{HEAD}{contents}\n" + "".join(section(name, parser) for name, parser in parsers.items())


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def section(name: str, parser: Parser) -> str:
    """What one command takes: a table for each group."""
    first = (parser.description or "").strip().partition("\n")[0]
    return f"\n## {name}\n\n{in_cell(first)}\n" + "".join(table(group) for group in parser.groups)


def table(group: Group) -> str:
    """The flags of a group, each with what it takes and what it is."""
    title = in_cell(group.title or "")
    rows = [f"| {flag(action, action in group.common)} | {in_cell(action.help or '')} |" for action in group.flags]
    return f"\n**{title[:1].upper()}{title[1:]}**\n\n| flag | |\n|---|---|\n" + "".join(f"{row}\n" for row in rows)


def flag(action: argparse.Action, common: bool) -> str:
    """`--flag VALUE`, as it is typed; in bold where it is common."""
    value = "" if action.nargs == 0 else str(action.metavar)
    text = ", ".join(f"`{' '.join(filter(None, (name, value)))}`" for name in action.option_strings or [""])
    text = text.replace("|", r"\|")
    return f"**{text}**" if common else text


def in_cell(text: str) -> str:
    """A help text in a cell of a table: flags as code, and no sign that Markdown would take for its own."""
    text = re.sub(r"([\\|*<\[\]])", r"\\\1", text.replace("%%", "%"))
    return re.sub(r"(?<![\w-])(--\w[\w-]*)", r"`\1`", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or write it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    if parser.parse_args(argv).write:
        PAGE.write_text(make_page(), encoding="utf-8")
    else:
        print(make_page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
