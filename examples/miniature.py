"""The paper's experiment on the tiny family: which models it compares, and a folder where each is merged and evaluated once.

Used by demo.py and experiments.py. Everything goes through the commands' own functions, in one process, so that libraries
are imported once; what is finished stays finished, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import evaluate_model
import merge
from checkpoints.errors import ArgumentError, InputError

FAMILY = Path(__file__).resolve().parent / "family"
FINE_TUNES = ("code", "instruct", "math")
COMBINATIONS = (("code", "instruct"), ("code", "math"), ("instruct", "math"), FINE_TUNES)
METHODS = ("task_arithmetic", "dare_linear", "dare_ties", "ties", "widen")
OMEGA = 0.4
MARKER = "miniature"
"""Name of a file that shows that a folder is ours."""


@dataclass(frozen=True)
class Candidate:
    """A model of the experiment: a single one (`method` empty), or a merge.

    Attributes:
        method: of merge.py.
        models: names of the family's models.
        lambda_: what the merged task vector is multiplied with; None for the method's default.
        seed: of what the method, or the permuted control, draws; None for the default.
        omega: AIM's; None for a merge without AIM.
        control: AIM's control; empty for AIM itself.
        text: which calibration text AIM reads, and how many texts of it.
    """

    method: str
    models: tuple[str, ...]
    lambda_: float | None = None
    seed: int | None = None
    omega: float | None = None
    control: str = ""
    text: tuple[str, int] = ("mixture", 256)

    @property
    def name(self) -> str:
        """Of its folder and its results; no two candidates share one."""
        if not self.method:
            return self.models[0]
        parts = [self.method, "+".join(self.models)]
        parts += [f"lambda_{self.lambda_:g}"] if self.lambda_ is not None else []
        parts += [f"seed_{self.seed}"] if self.seed is not None else []
        if self.omega is not None:
            parts += [f"{self.control or 'aim'}_{self.omega:g}"]
            parts += ["_".join(map(str, self.text))] if self.text != ("mixture", 256) else []
        return "-".join(parts)

    def with_aim(self, omega: float = OMEGA, **changes: object) -> Candidate:
        """The same merge, relaxed."""
        return replace(self, omega=omega, **changes)  # type: ignore[arg-type]


SINGLES = tuple(Candidate("", (name,)) for name in ("base", *FINE_TUNES))
MERGES = tuple(Candidate(method, models) for method in METHODS for models in COMBINATIONS)
PAPER = (*SINGLES, *(each for plain in MERGES for each in (plain, plain.with_aim())))
"""What the paper's table has: the single models, and every merge without and with AIM."""


class CommandFailed(Exception):
    """A command ended with an exit code; what it had to say is printed."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


class Workspace:
    """A folder of merges and results.

    Args:
        folder: made where it is missing.
        split: which items: `validation`, `test_0` or `test_1`.
        items: of each benchmark; None for all of them.

    Raises: ArgumentError: the folder holds something else.
    """

    def __init__(self, folder: Path, split: str, items: int | None = None):
        if folder.exists() and any(folder.iterdir()) and not self.is_ours(folder):
            raise ArgumentError(f"--folder {folder}: holds something else. Choose a folder that is empty or not there.")
        self.folder = folder
        self._data = FAMILY / "data" / split
        self._items = items
        self._results = folder / "results" / (split if items is None else f"{split}_{items}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        (folder / ".gitignore").write_text("*\n")

    @staticmethod
    def is_ours(folder: Path) -> bool:
        """Whether an earlier run made the folder."""
        return (folder / MARKER).is_file()

    def results(self, candidate: Candidate) -> Path:
        """Where a candidate's results are, or will be."""
        return self._results / f"{candidate.name}.json"

    def is_done(self, candidate: Candidate) -> bool:
        """Whether its results are complete."""
        path = self.results(candidate)
        return path.exists() and bool(json.loads(path.read_text())["complete"])

    def evaluate(self, candidate: Candidate) -> Path:
        """Merge and evaluate what is not there yet. Returns: the results file. Raises: CommandFailed."""
        results = self.results(candidate)
        if not self.is_done(candidate):
            command = ["--model", str(self.model(candidate)), "--data_dir", str(self._data)]
            command += ["--dtype", "float32", "--backend", "hf", "--n_gpu", "0", "--batch_size", "64"]
            command += ["--limit", str(self._items)] if self._items is not None else []
            command += ["--save_path", str(results), "--quiet"] + (["--resume"] if results.exists() else [])
            run_command(evaluate_model.main, command)
        return results

    def model(self, candidate: Candidate) -> Path:
        """The candidate's checkpoint, merged where it is not there yet. Raises: CommandFailed."""
        if not candidate.method:
            return FAMILY / "models" / candidate.models[0]
        folder = self.folder / "models" / candidate.name
        if not folder.exists():
            run_command(merge.main, [*self.merge_command(candidate), "--save_path", str(folder), "--quiet"])
        return folder

    def merge_command(self, candidate: Candidate) -> list[str]:
        """The arguments of merge.py that decide what is written."""
        models = ",".join(str(FAMILY / "models" / name) for name in candidate.models)
        command = ["--method", candidate.method, "--base_model", str(FAMILY / "models" / "base")]
        command += ["--models_to_merge", models]
        command += ["--lambda", str(candidate.lambda_)] if candidate.lambda_ is not None else []
        command += ["--seed", str(candidate.seed)] if candidate.seed is not None else []
        if candidate.omega is not None:
            command += ["--omega", str(candidate.omega), *self._statistics(*candidate.text)]
            command += ["--control", candidate.control] if candidate.control else []
        return command

    def _statistics(self, text: str, count: int) -> list[str]:
        """Flags that give AIM the base's statistics: kept from an earlier merge, or taken now and kept."""
        kept = self.folder / "activations" / f"{text}_{count}.safetensors"
        if kept.exists():
            return ["--activations", str(kept)]
        texts = FAMILY / "data" / "calibration" / f"{text}.jsonl"
        block = 512 if count > 8 else 256  # eight of these texts have fewer tokens than one block
        flags = ["--calibration_data", str(texts), "--n_samples", str(count), "--block_size", str(block)]
        return [*flags, "--save_activations", str(kept)]


def evaluate_all(workspaces: Sequence[Workspace], candidates: Sequence[Candidate]) -> list[list[Path]]:
    """Evaluate every candidate in every workspace, with one progress bar. Returns: results files, per workspace.

    Raises: CommandFailed.
    """
    from tqdm import tqdm

    todo = [(space, each) for each in candidates for space in workspaces if not space.is_done(each)]
    with tqdm(total=len(todo), unit="model", disable=not todo, dynamic_ncols=True, file=sys.stderr) as bar:
        for space, candidate in todo:
            bar.set_description(candidate.name)
            space.evaluate(candidate)
            bar.update()
    return [[space.results(each) for each in candidates] for space in workspaces]


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    """Run a command in this process. Raises: CommandFailed."""
    code = main(arguments)
    if code:
        raise CommandFailed(code)


def guarded(program: str, body: Callable[[], object]) -> int:
    """Run a script's body; what a user can cause ends in one message. Returns: the exit code."""
    try:
        body()
    except CommandFailed as error:
        print(f"{program}: stopped. What is finished stays; run it again to go on.", file=sys.stderr)
        return error.code
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted. What is finished stays; run it again to go on.", file=sys.stderr)
        return 130
    return 0
