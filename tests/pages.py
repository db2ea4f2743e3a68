"""Run the pages: every command line of README and docs, in the order of the page, and hold what they print to what is printed there.

    python -m tests.pages docs/aim.md             # run one page, say what differs
    python -m tests.pages docs/aim.md --slow      # its long commands too
    python -m tests.pages docs/aim.md --write     # put today's output into its printed blocks

A page is run in a new folder that has what a checkout has, the tiny family under the names that pages give to "your models", and
the family's texts. The first word after a fence says what a block is, the second what is special about it:

    sh                command lines: run
    sh slow           the same, of minutes: run by `make test-all`; by `make test` merges are run, the rest is planned
    sh hub            with models of the hub, or of gigabytes: planned with --dry_run and then run, both on small stand-ins of
                      the models that they name, from a hub on this machine; of an evaluation all but the asking
    sh plan           what only a user's machine can do (install, clone, hours): parsed, files and targets looked for
    text              what the commands before it printed, whole; a line `...` stands for lines that are left out
    text recorded     what another machine, another model or a longer run printed
    text drawing      a picture or a tree
    python            a program: run; where its first line is a comment with a path, that file, written into the folder
    yaml              parsed; a file likewise

Numbers with a point may differ by 2 %, and times, rates and memory are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoints.errors import InputError
from commands.command_line import show_flag
from tests import conftest
from tests.scene import Stream
from tests.stand_ins import FAMILY, HUB, make_chat, make_hub

ROOT = conftest.ROOT
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]  # fmt: skip
SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py"))]
MODELS = ("base", "math", "code", "instruct")
TEXTS = {"texts": "mixture", "math": "math", "code": "code", "instruct": "instruct"}
"""File of texts in the folder, without its ending -> the family's calibration text."""
KINDS = {
    "sh": {"", "slow", "hub", "plan"},
    "text": {"", "recorded", "drawing"},
    "python": {""},
    "yaml": {""},
    "markdown": {""},
}
FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w])")
MEASURED = re.compile(r"peak memory [\d.]+ \w+|(?<![\w.])[\d,.]+ (?:s|ms|minutes|GB/s|MB/s|tokens/s)\b")
"""What differs from run to run."""
HUGGING_FACE = "https://huggingface.co"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language, word: what stands behind the fence.
        text: between the fences.
        start, line: where the text begins, as an offset into the page and as its line.
    """

    language: str
    word: str
    text: str
    start: int
    line: int

    @property
    def path(self) -> str | None:
        """The file that it is, where its first line says so."""
        found = re.match(r"# ([\w./-]+\.\w+)$", self.text.partition("\n")[0])
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """Its command lines, each in one line, without comments and empty lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = (re.sub(r"(?:^|\s)#.*$", "", line).strip() for line in lines)
        return [line for line in found if line]


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order. Raises AssertionError: one without a language, or of an unknown kind."""
    found = [
        Block(match[1], match[2] or "", match[3], match.start(3), page.count("\n", 0, match.start(3)) + 1)
        for match in FENCE.finditer(page)
    ]
    fences = len(re.findall(r"^ *```", page, re.MULTILINE))
    assert fences == 2 * len(found), "a fence without a language, an end, or at the start of its line"
    for block in found:
        assert block.word in KINDS.get(block.language, ()), f"line {block.line}: {block.language} {block.word}"
    return found


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Comparison:
    """What a printed block says, beside what was printed.

    Attributes:
        problem: what does not fit; empty where all does.
        lines: the block with today's numbers.
    """

    problem: str
    lines: list[str]


def skeleton(line: str) -> str:
    """A line without its numbers, and with one blank for several."""
    return " ".join(NUMBER.sub("0", MEASURED.sub("*", line)).split())


def numbers(line: str) -> list[str]:
    """The numbers of a line that no clock and no memory decides."""
    return NUMBER.findall(MEASURED.sub("*", line))


def near(one: str, other: str) -> bool:
    """Whether two numbers are equal: whole ones exactly, others to 2 % or to two units of the last digit."""
    if one == other:
        return True
    if "." not in one + other:
        return False
    a, b = (float(text.replace(",", "")) for text in (one, other))
    mantissa, _, power = one.lower().partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(0.02 * abs(b), 2.001 * unit)


def same(one: str, other: str) -> bool:
    """Whether a printed line is the line of a run."""
    return skeleton(one) == skeleton(other) and all(map(near, numbers(one), numbers(other)))


def compare(printed: Sequence[str], run: Sequence[str]) -> Comparison:
    """Hold the lines of a page to those of a run, in order; `...` stands for any lines, none among them."""
    lines, at, free = [], 0, False
    for text in printed:
        if text.strip() == "...":
            free = True
            lines.append(text)
            continue
        places = range(at, len(run)) if free else range(at, min(at + 1, len(run)))
        place = next((index for index in places if same(text, run[index])), None)
        alike = next((index for index in places if skeleton(text) == skeleton(run[index])), None)
        chosen = place if place is not None else alike
        if chosen is None:
            return Comparison(f"printed: {text}\nthe run: {run[at] if at < len(run) else '(nothing more)'}", lines)
        lines.append(run[chosen])
        if place is None:
            return Comparison(f"printed: {text}\nthe run: {run[chosen]}", lines)
        at, free = chosen + 1, False
    rest = [] if free else run[at:]
    return Comparison(f"printed no more, the run: {rest[0]}" if rest else "", lines)


def rewritten(printed: Sequence[str], run: Sequence[str]) -> list[str]:
    """The lines of a page with the numbers of a run; the whole of it where none is left out."""
    if "..." not in (text.strip() for text in printed):
        return list(printed) if not compare(printed, run).problem else list(run)
    lines, at = [], 0
    for text in printed:
        alike = next((index for index in range(at, len(run)) if skeleton(text) == skeleton(run[index])), None)
        lines.append(text if alike is None or same(text, run[alike]) else run[alike])
        at = at if alike is None else alike + 1
    return lines


# ------------------------------------------------------------------------------------------------------------ running


@dataclass
class Runner:
    """Runs a page's blocks in a folder.

    Attributes:
        folder: where.
        slow: whether long commands run too.
        endpoint: address of the hub on this machine.
        variables: those that the page's command lines have set.
        output: what the last run block printed; None where it was planned.
        names: of the page's Python.
    """

    folder: Path
    slow: bool
    endpoint: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    output: list[str] | None = None
    names: dict[str, Any] = field(default_factory=dict)

    def run(self, block: Block) -> str:
        """Run a block, or hold it to what was printed. Returns: what is wrong, empty for nothing."""
        if block.path is not None:
            (self.folder / Path(block.path).name).write_text(block.text)  # the repository's folders are links here
            return ""
        if block.language == "sh":
            self.output = []
            runs = block.word in ("", "hub") or (block.word == "slow" and self.slow)
            problems = [self.command(line, runs, block.word) for line in block.commands]
            self.output = [line.replace(self.endpoint or "\0", HUGGING_FACE) for line in self.output] if runs else None
            return "\n".join(filter(None, problems))
        if block.language == "python":
            with recorded() as stream:
                exec(compile(block.text, f"line {block.line}", "exec"), self.names)
            self.output = str(stream).splitlines()
        if block.language == "yaml":
            list(yaml.safe_load_all(block.text))
        if block.language == "text" and block.word == "" and self.output is not None:
            return compare(block.text.splitlines(), self.output).problem
        return ""

    def command(self, line: str, runs: bool, word: str) -> str:
        """Run a command line, or plan it. Returns: what is wrong."""
        variable = re.fullmatch(r"(\w+)=(\S+)", line)
        if variable:
            self.variables[variable[1]] = variable[2]
            return ""
        line = re.sub(r"\$(\w+)", lambda found: self.variables[found[1]], line)
        words = shlex.split(line)
        environment = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
        program, *arguments = words[len(environment) :] if words[0] in environment else words
        if program == "python" and arguments[0] in SCRIPTS:
            name, *flags = [path for word in arguments for path in self.expanded(word)]
            if word != "hub":
                merges = word == "slow" and name == "merge.py"  # what the commands after it work on
                return self.script(name.removesuffix(".py"), flags, runs or merges)
            if name == "performAIM.py" and not {"--calibration_data", "--activations"} & set(flags):
                flags += ["--calibration_data", "texts.jsonl"]  # the published text is a download
            planned = self.script(name.removesuffix(".py"), flags, False)
            evaluates = name in ("evaluate_model.py", "compare_models.py")
            return planned or ("" if evaluates else self.script(name.removesuffix(".py"), flags, True))
        if program in OTHERS:
            return OTHERS[program](self, line, arguments, runs)
        return f"{line}: expected a program that tests/pages.py knows, got {program}"

    def expanded(self, word: str) -> list[str]:
        """The files that a word with a star names, or the word."""
        found = sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) if "*" in word else []
        return found or [word]

    def script(self, name: str, flags: list[str], runs: bool) -> str:
        """Run a script of the toolkit in this process, or plan what it would do."""
        if not runs and name == "evaluate_model":
            return plan_evaluation(flags)
        if not runs and name in ("merge", "performAIM", "extract_lora", "tune_merge") and "--verify" not in flags:
            flags = [*flags, "--dry_run"]
        elif not runs:
            importlib.import_module(name).build_parser().parse(flags)
            return ""
        return self.call(name, flags, kept=runs)

    def call(self, module: str, flags: list[str], *, kept: bool = True) -> str:
        """Call a module's `main` in this process; `kept`: what it prints is the page's."""
        with recorded() as stream:
            try:
                code = importlib.import_module(module).main(flags)
            except SystemExit as end:
                code = int(end.code or 0)
        lines = str(stream).splitlines()
        assert self.output is not None
        self.output += lines if kept else []
        return f"{module} {shlex.join(flags)}: exit code {code}\n" + "\n".join(lines[-20:]) if code else ""

    def shell(self, line: str) -> str:
        """Run a line by the shell, its output and errors together."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )  # fmt: skip
        assert self.output is not None
        self.output += done.stdout.splitlines()
        return f"{line}: exit code {done.returncode}\n{done.stdout[-2000:]}" if done.returncode else ""


@contextlib.contextmanager
def recorded() -> Iterator[Stream]:
    """What is printed on either stream, in its order."""
    stream = Stream()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


def plan_evaluation(flags: list[str]) -> str:
    """Check what an evaluation needs before its model is loaded, on the family's items."""
    from commands.evaluate_model import build_parser
    from evaluation.prepare import prepare
    from evaluation.request import make_request

    arguments = vars(build_parser().parse(flags))
    if arguments.pop("fetch_data"):
        return ""
    arguments["data_dir"] = str(FAMILY / "data/validation")
    if arguments["model"] is not None and not Path(arguments["model"]).exists():
        arguments["model"] = str(FAMILY / "models/base")
    try:
        prepare(make_request(**arguments, command=flags))
    except InputError as error:
        return f"evaluate_model.py {shlex.join(flags)}: {error.shown(show_flag)}"
    return ""


# ----------------------------------------------------------------------------------------------------- other programs


def make(runner: Runner, line: str, arguments: list[str], runs: bool) -> str:
    """A target of the Makefile, with the environment that is there; planned, make says what it would do."""
    installed = [f"-o .venv/{path.name}" for path in (ROOT / ".venv").glob(".installed*")]
    ready = "-o .venv/bin/pip -o .venv/.installed-requirements -o .venv/.installed-requirements-dev"
    how = f"make --no-print-directory {ready} {' '.join(installed)} {shlex.join(arguments)}"
    if runs:
        return runner.shell(how)
    done = subprocess.run(["make", "-n", *arguments], cwd=runner.folder, capture_output=True, text=True, check=False)
    return f"{line}: {done.stderr}" if done.returncode else ""


def pip(runner: Runner, line: str, arguments: list[str], runs: bool) -> str:
    """Requirements files that exist, extras of pyproject.toml; installs nothing."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [value for flag, value in pairwise(arguments) if flag == "-r"]
    named = [name for word in arguments for name in re.findall(r"^\.\[(.*)\]$", word)]
    missing = [file for file in files if not (ROOT / file).is_file()]
    missing += [name for names in named for name in names.split(",") if name not in extras]
    return f"{line}: not there: {', '.join(missing)}" if missing or arguments[0] not in ("install", "uninstall") else ""


def program(runner: Runner, line: str, arguments: list[str], runs: bool) -> str:
    """`python FILE flags` or `python -m MODULE flags` besides the commands: parsed by its own parser, or run."""
    if arguments[0] == "-m" and arguments[1] in ("pip", "venv"):
        return pip(runner, line, arguments[2:], runs) if arguments[1] == "pip" else ""
    module = arguments[1] if arguments[0] == "-m" else arguments[0].removesuffix(".py").replace("/", ".")
    flags = arguments[2:] if arguments[0] == "-m" else arguments[1:]
    if importlib.util.find_spec(module) is None:
        return f"{line}: no module {module}"
    if runs:
        return runner.call(module, flags)
    source = Path(importlib.util.find_spec(module).origin or "").read_text()
    unknown = [
        flag for flag in flags if flag.startswith("--") and not re.search(rf"\b{flag[2:].partition('=')[0]}\b", source)
    ]
    return f"{line}: {module} does not have {', '.join(unknown)}" if unknown else ""


def plain(runner: Runner, line: str, arguments: list[str], runs: bool) -> str:
    """A program of the system that looks at files."""
    return runner.shell(line) if runs else ""


def foreign(runner: Runner, line: str, arguments: list[str], runs: bool) -> str:
    """What only a user's own machine or account can run; its block says so by `plan`."""
    return f"{line}: mark the block as `sh plan`" if runs else ""


OTHERS = {"make": make, "pip": pip, "python": program, "python3.12": program} | dict.fromkeys(("ls", "cat", "head", "cp", "mkdir", "."), plain) | dict.fromkeys(("cd", "git", "hf", "mergekit-yaml", "wsl", "sudo", "sbatch", "kubectl", "torchrun", "accelerate"), foreign)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- pages


def furnish(folder: Path) -> None:
    """Put into a folder what a checkout has, and the names that pages give to "your models" and texts."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "results", "real", "demo", "demo_quick", *MODELS):
            (folder / path.name).symlink_to(path)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(Path(sys.prefix))
    for name in MODELS:
        shutil.copytree(FAMILY / "models" / name, folder / name)
    for name, text in TEXTS.items():
        shutil.copyfile(FAMILY / f"data/calibration/{text}.jsonl", folder / f"{name}.jsonl")
    make_chat(folder / "chat")


def run_page(name: str, folder: Path, *, slow: bool) -> tuple[list[str], str]:
    """Run a page in a folder. Returns: what is wrong, and the page with today's output."""
    page = (ROOT / name).read_text(encoding="utf-8")
    problems, changed, moved = [], page, 0
    work = folder / "work"
    work.mkdir(parents=True)
    furnish(work)
    runner = Runner(work, slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setattr(sys, "path", [*sys.path])
        blocks = blocks_of(page)
        hub = make_hub(folder / "hub") if any(name in page for name in HUB) else None
        if hub is not None:
            hub.attach(patch, folder / "cache", token=hub.token)
            runner.endpoint = hub.endpoint
        with hub or contextlib.nullcontext():
            for block in blocks:
                try:
                    problem = runner.run(block)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    problems.append(f"{name}, line {block.line}: {problem}")
                if block.language == "text" and block.word == "" and runner.output is not None:
                    new = "".join(f"{line}\n" for line in rewritten(block.text.splitlines(), runner.output))
                    start = block.start + moved
                    changed = changed[:start] + new + changed[start + len(block.text) :]
                    moved += len(new) - len(block.text)
    return problems, changed


def main(argv: Sequence[str] | None = None) -> int:
    """Run pages; returns 1 where something is wrong."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--slow", action="store_true", help="run what takes minutes, too")
    parser.add_argument("--write", action="store_true", help="put today's output into the pages")
    arguments = parser.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as folder:  # one for all: child processes that stay begin in it
        for name in arguments.pages:
            start = os.times()
            problems, changed = run_page(name, Path(folder, name.replace("/", "_")), slow=arguments.slow)
            spent = sum(os.times()[:4]) - sum(start[:4])
            print(
                f"{name}: {len(problems)} problem(s), {spent:.0f} s of processor time", *problems, sep="\n", flush=True
            )
            if arguments.write:
                (ROOT / name).write_text(changed, encoding="utf-8")
            found += problems
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
