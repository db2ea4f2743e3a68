"""The examples run: demo, API example, the method of docs/adding-a-method.md. The pages have tests of their own, tests/test_pages.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.results import samples_path
from examples import demo, demo_quick, experiments, merge_api, miniature
from examples.miniature import FAMILY, SINGLES, Candidate, Workspace
from reports import Verdicts

ROOT = Path(__file__).resolve().parent.parent
METHOD_PAGE = (ROOT / "docs/adding-a-method.md").read_text()


def code_blocks(page: str, language: str) -> list[str]:
    """The text of the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python where imports start in `cwd`, and nothing from this checkout is found by chance."""
    environment = os.environ | {"PYTHONPATH": str(cwd), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def top_of_the_tree() -> set[str]:
    """The files and folders at the top that git has; where there is no git, all that are no work of a run."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [path.name for path in ROOT.iterdir()]
    return {name.split("/")[0] for name in names if name and not name.startswith(".")} - {"results", "real"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as an archive has it: no .git, no environment, no caches."""
    target = tmp_path_factory.mktemp("archive")
    for name in top_of_the_tree():  # and nothing else that lies here, such as merges of 26 GB
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target / name)
    return target


# ------------------------------------------------------------------------------------------------------- examples


@pytest.mark.slow
def test_the_quick_demo_in_an_archive(unpacked: Path):
    """As a newcomer runs it: no git, nothing but the files."""
    done = run_python("examples/demo_quick.py", "--items", "3", cwd=unpacked)
    assert done.returncode == 0, done.stderr
    header, *rows = re.findall(r"^(?:model|merged).*$", done.stdout, re.MULTILINE)
    assert header.split() == ["model", "humaneval", "mbpp", "mmlu", "math", "gsm8k", "ifeval"]
    assert [row.split()[0] for row in rows] == ["merged", "merged_AIM"]
    assert all(0 <= float(number) <= 100 for row in rows for number in row.split()[1:])
    assert {len(row.split()) for row in rows} == {7}
    commands = re.findall(r"^\$ python (\S+)", done.stdout, re.MULTILINE)
    assert commands == ["merge.py", "performAIM.py", "evaluate_model.py", "evaluate_model.py"]


@pytest.mark.slow
def test_a_second_quick_demo_begins_anew(unpacked: Path):
    for _ in range(2):
        done = run_python("examples/demo_quick.py", "--items", "1", cwd=unpacked)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "folder"


@pytest.mark.slow
def test_the_demo_prints_the_papers_table(demo_folder: Path, monkeypatch, capsys):
    """With fewer models and items; a second run finds everything done."""
    plain = Candidate("task_arithmetic", ("code", "math"))
    monkeypatch.setattr(demo, "PAPER", (*SINGLES[1::2], plain, plain.with_aim()))
    monkeypatch.setattr(demo, "ITEMS", 4)
    assert demo.main(["--folder", str(demo_folder)]) == 0
    first = capsys.readouterr().out
    assert "4 models, 4 items of each of six benchmarks." in first
    rows = re.findall(r"^\| *task_arithmetic *\| *code\+math *\| *(\w+[ .\d]*?) *\|", first, re.MULTILINE)
    assert [row.split()[0] for row in rows] == ["no", "yes"]
    assert "HV gain" in first
    assert list((demo_folder / "figures").glob("*.png"))
    assert demo.main(["--folder", str(demo_folder)]) == 0
    again = capsys.readouterr().out
    assert "4 are there from an earlier run" in again
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in first.splitlines() if line.startswith("|")
    ]


@pytest.mark.slow
def test_the_demo_scores_as_the_command_does(demo_folder: Path, tmp_path: Path):
    """Every score and every verdict, from a process of its own with the command's own batches."""
    merge = Candidate("task_arithmetic", ("code", "math"))
    space = Workspace(demo_folder, demo.SPLIT, 4)
    mine = space.evaluate(merge)
    theirs = tmp_path / "theirs.json"
    flags = ["--model", str(space.model(merge)), "--data_dir", str(ROOT / "examples/family/data" / demo.SPLIT)]
    flags += ["--limit", "4", "--dtype", "float32", "--n_gpu", "0", "--quiet", "--save_path", str(theirs)]
    done = run_python("evaluate_model.py", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    scores = [
        {k: (v["score"], v["stderr"]) for k, v in json.loads(f.read_text())["benchmarks"].items()}
        for f in (mine, theirs)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 6
    samples = [[json.loads(line) for line in samples_path(file).read_text().splitlines()] for file in (mine, theirs)]
    for sample in samples[0] + samples[1]:
        sample.get("checks", {}).pop("seconds", None)
    assert samples[0] == samples[1]
    assert len(samples[0]) == 24


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PAPER", SINGLES[:1])
    monkeypatch.setattr(demo, "ITEMS", 1)
    evaluate = miniature.evaluate_model.main

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(miniature.evaluate_model, "main", interrupted)
    assert demo.main(["--folder", str(tmp_path / "d")]) == 130
    assert "run it again to go on" in capsys.readouterr().err
    monkeypatch.setattr(miniature.evaluate_model, "main", lambda arguments: 1)
    assert demo.main(["--folder", str(tmp_path / "d")]) == 1
    monkeypatch.setattr(miniature.evaluate_model, "main", evaluate)
    assert demo.main(["--folder", str(tmp_path / "d")]) == 0


@pytest.mark.parametrize("program", [demo, demo_quick])
def test_demos_overwrite_only_their_own_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], program):
    (tmp_path / "thesis.txt").write_text("years of work")
    with contextlib.suppress(SystemExit):
        assert program.main(["--folder", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_papers_experiment_has_every_merge_twice():
    names = [each.name for each in miniature.PAPER]
    assert len(names) == len(set(names)) == 44
    assert len({each.name for each in experiments.candidates()}) == len(experiments.candidates())


def test_the_experiments_tables_and_figures(tmp_path: Path, monkeypatch, capsys):
    """On made-up verdicts, all different; what the numbers are is reports' affair."""
    rng = np.random.default_rng(0)
    names = ("humaneval", "gsm8k")
    made = {each: {n: Verdicts.of(rng.random(20) < 0.5) for n in names} for each in experiments.candidates()}
    monkeypatch.setattr(experiments, "evaluate_all", lambda spaces, every: [list(every)] * len(spaces))
    monkeypatch.setattr(experiments, "read_results", lambda each: each)
    monkeypatch.setattr(experiments, "pool", lambda entries: made[entries[0]])
    assert experiments.main(["--folder", str(tmp_path / "e"), "--out", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| task_arithmetic") == 3
    assert printed.count("texts |") == 1 + len(experiments.TEXTS)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "tables.md", *(f"experiments_{n}.{s}" for n in ("omega", "lambda", "controls") for s in ("png", "svg")),
    }  # fmt: skip


def test_api_example_goes_half_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, model, out = FAMILY / "models/base", FAMILY / "models/code", tmp_path / "halfway"
    assert merge_api.main([str(base), str(model), "--save_path", str(out)]) == 0
    assert re.search(r"\|merged - base\| / \|base\| = 0\.0\d+$", capsys.readouterr().out)
    start, end, half = (load_file(folder / "model.safetensors") for folder in (base, model, out))
    assert half.keys() == start.keys()
    for name, tensor in half.items():
        middle = (start[name].float() + 0.5 * (end[name].float() - start[name].float())).bfloat16()
        assert torch.equal(tensor, middle), name


def test_api_example_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = str(tmp_path / "nowhere")
    assert merge_api.main([missing, missing, "--save_path", str(tmp_path / "out")]) == 1
    assert f"{missing}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_the_files_that_a_page_names_are_there(page: str):
    """By their path from the root, or by their name alone after a file of the same folder."""
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?<![\w./-])((?:[\w-]+/)+[\w.-]+\.\w+)", text))
    assert len(named) >= 2
    assert sorted(name for name in named if not (ROOT / name).exists() and not name.startswith("OUT")) == []


# ----------------------------------------------------------------------------------------- docs/adding-a-method.md


@pytest.mark.slow
def test_the_method_of_the_page_works(unpacked: Path, tmp_path: Path):
    """Do what the page says in a copy of the tree, and run what it says to run, and the tests of all methods on it."""
    copy = tmp_path / "toolkit"
    shutil.copytree(unpacked, copy, ignore=shutil.ignore_patterns("demo", "goldens"))
    shutil.copytree(unpacked / "tests/goldens/inputs", copy / "tests/goldens/inputs")
    added = set()
    for block in code_blocks(METHOD_PAGE, "python"):
        first, _, rest = block.partition("\n")
        assert first.startswith("# "), first
        path = copy / first.removeprefix("# ")
        assert not path.exists()
        path.write_text(rest)
        added.add(first.removeprefix("# "))
    assert added == {"merging/methods/equal_norm.py", "tests/test_method_equal_norm.py"}
    page = copy / "docs/methods.md"
    row, card = code_blocks(METHOD_PAGE, "markdown")
    page.write_text(
        re.sub(r"^(\| \[della\]\(#della\))", rf"{row.rstrip()}\n\1", page.read_text(), flags=re.MULTILINE) + "\n" + card
    )
    of_all = (
        "blocks_and_workers_change_no_byte",
        "no_read_and_no_combine_exceeds_the_block",
        "single_model_is_itself",
        "wrong_reference",
    )
    done = run_python(
        *("-m", "pytest", "-p", "no:cacheprovider", "tests/test_method_equal_norm.py", "tests/test_methods.py"),
        *("tests/test_engine.py", "-k", f"test_method or (equal_norm and ({' or '.join(of_all)}))"),
        cwd=copy,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "equal_norm" in run_python("merge.py", "--help", cwd=copy).stdout


@pytest.mark.slow
def test_the_method_of_the_page_works_outside_of_the_tree(tmp_path: Path):
    """The same file in a folder of one's own: flags, help, a recipe that is trusted and one that is not."""
    block = next(one for one in code_blocks(METHOD_PAGE, "python") if "class EqualNorm" in one)
    (tmp_path / "mine.py").write_text(block)
    inputs = ROOT / "tests/goldens/inputs"
    name = "mine:EqualNorm"
    what = ("--base_model", str(inputs / "base"), "--models_to_merge", f"{inputs}/math,{inputs}/code", "--quiet")

    def merge(*flags: str) -> subprocess.CompletedProcess[str]:
        return run_python(str(ROOT / "merge.py"), *flags, cwd=tmp_path)

    done = merge("--method", name, *what, "--share", "0.5", "--weights", "1,2", "--save_path", "out")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out/merge_recipe.json").read_text())
    assert (made["merge_method"], made["parameters"]) == (name, {"lambda": 1.0, "share": 0.5})
    assert "how far" in merge("--method", name, "--help").stdout
    done = merge("--method", name, *what, "--share", "1.5", "--save_path", "no")
    assert (done.returncode, done.stderr) == (2, "merge.py: --share: expected a number in [0, 1], got 1.5.\n")
    done = merge("--config", "out/merge_recipe.json", "--save_path", "again", "--quiet")
    assert done.returncode == 2
    assert "mine:EqualNorm, Python code that is not part of this program" in done.stderr
    assert "add --trust_remote_code" in done.stderr
    done = merge("--config", "out/merge_recipe.json", "--save_path", "again", "--quiet", "--trust_remote_code")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
