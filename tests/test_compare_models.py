"""The command: table on stdout and in a file, figures, what it refuses."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import compare_models
from tests.report_files import PAPER_TABLE, named, verdicts, write_results
from tests.scene import call

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in a new folder, however it ends."""
    monkeypatch.chdir(tmp_path)
    return partial(call, compare_models, code=None)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return [
        write_results(folder / f"{name}.json", verdicts(*[number] * 6), named(name))
        for number, name in enumerate("abc", 3)
    ]


def test_the_paper(run):
    code, out, err = run(PAPER_TABLE, "--population", "hv_population_used", "--out", "table.csv")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head == [
        "method",
        "models",
        "AIM",
        "humaneval",
        "mbpp",
        "mmlu",
        "math",
        "gsm8k",
        "ifeval",
        "HV gain",
        "change %",
    ]
    assert len({len(line) for line in lines[:46]}) == 1, "aligned"
    assert lines[-1] == "table.csv: written"
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    merges = [row for row in rows if row["method"]]
    assert len(merges) == 40
    for row in merges:
        assert f"{float(row['hv_gain']):.2f}" == row["hv_gain_published"]


@pytest.mark.parametrize(
    ("suffix", "begins"), [("md", "| method |"), ("csv", "method,"), ("json", "{"), ("tex", "%"), ("MD", "| ")]
)
def test_formats(run, results, suffix, begins):
    assert run(*results, "--out", f"new/folder/table.{suffix}")[0] == 0
    assert Path(f"new/folder/table.{suffix}").read_text().startswith(begins)
    assert [path.name for path in Path("new/folder").iterdir()] == [f"table.{suffix}"]


def test_results_and_figures(run, results):
    code, out, err = run(*results, "--figures", "figures", "--benchmarks", "gsm8k,math", "--population", "a,b")
    assert (code, err) == (0, "")
    assert out.startswith("| method | models | AIM |  math | gsm8k |")
    assert "figures: 2 files written\n" in out
    assert "HV gain over omega: not drawn" in out
    assert sorted(path.name for path in Path("figures").iterdir()) == ["pareto_math_gsm8k.png", "pareto_math_gsm8k.svg"]


def test_quiet_prints_warnings_only(run, results):
    assert run(*results, "--quiet", "--out", "table.md") == (0, "", "")
    assert Path("table.md").exists()
    write_results(results[0], verdicts(*[4] * 6), named("a"), profile="paper")
    code, out, err = run(*results, "--quiet")
    assert (code, out) == (0, "")
    assert err.startswith("warning: humaneval, mbpp, mmlu, math, gsm8k, ifeval: profile differs: ")
    assert err.count("\n") == 1


def test_a_table_is_replaced_only_when_asked(run, results):
    Path("table.md").write_text("mine")
    code, out, err = run(*results, "--out", "table.md")
    assert (code, out) == (2, "")
    assert err == "compare_models.py: --out table.md: exists. Choose another file, or add --overwrite.\n"
    assert Path("table.md").read_text() == "mine"
    assert run(*results, "--out", "table.md", "--overwrite")[0] == 0
    assert Path("table.md").read_text().startswith("| method")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "the following arguments are required: FILE"),
        (("{a}", "--out", "table.txt"), 2, "--out table.txt: expected a file that ends in .md, .csv, .json, .tex."),
        (("{a}", "--out", "results.json/"), 2, "--out results.json: is a folder. Give a file in it: results.json/table.md."),
        (("{a}", "--out", "{a}", "--overwrite"), 2, "is one of the files that are read. Choose another file."),
        (("{a}", "--population", "x"), 2, "--population: unknown model 'x'. Known: a"),
        (("{a}", "--benchmarks", "gsm"), 2, "--benchmarks: unknown benchmark 'gsm'. Did you mean 'gsm8k'?"),
        (("{a}", "--population", ""), 2, "--population: unknown model ''."),
        (("{a}", "--omega", "1"), 2, "unknown flag '--omega'."),
        (("no.json",), 1, "no.json: cannot be read: No such file or directory."),
        (("results",), 1, "results: is a folder. Give the files in it: results/*.json."),
        (("{a}", "--out", "file/table.md"), 1, "file/table.md: cannot be written: "),
        (("{a}", "--figures", "file"), 2, "--figures file: expected a folder, got a file."),
        (("{a}", "--figures", "file/figures"), 1, "--figures file/figures: cannot be written: "),
    ],
)  # fmt: skip
def test_refusals(run, results, arguments, code, says):
    Path("file").write_text("")
    Path("results.json").mkdir()
    there = sorted(Path().rglob("*"))
    found, out, err = run(*(argument.replace("{a}", str(results[0])) for argument in arguments))
    assert (found, out) == (code, "")
    assert err.startswith("compare_models.py: ")
    assert says in err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == there


def test_everything_wrong_is_said_at_once(run, results):
    code, _, err = run(*results, "no.json", "no.csv", "--out", "x.txt")
    assert code == 1
    assert err.startswith("compare_models.py: 3 problems:\n- --out x.txt: ")
    assert "\n- no.json: " in err
    assert "\n- no.csv: " in err


def test_neither_torch_nor_transformers(results, tmp_path):
    """The whole command, figures included, in a process of its own."""
    program = (
        "import sys, compare_models\n"
        "code = compare_models.main(sys.argv[1:])\n"
        "print(code, sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)), file=sys.stderr)\n"
    )
    arguments = [
        *map(str, results),
        "--figures",
        str(tmp_path / "figures"),
        "--out",
        str(tmp_path / "table.json"),
        "--benchmarks=math,mbpp",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "0 []\n"
    assert json.loads((tmp_path / "table.json").read_text())["benchmarks"] == ["mbpp", "math"]
