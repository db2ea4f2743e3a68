"""Figures: which are drawn, that they are the same each time, and what the front is."""

import re
import struct

import numpy as np
import pytest

from checkpoints.errors import InputError
from reports import compare, draw, load_results
from reports.figures import on_front
from tests.report_files import PAPER_TABLE, named, verdicts, write_results

HEAD = "method,models,aim,humaneval,mbpp,mmlu,math,gsm8k,ifeval,omega"
SWEEP = (
    ",a,,50,20,30,40,50,60,", ",b,,20,50,30,40,50,60,", "ties,a+b,no,40,40,30,40,50,60,", "ties,a+b,yes,45,40,30,40,50,60,0.2",
    "ties,a+b,yes,45,48,30,40,50,60,0.4", "ties,a+b,uniform,44,40,30,40,50,60,0.4", "widen,a+b,no,41,40,30,40,50,60,",
)  # fmt: skip
BENCHMARKS = ("humaneval", "mbpp", "gsm8k")
pytestmark = pytest.mark.command  # a library that draws is as slow as a command
PAIRS = 3


def table_of(tmp_path, *lines):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    return compare(load_results([path]), benchmarks=BENCHMARKS)


def stems(figures):
    return [path.stem for path in figures.paths if path.suffix == ".png"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Figures of a sweep, and the folder that was made for them."""
    folder = tmp_path_factory.mktemp("sweep")
    return draw(table_of(folder, *SWEEP), folder / "new" / "figures"), folder / "new" / "figures"


def test_all_figures_of_a_sweep(sweep):
    figures, folder = sweep
    drawn = stems(figures)
    assert drawn[:3] == ["hv_gain_over_omega", "change_by_benchmark_omega_0.2", "change_by_benchmark_omega_0.4"]
    assert len([name for name in drawn if name.startswith("pareto_")]) == PAIRS
    assert "pareto_humaneval_mbpp" in drawn
    assert figures.missing == []
    assert sorted(figures.paths) == sorted(folder.iterdir())
    assert {path.suffix for path in figures.paths} == {".png", ".svg"}
    for path in figures.paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", content[16:24])
            assert 300 < width < 4000
            assert 300 < height < 4000
        else:
            assert b"<dc:date>" not in content


def text_of(path):
    """The texts of an SVG, from the comments that matplotlib writes beside its glyphs."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_what_the_figures_say(sweep):
    _, folder = sweep
    texts = text_of(folder / "hv_gain_over_omega.svg")
    for text in (
        "a+b",
        "ties",
        "ties uniform control",
        "HV gain over omega, no intervals: no standard errors are known",
    ):
        assert text in texts
    assert "widen" not in texts, "it has no omega"
    texts = text_of(folder / "pareto_humaneval_mbpp.svg")
    for text in ("1 b", "3 a", "2", "on the front:", "ties a+b AIM omega 0.4", "humaneval (%)"):
        assert text in texts
    assert "ties a+b AIM omega 0.2" not in texts
    assert "Change by AIM (omega 0.4): score with minus without, no intervals: no standard errors are known" in text_of(
        folder / "change_by_benchmark_omega_0.4.svg"
    )


def test_the_same_bytes_each_time(sweep, tmp_path):
    first, second = sweep[0], draw(table_of(tmp_path, *SWEEP), tmp_path / "figures")
    assert len(first.paths) == 2 * (PAIRS + 3)
    for one, two in zip(first.paths, second.paths, strict=True):
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes(), one.name


def test_the_paper(tmp_path):
    figures = draw(compare(load_results([PAPER_TABLE]), "hv_population_used", BENCHMARKS), tmp_path)
    assert stems(figures)[0] == "change_by_benchmark"
    assert len(stems(figures)) == 1 + PAIRS
    assert figures.missing == ["HV gain over omega: not drawn, no merge has HV gains at two values of omega."]


def test_nothing_to_draw(tmp_path):
    figures = draw(
        compare(load_results([write_results(tmp_path / "a.json", verdicts(*[4] * 6), named("a"))])),
        tmp_path / "figures",
    )
    assert figures.paths == []
    assert [line.partition(":")[0] for line in figures.missing] == [
        "HV gain over omega",
        "change by benchmark",
        "Pareto fronts",
    ]
    assert list((tmp_path / "figures").iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"figures .*file: cannot be written: .*\. Choose another folder\."):
        draw(table_of(tmp_path, *SWEEP), tmp_path / "file")


def test_front():
    points = np.array([[1, 5], [2, 4], [2, 4], [2, 3], [3, 1], [0, 5], [3, 0]])
    assert on_front(points).tolist() == [True, True, True, False, True, False, False]
