"""The table: the paper's numbers, populations, changes, formats."""

import csv
import io
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from checkpoints.errors import ArgumentError, InputError, Refusals
from reports import compare, hv_gain, load_results
from reports.entries import PAPER
from reports.formats import to_latex
from tests.report_files import PAPER_TABLE, exact_gain

ROWS = list(csv.DictReader(PAPER_TABLE.read_text().splitlines()))
SINGLES = {row["models"]: [Fraction(row[name]) / 100 for name in PAPER] for row in ROWS if not row["method"]}
MERGES = [row for row in ROWS if row["method"]]
HEAD = "method,models,aim,humaneval,mbpp,mmlu,math,gsm8k,ifeval"


def exact(row, column):
    """A row's gain over the models that a column names."""
    return exact_gain([SINGLES[name] for name in row[column].split("+")], [Fraction(row[name]) / 100 for name in PAPER])


@pytest.fixture(scope="module")
def published():
    return compare(load_results([PAPER_TABLE]), "hv_population_used")


@pytest.fixture(scope="module")
def corrected():
    return compare(load_results([PAPER_TABLE]))


def write(tmp_path, *lines, head=HEAD):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def merges(table):
    return {(row.method, row.models, row.aim): row for row in table.rows if row.method}


# ------------------------------------------------------------------------------------------------------ the paper


def test_all_published_gains(published):
    """40 gains, to the two digits that the paper prints."""
    found = [(row.hv_gain.value, row.entry.columns["hv_gain_published"]) for row in published.rows if row.method]
    assert len(found) == 40
    assert [f"{gain:.2f}" for gain, _ in found] == [printed for _, printed in found]


def test_all_published_changes(published):
    """20 changes, against exact arithmetic on the published scores."""
    changes = {}
    for row in MERGES:
        changes.setdefault((row["method"], row["models"]), {})[row["aim"]] = exact(row, "hv_population_used")
    assert len(changes) == 20
    for (method, models), gains in changes.items():
        expected = 100 * (gains["yes"] / gains["no"] - 1) if gains["no"] else math.inf
        found = merges(published)[method, models, "yes"].hv_gain_change_percent
        assert f"{found:.2f}" == f"{expected:.2f}", (method, models)
    assert [key for key, gains in changes.items() if not gains["no"]] == [("ties", "code+instruct")]
    printed = [f"{row.hv_gain_change_percent:.2f}" for row in published.rows if row.aim == "yes"]
    assert printed == [
        "2.49", "-1.65", "40.71", "40.59", "1.63", "4.00", "31.22", "41.28", "0.61", "-2.65", "34.52", "31.97", "inf", "13.55",
        "6.38", "4.33", "-0.93", "-1.22", "2.54", "4.70",
    ]  # fmt: skip


def test_with_the_models_that_were_merged(corrected, published):
    """The corrected column: two of the paper's populations are not those that its rows name."""
    for row in MERGES:
        found = merges(corrected)[row["method"], row["models"], row["aim"]]
        assert found.hv_gain.value == pytest.approx(exact(row, "models"), abs=1e-9)
        assert found.population == tuple(row["models"].split("+"))
    assert f"{merges(corrected)['dare_linear', 'code+instruct', 'no'].hv_gain.value:.3f}" == "0.215"
    assert f"{merges(published)['dare_linear', 'code+instruct', 'no'].hv_gain.value:.2f}" == "0.27"
    same = {key for key, row in merges(corrected).items() if row.hv_gain == merges(published)[key].hv_gain}
    never = ("ties", "code+instruct", "no")  # adds nothing to either population
    assert {models for _, models, _ in same - {never}} == {"code+math", "code+instruct+math"}


def test_a_csv_marks_nothing(published):
    assert "~" not in published.to_markdown()
    assert "No standard errors are known, so that nothing can be marked" in published.to_markdown()


# ------------------------------------------------------------------------------------------------ hypervolume gain


def test_gain_by_hand():
    # The population covers [0, 1/2] x [0, 1/4]; the model adds [0, 1/4] x [1/4, 1/2]: 1/16, whose root is 1/4.
    assert hv_gain([[0.5, 0.25]], [0.25, 0.5]) == 0.25
    assert hv_gain([[0.5]], [0.75]) == 0.25
    assert hv_gain([[0.5, 0.25], [0.25, 0.125]], [0.5, 0.5]) == math.sqrt(0.125)


def test_gain_of_a_dominated_model_is_exactly_0():
    """Rounding leaves 1e-17 between two equal volumes, of which the sixth root is 0.0015."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        population = draw.uniform(0.5, 1, (3, 6))
        assert hv_gain(population, population[1]) == 0
        assert hv_gain(population, population[2] * 0.999) == 0


def test_gains_of_random_models_are_exact():
    draw = np.random.default_rng(1)
    for _ in range(30):
        scores = [[Fraction(int(part), 64) for part in one] for one in draw.integers(1, 65, (4, 6))]
        found = hv_gain([[float(part) for part in one] for one in scores[1:]], [float(part) for part in scores[0]])
        assert found == pytest.approx(exact_gain(scores[1:], scores[0]), abs=1e-3)
        assert found**6 == pytest.approx(exact_gain(scores[1:], scores[0]) ** 6, abs=1e-14)


@pytest.mark.parametrize(
    ("population", "model"), [([[50.0, 1]], [1, 1]), ([[0.5]], [0.5, 0.5]), ([], [0.5]), ([[0.5]], [math.nan])]
)
def test_gain_refuses(population, model):
    with pytest.raises(ValueError, match="expected"):
        hv_gain(population, model)


# ---------------------------------------------------------------------------------------------------- populations


def test_population_by_name_even_where_a_column_has_that_name(published):
    table = compare(load_results([PAPER_TABLE]), "math, code")
    for row in table.rows:
        if row.method:
            assert row.population == ("math", "code")
    row = merges(table)["widen", "instruct+math", "yes"]
    source = next(
        one for one in MERGES if (one["method"], one["models"], one["aim"]) == ("widen", "instruct+math", "yes")
    )
    assert row.hv_gain.value == pytest.approx(exact({**source, "models": "code+math"}, "models"), abs=1e-9)
    assert "P: math, code." in table.to_markdown()


@pytest.mark.parametrize(
    ("population", "says"),
    [
        ("cod", "population: unknown model 'cod'. Did you mean 'code'?"),
        ("code,hv_population_used", "unknown model 'hv_population_used'"),
        ("hv_gain", "unknown model 'hv_gain'. Known: base"),
        ("gsm8k", "unknown model 'gsm8k'"),
    ],
)
def test_unknown_population(population, says):
    with pytest.raises(ArgumentError) as refused:
        compare(load_results([PAPER_TABLE]), population)
    assert says in str(refused.value)


def test_population_column_with_an_unknown_model(tmp_path):
    path = write(tmp_path, ",a,,1,2,3,4,5,60,", "ties,a,no,9,9,9,9,9,9,b", head=f"{HEAD},p")
    with pytest.raises(InputError, match=re.escape("line 3: p: unknown model 'b'. Known: a")):
        compare(load_results([path]), "p")


def test_merge_without_its_models_has_no_gain(tmp_path):
    table = compare(load_results([write(tmp_path, ",a,,1,2,3,4,5,60", "ties,a+b,no,9,9,9,9,9,9")]))
    assert table.rows[1].hv_gain is None
    assert any(
        "ties a+b: no HV gain: there are no results of b. Give them, or name others as the population" in n
        for n in table.notes
    )


def test_populations_of_a_pair_that_differ_give_no_change(tmp_path):
    lines = (",a,,1,2,3,4,5,60,", ",b,,60,2,3,4,5,6,", "ties,a+b,no,9,9,9,9,9,9,a", "ties,a+b,yes,9,9,9,9,9,10,b")
    table = compare(load_results([write(tmp_path, *lines, head=f"{HEAD},p")]), "p")
    assert table.rows[3].hv_gain is not None
    assert table.rows[3].hv_gain_change_percent is None
    assert any("is measured against other models" in note for note in table.notes)


# --------------------------------------------------------------------------------------------------------- changes


def test_change_from_nothing(tmp_path):
    """From 0 to more it is infinite, from 0 to 0 there is none."""
    lines = (",a,,50,50,50,50,50,50", "ties,a,no,9,9,9,9,9,9", "ties,a,yes,60,60,60,60,60,60")
    lines += ("widen,a,no,9,9,9,9,9,9", "widen,a,yes,50,50,50,50,50,50")
    table = compare(load_results([write(tmp_path, *lines)]))
    assert [row.hv_gain_change_percent for row in table.rows] == [None, None, math.inf, None, None]
    assert table.rows[4].hv_gain_change.value == 0
    assert "|      inf |" in table.to_markdown()
    assert json.loads(table.to_json())["rows"][2]["hv_gain_change_percent"] is None
    assert list(csv.DictReader(io.StringIO(table.to_csv())))[2]["hv_gain_change_percent"] == "inf"


def test_aim_without_its_plain_merge(tmp_path):
    table = compare(load_results([write(tmp_path, ",a,,5,5,5,5,5,5", "ties,a,yes,9,9,9,9,9,9")]))
    assert table.rows[1].hv_gain_change is None
    assert any("ties a AIM: no results of the same merge without AIM" in note for note in table.notes)


def test_rows_of_a_merge_stand_together(tmp_path):
    lines = (
        "ties,a,permuted,1,1,1,1,1,1,0.4",
        "widen,a,no,1,1,1,1,1,1,",
        "ties,a,yes,1,1,1,1,1,1,0.4",
        "ties,a,yes,1,1,1,1,1,1,0.2",
    )
    lines += (",a,,2,1,1,1,1,1,", "ties,a,uniform,1,1,1,1,1,1,0.4", "ties,a,no,1,1,1,1,1,1,")
    table = compare(load_results([write(tmp_path, *lines, head=f"{HEAD},omega")]))
    assert [(row.method, row.aim, row.omega) for row in table.rows] == [
        ("", "", ""), ("ties", "no", ""), ("ties", "yes", "0.2"), ("ties", "yes", "0.4"), ("ties", "uniform", "0.4"),
        ("ties", "permuted", "0.4"), ("widen", "no", ""),
    ]  # fmt: skip
    cells = [line.split("|")[3].strip() for line in table.to_markdown().splitlines()[2:9]]
    assert cells == [
        "",
        "no",
        "yes, omega 0.2",
        "yes, omega 0.4",
        "uniform control, omega 0.4",
        "permuted control, omega 0.4",
        "no",
    ]


# --------------------------------------------------------------------------------------------------------- formats


def test_markdown(tmp_path):
    lines = (",a|b,,50,25,,,,", "ties,a|b,no,25,50,,,,", "ties,a|b,yes,25,62.5,,,,")
    table = compare(load_results([write(tmp_path, *lines)]))
    # Gains: 1/4 * 1/4 = 1/16, root 0.25; 1/4 * 3/8 = 3/32, root 0.306; change 22.47 %.
    assert table.to_markdown() == (
        "| method | models | AIM | humaneval |  mbpp | HV gain | change % |\n"
        "| ------ | ------ | --- | --------: | ----: | ------: | -------: |\n"
        "|        | a\\|b   |     |     50.00 | 25.00 |         |          |\n"
        "| ties   | a\\|b   | no  |     25.00 | 50.00 |    0.25 |          |\n"
        "| ties   | a\\|b   | yes |     25.00 | 62.50 |    0.31 |    22.47 |\n"
        "\n"
        "- Scores in percent.\n"
        "- HV gain: (HV(P and the merge) - HV(P))^(1/2) of fractions, reference point 0, P: the models that were merged, "
        "2 benchmarks, so not the paper's scale.\n"
        "- change %: of HV gain, against the same merge without AIM; inf from a gain of 0.\n"
        "- No standard errors are known, so that nothing can be marked as too small to tell from chance.\n"
    )


def test_csv(published):
    rows = list(csv.DictReader(io.StringIO(published.to_csv())))
    assert list(rows[0])[:13] == [*ROWS[0], "hv_gain", "hv_gain_change_percent"]
    assert len(rows) == 44
    for row, given in zip(rows, ROWS, strict=True):
        assert {name: float(row[name]) for name in PAPER} == {name: float(given[name]) for name in PAPER}
        assert all(row[name] == given[name] for name in given if name not in PAPER)
        if given["method"]:
            assert float(row["hv_gain"]) == pytest.approx(exact(given, "hv_population_used"), abs=1e-9)
            assert row["hv_population"] == given["hv_population_used"]


def test_csv_can_be_read_again(published, tmp_path):
    path = tmp_path / "again.csv"
    published.write(path)
    assert compare(load_results([path]), "hv_population_used").to_csv() == path.read_text()


def test_json(published):
    content = json.loads(published.to_json())
    assert content["benchmarks"] == list(PAPER)
    row = content["rows"][5]
    assert (row["method"], row["models"], row["aim"]) == ("dare_linear", "code+instruct", "yes")
    assert row["humaneval"] == 0.2927
    assert row["hv_gain"] == published.rows[5].hv_gain.value
    assert row["hv_gain_change_percent"] == published.rows[5].hv_gain_change_percent
    assert content["rows"][0]["hv_gain"] is None
    assert content["notes"] == list(published.notes)


def test_latex(published):
    lines = to_latex(published).splitlines()
    assert lines[1] == r"\begin{tabular}{lllrrrrrrrr}"
    assert (
        lines[3] == r"method & models & AIM & humaneval & mbpp & mmlu & math & gsm8k & ifeval & HV gain & change \% \\"
    )
    assert (
        lines[10]
        == r"dare\_linear & code+instruct & yes & 29.27 & 36.00 & 54.18 & 8.30 & 46.20 & 32.00 & 0.28 & 2.49 \\"
    )
    assert r"\end{tabular}" in lines
    after = lines[lines.index(r"\end{tabular}") + 1 :]
    assert after
    assert all(line.startswith("% ") for line in after)


# ---------------------------------------------------------------------------------------------- what a CSV may hold


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((), "expected a row for each model, got none"),
        ((",a,,1,2,3,4,5",), "line 2: expected 9 values as in the first line"),
        ((",a,,1,2,3,4,5,6,7",), "line 2: expected 9 values as in the first line"),
        ((",,,1,2,3,4,5,6",), "line 2: expected a model's name in 'models'"),
        ((",a,,1,2,3,4,x,6",), "line 2: gsm8k: expected a score in percent, from 0 to 100, got 'x'"),
        ((",a,,1,2,3,4,101,6",), "got '101'"),
        ((",a,,1,2,3,4,-1,6",), "got '-1'"),
        ((",a,,1,2,3,4,nan,6",), "got 'nan'"),
        ((",a,yes,1,2,3,4,5,6",), "line 2: expected nothing in 'aim' of a single model, got 'yes'"),
        (("ties,a,maybe,1,2,3,4,5,6",), "line 2: expected yes, no, uniform, permuted, random or without_top in 'aim', got 'maybe'"),
        (("ties,a,,1,2,3,4,5,6",), "expected yes, no, uniform, permuted, random or without_top in 'aim', got ''"),
        ((",a,,.1,.2,.3,.4,.5,.6",), "expected scores in percent, got none above 1. Multiply fractions by 100."),
        ((",a,,1,2,3,4,5,6", ",a,,1,2,3,4,5,7"), "are results of the same model"),
        (("ties,a+b,no,1,2,3,4,5,6", "ties,b+a,no,1,2,3,4,5,7"), "are results of the same model"),
        ((",a,,1,2,3,4,5,6", ",b,,1,2,3,4,5,"), "line 3: expected scores of humaneval, mbpp, mmlu, math, gsm8k, ifeval, got none of ifeval"),
    ],
)  # fmt: skip
def test_csv_that_is_refused(tmp_path, lines, says):
    with pytest.raises(InputError) as refused:
        compare(load_results([write(tmp_path, *lines)]))
    assert says in str(refused.value)
    assert refused.value.exit_code == 1


@pytest.mark.parametrize("head", ["a;b;c", "method,models,humaneval", "method,models,aim", f"{HEAD},math", ""])
def test_csv_without_its_columns(tmp_path, head):
    with pytest.raises(InputError, match="expected columns method, models, aim and benchmarks"):
        load_results([write(tmp_path, head=head)])


def test_every_wrong_row_is_named(tmp_path):
    with pytest.raises(Refusals) as refused:
        load_results([write(tmp_path, ",a,,1,2,3,4,5,x", ",b,,1,2,3,4,5,y")])
    assert "line 2: ifeval" in str(refused.value)
    assert "line 3: ifeval" in str(refused.value)


def test_benchmarks_chosen(tmp_path):
    entries = load_results([write(tmp_path, ",a,,50,25,3,4,5,6", ",b,,1,2,3,4,5,", "ties,a,no,25,50,9,9,9,9")])
    table = compare(entries, benchmarks=["mbpp", "humaneval"])
    assert table.benchmarks == ("humaneval", "mbpp")
    assert table.rows[2].hv_gain.value == 0.25
    with pytest.raises(Refusals, match="leave them out of the table: benchmarks humaneval,mbpp,mmlu,math,gsm8k"):
        compare(entries)
    with pytest.raises(ArgumentError, match=r"unknown benchmark 'humanevil'\. Did you mean 'humaneval'"):
        compare(entries, benchmarks=["humanevil"])
    with pytest.raises(InputError, match="expected results of at least one model"):
        compare([])
