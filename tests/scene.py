"""One scene for all tests of whole commands: a folder, a command run in this process, what it says, refuses and leaves.

scene = Scene(folder, merge, {"--method": "ties", "--base_model": base, "--models_to_merge": models})
scene.run("--density=0.5").out                          # succeeds; what it printed
scene.refuse("--density=7", says=("--density", "7"))    # exit code 2, one message, nothing changed in the folder
scene.tensors()                                         # what was written
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from checkpoints.errors import LONGEST_MESSAGE

if TYPE_CHECKING:
    from torch import Tensor


class Command(Protocol):
    """A script at the top of the repository, or a module with the same function."""

    __name__: str

    def main(self, argv: list[str] | None = None) -> int: ...


class Ended(NamedTuple):
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Flags = Mapping[str, object]
"""Flag -> value."""


class Stream(io.TextIOWrapper):
    """Text that a command prints, as UTF-8.

    Attributes:
        terminal: what it says it is.
    """

    def __init__(self, terminal: bool = False):
        self.content, self.terminal = io.BytesIO(), terminal
        super().__init__(self.content, encoding="utf-8", newline="", write_through=True)

    def isatty(self) -> bool:
        return self.terminal

    def __str__(self) -> str:
        return self.content.getvalue().decode()


def call(command: Command, *flags: object, code: int | None = 0, terminal: bool = False) -> Ended:
    """Run a command in this process, where an exit that it raises is its exit code.

    Args:
        code: the exit code that it must end with, or AssertionError; None for any.
        terminal: whether its stderr is a terminal.
    """
    out, err = Stream(), Stream(terminal)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = command.main([str(flag) for flag in flags])
        except SystemExit as end:
            status = int(end.code or 0)
    ended = Ended(status, str(out), str(err))
    assert code is None or ended.code == code, f"exit code {ended.code}\n{ended.out}{ended.err}"
    return ended


def names(paths: Sequence[object]) -> str:
    """Paths as `--models_to_merge` takes them."""
    return ",".join(map(str, paths))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content; folders and links to nothing with none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of one file or several, read by the safetensors library."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class Scene:
    """A folder where a command works.

    Attributes:
        folder: what a refusal must leave as it is.
        base, math, merged, one, two: models in it, where a test puts some there.
        out: `--save_path`, unless a run gives another.
        command: the script.
        needed: flags that are added where a run does not give them; or a function that takes the given ones, by name,
            and returns those to add.
        work: counts what a refusal must not begin; see `refuse`.
    """

    def __init__(
        self,
        folder: Path,
        command: Command,
        needed: Flags | Callable[[Mapping[str, str]], Flags] | None = None,
        work: Callable[[], int] = lambda: 0,
    ):
        self.folder, self.command, self.needed, self.work = folder, command, needed or {}, work
        self.base, self.math, self.merged = folder / "base", folder / "math", folder / "merged"
        self.one, self.two, self.out = folder / "one", folder / "two", folder / "out"

    @property
    def prog(self) -> str:
        """How the command calls itself."""
        return f"{self.command.__name__}.py"

    def flags(self, *given: object) -> list[str]:
        """The given flags, after those that are needed beside them; `--save_path` is among these."""
        texts = [str(flag) for flag in given]
        values = {text.partition("=")[0]: text.partition("=")[2] for text in texts if text.startswith("--")}
        needed = self.needed(values) if callable(self.needed) else self.needed
        missing = {**needed, "--save_path": needed.get("--save_path", self.out)}
        return [*(f"{flag}={value}" for flag, value in missing.items() if flag not in values), *texts]

    def run(self, *given: object, **how: Any) -> Ended:
        """Run the command with these flags and those that are needed; `how` as in `call`."""
        return call(self.command, *self.flags(*given), **how)

    def merge(self, base: Path, models: Sequence[Path], *given: object, **how: Any) -> Ended:
        """`run`, with these models, in place of what an earlier run wrote."""
        shutil.rmtree(self.out, ignore_errors=True)
        return self.run("--base_model", base, "--models_to_merge", names(models), *given, **how)

    def fail(self, *given: object, code: int = 1, says: Sequence[str] = ()) -> str:
        """Run the command, which must end with `code` and one message that holds all of `says`, in lines that can be
        shown, and leave every file below the folder as it was.

        Returns: all that the command said.
        """
        return self._fail(*given, code=code, says=says).err

    def _fail(self, *given: object, code: int, says: Sequence[str]) -> Ended:
        before = snapshot(self.folder)
        ended = self.run(*given, code=code)
        _, found, message = ended.err.partition(f"{self.prog}: ")
        assert found, ended.err
        assert message.endswith(".\n")
        first, *others = message.splitlines()
        assert len(others) == (int(first.split(" problems:")[0].split()[-1]) if others else 0), message
        for line in (first, *others):
            assert line.isprintable()
            assert len(line) < LONGEST_MESSAGE + 100
        assert "Traceback" not in ended.err
        for part in says:
            assert part in message
        assert snapshot(self.folder) == before
        return ended

    def refuse(self, *given: object, code: int = 2, says: Sequence[str] = ()) -> str:
        """`fail`, with nothing said before the message, and before the work is begun; the message."""
        done = self.work()
        _, out, message = self._fail(*given, code=code, says=says)
        assert out == ""
        assert message.startswith(self.prog)
        assert self.work() == done
        return message.removeprefix(f"{self.prog}: ")

    # What is on the disk

    def tensors(self, folder: str | Path = "out") -> dict[str, Tensor]:
        """The weights of a checkpoint in the folder."""
        return read_tensors(self.folder / folder)

    def json(self, name: str, folder: str | Path = "out") -> Any:
        """The content of a JSON file of a checkpoint in the folder."""
        return json.loads((self.folder / folder / name).read_text())

    def recipe(self, folder: str | Path = "out") -> Any:
        """merge_recipe.json of a checkpoint in the folder."""
        return self.json("merge_recipe.json", folder)

    def files(self, folder: str | Path = "out") -> list[str]:
        """The names of all files of a checkpoint in the folder, sorted."""
        start = self.folder / folder
        return sorted(path.relative_to(start).as_posix() for path in start.rglob("*") if path.is_file())
