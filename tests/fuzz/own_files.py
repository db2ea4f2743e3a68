"""Mutants of the files that the toolkit writes and reads again: each is used as before, with the same result, or refused in one message.

results      results of evaluate_model.py, and the samples beside them, into compare_models.py
scores       a table of scores, into compare_models.py
recipes      a recipe in YAML, and the merge_recipe.json of a merge, into merge.py --config
activations  a file of --save_activations, into performAIM.py
resumed      results that evaluate_model.py --resume goes on with
records      the merge_recipe.json of a result, which --verify, --overwrite and performAIM.py read
work         an interrupted run's work folder, which the same command goes on with
cache        what is remembered of an architecture, into merge.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

import compare_models
import merge
import performAIM
from checkpoints.errors import LONGEST_MESSAGE
from checkpoints.save_path import partial_folder
from tests.fuzz import change_json, models
from tests.fuzz.trial import LIMIT_BYTES, LIMIT_S, Verdict, limited_memory, open_files, peak_bytes, read, write
from tests.report_files import named, verdicts, write_results

MERGE = ("--method=ties", "--density=0.7", "--quiet", "--workers=1")
RECIPE = """merge_method: ties
base_model: base
models:
- model: one
  parameters: {weight: [0.5, 1.0], density: 0.7}
- model: two
  parameters:
    weight:
    - {filter: mlp, value: 0.25}
    - value: 1.5
parameters: {lambda: 0.9, normalize: true}
exclude: norm|head
out_dtype: float32
tokenizer_source: base
aim:
  omega: 0.4
"""
SCORES = "method,models,aim,omega,gsm8k,math,ifeval\n,one,,,10,20,30\n,two,,,20.5,10,5\nties,one+two,no,,15,16,17\nties,one+two,yes,0.4,18,19,20\n"
TEXT = '{"text": "the fox and the dog"}\n' * 40
Changes = Mapping[str, bytes]


@dataclass(frozen=True)
class OwnMutant:
    """Changes to one of our own files.

    Attributes:
        kind: see the module.
        target: which of the kind's files is changed; modulo their number.
        changes: (how, seed): `edit` JSON, `scratch` bytes, `reencode` them, or `lines` of text.
    """

    kind: str
    target: int
    changes: tuple[tuple[str, int], ...]

    def of(self, content: bytes) -> bytes:
        """The changed file."""
        for how, seed in self.changes:
            rng = random.Random(seed)
            with contextlib.suppress(ValueError, LookupError, TypeError):  # earlier changes left nothing to change
                content = HOW[how](rng, content)
        return content


def _edit(rng: random.Random, content: bytes) -> bytes:
    """JSON, or one line of several that are JSON, with something else in its tree."""
    lines = content.splitlines()
    if len(lines) > 1 and lines[0].startswith(b"{") and lines[0].endswith(b"}"):
        at = rng.randrange(len(lines))
        lines[at] = change_json.edit(rng, lines[at])
        return b"\n".join(lines) + b"\n"
    return change_json.edit(rng, content)


def _lines(rng: random.Random, content: bytes) -> bytes:
    """Text with a word or a line replaced, repeated or left out."""
    text = content.decode(errors="replace")
    between = rng.choice(["\n", ",", ": ", " "])
    parts = text.split(between)
    at = rng.randrange(len(parts))
    odd = str(rng.choice(change_json.ODD)) if rng.random() < 0.9 else str(10**400)
    parts[at : at + 1] = rng.choice(
        [[], [parts[at]] * 2, [odd], [parts[at], odd], [f"[{parts[at]}]"], [f"{{x: {parts[at]}}}"]]
    )
    return between.join(parts).encode(errors="replace")


HOW: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "edit": _edit, "lines": _lines, "scratch": change_json.scratch, "reencode": change_json.reencode,
}  # fmt: skip


@st.composite
def own_mutants(draw: Callable[..., Any], kind: str) -> OwnMutant:
    """Mutants of one kind; one in ten has no change, and must be accepted."""
    ways = (
        ["edit"] * 4 + ["scratch", "reencode", "lines"]
        if kind not in ("recipes", "scores")
        else [*HOW, "lines", "lines", "edit"]
    )
    change = st.tuples(st.sampled_from(ways), st.integers(0, 2**32 - 1))
    count = draw(st.sampled_from([0, 1, 1, 1, 1, 1, 1, 2, 2, 3]))
    return OwnMutant(kind, draw(st.integers(0, 99)), tuple(draw(change) for _ in range(count)))


class OwnPlace:
    """A folder with everything that the kinds start from, made when it is first asked for, and room for one trial at a time."""

    def __init__(self, folder: Path):
        self.folder = folder / "own"
        self.trial = self.folder / "trial"

    def judge(self, mutant: OwnMutant) -> Verdict:
        """Hand a mutant to the command that reads it, and look at what comes of it."""
        with self._inside():
            sound = self._sound[mutant.kind]
            files, run, expected = sound
            target = sorted(files)[mutant.target % len(files)]
            changed = dict(files)
            changed[target] = mutant.of(files[target])
            shutil.rmtree(self.trial, ignore_errors=True)
            for name, content in changed.items():
                path = self.trial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            os.chdir(self.trial)
            before, open_before, started = peak_bytes(), open_files(), time.process_time()
            code, said = self._run(run)
            seconds, grown = time.process_time() - started, max(0, peak_bytes() - before)
            faults = [fault(code, said)]
            if changed == files and code:
                faults.append("a sound file was refused")
            if not code and expected is not None and weights(self.trial) != expected:
                faults.append("another result")
            faults.append(f"{open_files() - open_before} files left open" if open_files() > open_before else "")
            faults.append(f"took {seconds:.1f} s" if seconds > LIMIT_S else "")
            faults.append(f"grew by {grown >> 20} MiB" if grown > 1.25 * LIMIT_BYTES else "")
            kind = "" if not code else f"exit {code}"
            return Verdict(code == 0, kind, said, "; ".join(filter(None, faults)), seconds, grown)

    @contextlib.contextmanager
    def _inside(self):  # type: ignore[no-untyped-def]
        home = Path.cwd()
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.trial / "cache"), "MERGE_AIM_CACHE": ""}):
            try:
                yield
            finally:
                os.chdir(home)

    def _run(self, run: Callable[[], int]) -> tuple[int, str]:
        said = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(said),
                limited_memory(LIMIT_BYTES),
            ):
                return run(), said.getvalue()
        except KeyboardInterrupt:
            raise
        except BaseException:
            return -1, traceback.format_exc()

    @cached_property
    def _sound(self) -> dict[str, tuple[dict[str, bytes], Callable[[], int], Any]]:
        """kind -> files that are mutated, what reads them, and what its weights must be, where it writes any."""
        home = self.folder / "models"
        for name, files in models.family("plain").items():
            write(home / name, files)
        base, one, two = (str(home / name) for name in ("base", "one", "two"))
        (home / "text.jsonl").write_text(TEXT)
        merging = [*MERGE, f"--base_model={base}", f"--models_to_merge={one},{two}", "--save_path=out"]
        relaxing = [
            f"--merged_model={home / 'merged'}",
            f"--pretrained_model_name={base}",
            "--omega=0.4",
            "--quiet",
            "--save_path=out",
        ]
        calibrating = [f"--calibration_data={home / 'text.jsonl'}", "--n_samples=2", "--block_size=8"]
        self._make(merge.main, merging, home / "merged")
        self._make(
            performAIM.main, [*relaxing, *calibrating, f"--save_activations={home / 'statistics'}"], home / "relaxed"
        )
        merged = read(home / "merged")
        self._stop(merging, home / "stopped")
        cache = {
            f"cache/{path.relative_to(self.trial / 'cache')}": path.read_bytes()
            for path in (self.trial / "cache").rglob("*.json")
        }
        recipe = RECIPE.replace("base_model: base", f"base_model: {base}").replace("model: one", f"model: {one}").replace("model: two", f"model: {two}")  # fmt: skip
        config = ["--save_path=out", "--quiet", "--workers=1", f"--activations={home / 'statistics'}"]
        compare = ["--quiet", "--out=t.md", "--overwrite"]

        def read_all_recipes() -> int:
            return merge.main(
                [
                    f"--config={'r.yml' if Path('r.yml').exists() else 'r.json'}",
                    *(config if Path("r.yml").exists() else config[:-1]),
                ]
            )

        def use_record() -> int:
            write_missing(Path("out"), merged)
            codes = [
                merge.main(["--verify=out", "--quiet"]),
                merge.main(
                    [*MERGE, f"--base_model={base}", f"--models_to_merge={one},out", "--save_path=again", "--quiet"]
                ),
            ]
            return next(filter(None, codes), 0)

        kinds: dict[str, tuple[dict[str, bytes], Callable[[], int], Any]] = {
            "results": (
                self._results(home),
                lambda: compare_models.main(["a.json", "b.json", "c.json", *compare]),
                None,
            ),
            "scores": ({"s.csv": SCORES.encode()}, lambda: compare_models.main(["s.csv", *compare]), None),
            "recipes": ({"r.yml": recipe.encode()}, read_all_recipes, None),
            "recipe records": ({"r.json": merged["merge_recipe.json"]}, read_all_recipes, None),
            "activations": (
                {"statistics": (home / "statistics").read_bytes()},
                lambda: performAIM.main([*relaxing, "--activations=statistics"]),
                None,
            ),
            "resumed": ({"a.json": self._results(home)["a.json"]}, resume_results, None),
            "records": ({"out/merge_recipe.json": merged["merge_recipe.json"]}, use_record, None),
            "work": (
                {f"{partial_folder(Path('out'))}/{name}": content for name, content in read(home / "stopped").items()},
                lambda: merge.main(merging),
                weights(home / "merged", ""),
            ),
            "cache": (cache, lambda: merge.main(merging), weights(home / "merged", "")),
        }
        return kinds

    def _make(self, main: Callable[[list[str]], int], argv: list[str], to: Path) -> None:
        self.trial.mkdir(parents=True, exist_ok=True)
        os.chdir(self.trial)
        code, said = self._run(lambda: main(argv))
        assert code == 0, said
        shutil.move(self.trial / "out", to)

    def _stop(self, argv: list[str], to: Path) -> None:
        """What a run leaves that is interrupted when its weights are written."""
        with mock.patch("streaming.job.write_description", side_effect=KeyboardInterrupt):
            code, said = self._run(lambda: merge.main(argv))
        assert code == 130, said
        shutil.move(partial_folder(self.trial / "out"), to)

    def _results(self, home: Path) -> dict[str, bytes]:
        folder = home / "results"
        folder.mkdir(exist_ok=True)
        recipe = json.loads((home / "relaxed" / "merge_recipe.json").read_bytes())
        write_results(folder / "a.json", verdicts(1, 2, 3, 4, 5, 6), named("relaxed", merge_recipe=recipe))
        write_results(folder / "b.json", verdicts(2, 3, 4, 5, 6, 7), named("one"))
        write_results(folder / "c.json", verdicts(3, 4, 5, 6, 7, 8), named("two"))
        return read(folder)


def resume_results() -> int:
    """What evaluate_model.py --resume does with results before a model is loaded."""
    from checkpoints.errors import InputError
    from evaluation.results import check_resumable, read_results
    from tests.report_files import SETTINGS

    try:
        earlier = read_results(Path("a.json"))
        check_resumable(Path("a.json"), earlier, SETTINGS, named("relaxed").get("folder"), {})
    except InputError as error:
        import sys

        print(f"evaluate_model.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write_missing(folder: Path, files: Changes) -> None:
    """Write those files that are not there."""
    for name, content in files.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


def weights(folder: Path, out: str = "out") -> dict[str, bytes]:
    """The weight files of a result."""
    return {path.name: path.read_bytes() for path in (folder / out).glob("*.safetensors")}


def fault(code: int, said: str) -> str:
    """What is wrong with the way a command ended."""
    lines = [line for line in said.splitlines() if not line.startswith(("warning: ", "note: ", "going on: "))]
    if code == -1 or "Traceback" in said:
        return f"traceback: {said}"
    if code == 0:
        return f"said: {said[:300]}" if lines else ""
    if code not in (1, 2):
        return f"exit code {code}: {said[:300]}"
    if not lines or not lines[0].split(":")[0].endswith(".py"):
        return f"no message: {said[:300]!r}"
    if max(map(len, lines)) > LONGEST_MESSAGE + 200 or not all(line.isprintable() for line in lines):
        return f"message: {said[:300]!r}"
    return ""


OWN_KINDS = ("results", "scores", "recipes", "recipe records", "activations", "resumed", "records", "work", "cache")
