"""One merge of a mutant, in this process, and the verdict on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor

import commands.merge as command
import merge
from checkpoints.errors import LONGEST_MESSAGE, MOST_PROBLEMS
from checkpoints.patterns import Pattern
from checkpoints.strangers import STRANGERS
from tests.fuzz import models
from tests.fuzz.models import EMBEDDING, HEAD, Files
from tests.fuzz.mutants import Mutant
from tests.fuzz.reading import check_merge, read_tensors, read_tokens

LIMIT_S = 20.0
"""Seconds of a processor that a mutant may take. Most take a hundredth of one."""
HANG_S = 300.0
"""Seconds by the clock after which a mutant is taken to wait for something that never comes."""
LIMIT_BYTES = 1 << 30
"""Memory that one may allocate beyond what the process has."""
TOKENIZER_FILES = ("tokenizer", "added_tokens", "generation_config")
"""Begins of the names of files that change where tokens are added."""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Verdict:
    """What came of one mutant.

    Attributes:
        accepted: whether it was merged; else it was refused.
        error: type of the error that refused it.
        message: what was said of it.
        fault: what is wrong with that; empty where nothing is.
        seconds, grown_bytes: processor time that it took, and by how much the largest resident memory exceeded that at the start.
    """

    accepted: bool
    error: str
    message: str
    fault: str
    seconds: float
    grown_bytes: int


class Place:
    """A folder with the sound models of every layout, and room for one mutant at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.trial = folder / "trial"
        self._sound: dict[str, dict[Path, os.stat_result]] = {}

    def sound(self, layout: str) -> Path:
        """The folder of a layout's sound models."""
        place = self.folder / layout
        if layout not in self._sound:
            for name, files in models.family(layout).items():
                write(place / name, files)
            self._sound[layout] = {path: path.stat() for path in place.rglob("*")}
        return place

    def forget(self) -> None:
        """Remove all sound models: the next trial writes them again."""
        for layout in self._sound:
            shutil.rmtree(self.folder / layout)
        self._sound.clear()

    def judge(self, mutant: Mutant) -> Verdict:
        """Merge it, and look at what came of it."""
        sound = self.sound(mutant.layout)
        changed = mutant.files()
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir(parents=True)
        for name, files in changed.items():
            write(self.trial / name, files)
        homes = {name: (self.trial if name in changed else sound) / name for name in models.family(mutant.layout)}
        Pattern("fuzz", "")  # the process that runs patterns outlives a merge: its pipes are no leak
        before, open_before = peak_bytes(), open_files()
        started = time.process_time()
        error, message, code = self._run(mutant, homes)
        seconds = time.process_time() - started
        grown = max(0, peak_bytes() - before)
        faults = [code_fault(error, message, code)]
        if code == 0:
            faults.append(self._compare(mutant, changed))
            shutil.rmtree(self.trial / "out", ignore_errors=True)
        elif mutant.is_gentle:
            faults.append("a gentle mutant was refused")
        left = {path.relative_to(self.trial).parts[0] for path in self.trial.rglob("*")} - set(changed)
        faults.append(f"left behind: {', '.join(sorted(left))}" if left else "")
        faults += [f"{name} was changed" for name, files in changed.items() if read(self.trial / name) != files]
        faults += [
            f"{path} was changed"
            for path, status in self._sound[mutant.layout].items()
            if path.stat().st_mtime_ns != status.st_mtime_ns or path.stat().st_size != status.st_size
        ]
        faults.append(f"{open_files() - open_before} files left open" if open_files() > open_before else "")
        faults.append(f"took {seconds:.1f} s" if seconds > LIMIT_S else "")
        faults.append(f"grew by {grown >> 20} MiB" if grown > 1.25 * LIMIT_BYTES else "")
        return Verdict(code == 0, error, message, "; ".join(filter(None, faults)), seconds, grown)

    def _run(self, mutant: Mutant, homes: dict[str, Path]) -> tuple[str, str, int]:
        """(type of the error that was raised, all that was said, exit code)."""
        argv = [
            *mutant.flags, f"--base_model={homes['base']}", f"--models_to_merge={homes['one']},{homes['two']}",
            f"--save_path={self.trial / 'out'}", "--quiet", "--workers=1", "--report=full",
        ]  # fmt: skip
        said = io.StringIO()
        raised: list[str] = []
        run = command.run

        def watched(*arguments: object) -> None:
            try:
                run(*arguments)  # type: ignore[arg-type]
            except BaseException as error:
                raised.append(type(error).__name__)
                raise

        home = Path.cwd()
        os.chdir(self.trial)
        try:
            with (
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
                mock.patch.object(command, "run", watched),
                limited_memory(LIMIT_BYTES),
            ):
                code = merge.main(argv)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return type(error).__name__, traceback.format_exc(), -1
        finally:
            os.chdir(home)
        return (raised or [""])[0], said.getvalue(), code

    def _compare(self, mutant: Mutant, changed: dict[str, Files]) -> str:
        """What is wrong with a merge."""
        family = {name: changed.get(name, files) for name, files in models.family(mutant.layout).items()}
        out = self.trial / "out"
        try:
            weights = {}
            for path in sorted(out.glob("*.safetensors")):
                weights |= safetensors.torch.load_file(path)
            is_larger = check_merge(family, mutant.flags, weights, read(out), is_sound=mutant.is_gentle)
        except AssertionError as error:
            return f"wrong: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"merged, and other libraries cannot read it: {type(error).__name__}: {error}"
        base = family["base"]
        kept = [name for name in SIDE_FILES if name in base and not (is_larger and name.startswith(TOKENIZER_FILES))]
        wrong = [name for name in kept if (out / name).read_bytes() != base[name]]
        for name in {"config.json", "generation_config.json"} & set(wrong):
            expected = changed_config(base, weights) if name == "config.json" else json.loads(base[name])
            if json.loads((out / name).read_bytes()) == with_ends(name, expected, family, read(out)):
                wrong.remove(name)
        return f"not copied: {', '.join(wrong)}" if wrong else ""


def changed_config(base: Files, out: dict[str, Tensor]) -> Any:
    """What a merge's config says, which is the base's but for the rows, a head that is another one than its embedding, and
    numbers that are written as float32."""
    config = json.loads(base["config.json"].decode().replace("float64", "float32"))
    stored = read_tensors(base)
    rows = [len(tensors[EMBEDDING]) if EMBEDDING in tensors else None for tensors in (stored, out)]
    if rows[0] != rows[1]:
        config["vocab_size"] = rows[1]
    is_tied = bool(config.get("tie_word_embeddings")) and EMBEDDING in out and HEAD in out
    if is_tied and not torch.equal(stored[EMBEDDING].double(), stored[HEAD].double()):
        config["tie_word_embeddings"] = False
    return config


def with_ends(name: str, expected: Any, family: dict[str, Files], out: Files) -> Any:
    """What a merge's config or generation config says, given what it says of all else: its text ends at every token that ends a
    model's, and nothing is changed where that is what the base says."""
    base = family["base"]
    tokens = read_tokens(out, is_sound=False)
    said = [(read_tokens(files, is_sound=False), _end_ids(files)) for files in family.values()]
    words = [
        [word for index in ids for word, row in known.items() if row == index]
        for known, ids in said
        if known is not None
    ]
    if tokens is None or not words:
        return expected
    ends = [tokens[word] for word in dict.fromkeys(word for of_model in words for word in of_model) if word in tokens]
    named = "eos_token_id" in json.loads(base[name]) or (
        name == "generation_config.json" and "eos_token_id" not in json.loads(base["config.json"])
    )
    if not named or ends == [tokens.get(word) for word in words[0]]:
        return expected
    return {**expected, "eos_token_id": ends[0] if len(ends) == 1 else ends}


def _end_ids(files: Files) -> list[int]:
    """The ids that a model's generation config names, else its config."""
    for name in ("generation_config.json", "config.json"):
        ids = json.loads(files.get(name, b"{}")).get("eos_token_id")
        if ids is not None:
            return [index for index in (ids if isinstance(ids, list) else [ids]) if type(index) is int]
    return []


def code_fault(error: str, message: str, code: int) -> str:
    """What is wrong with the way a run ended."""
    if code == -1:
        return f"traceback: {message}"
    lines = [line for line in message.splitlines() if not line.startswith(("warning: ", "note: "))]
    if code == 0:
        return f"said: {message[:300]}" if lines else ""
    if code not in (1, 2) or error not in ("InputError", "ArgumentError", "Refusals", "WriteError"):
        return f"exit code {code} by {error}: {message[:300]}"
    problems = re.match(r"merge.py: (\d+) problems:$", lines[0]) if lines else None
    listed = int(problems[1]) if problems else 0
    if listed > MOST_PROBLEMS:  # the first of them, and how many there are besides
        listed = MOST_PROBLEMS + 1
    if not lines or not lines[0].startswith("merge.py: ") or len(lines) != 1 + listed:
        return f"not one message: {message[:300]!r}"
    longest = max(map(len, lines))
    if longest > LONGEST_MESSAGE + 100:
        return f"a line of {longest} characters: {message[:300]!r}"
    return "" if (lines[-1].endswith(".") and message[:-1].isprintable()) or problems else f"message: {message[:300]!r}"


@contextlib.contextmanager
def limited_memory(more_bytes: int):  # type: ignore[no-untyped-def]
    """No more address space than there is in use and this much; Linux tells how much that is."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def peak_bytes() -> int:
    """The largest resident memory of the process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_files() -> int:
    """Files that are open, but for those to the process that reads strangers' texts, which lives as long as this one."""
    return len(os.listdir("/dev/fd")) - STRANGERS.open_files


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
