"""Results files: what recipes say of them, which belong together, what may be compared, and how sure it is."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import merge
import performAIM
from checkpoints.errors import InputError, Refusals
from reports import compare, load_results
from reports.results_files import read_samples
from tests.aim_runs import write_texts
from tests.report_files import digests, named, verdicts, write_results
from tests.scene import call, names

INPUTS = Path(__file__).parent / "goldens" / "inputs"


class Checkpoints:
    """Real merges of the goldens' inputs, and results of them with scores of our own."""

    def __init__(self, folder):
        self.folder = folder
        self.activations = folder / "activations.safetensors"
        for name in ("base", "math", "code"):
            shutil.copytree(INPUTS / name, folder / name)

    def merge(self, out, *flags, models="code,math", method="task_arithmetic"):
        paths = names([self.folder / name for name in models.split(",")])
        inputs = ["--method", method, "--base_model", self.folder / "base", "--models_to_merge", paths]
        call(merge, *inputs, "--save_path", self.folder / out, "--quiet", "--report=none", *self.statistics(flags))

    def relax(self, merged, out, *flags):
        inputs = ["--merged_model", self.folder / merged, "--pretrained_model_name", self.folder / "base"]
        call(performAIM, *inputs, "--save_path", self.folder / out, "--quiet", *self.statistics(flags, always=True))

    def statistics(self, flags, *, always=False):
        if not always and not any(flag.startswith("--omega") for flag in flags):
            return flags
        if self.activations.exists():
            return (*flags, "--activations", str(self.activations))
        texts = ("--calibration_data", str(write_texts(self.folder)), "--n_samples", "4", "--block_size", "96")
        return (*flags, *texts, "--save_activations", str(self.activations))

    def results(self, folder, *models, **keywords):
        """Results files of checkpoints, each with other scores; `x.json` of `x`, `a-b.json` of `a/b`."""
        folder.mkdir(exist_ok=True)
        paths = []
        for number, name in enumerate(models):
            right = verdicts(*((number + shift) % 7 + 1 for shift in range(6)))
            path = folder / f"{name.replace('/', '-')}.json"
            paths.append(write_results(path, right, digests(self.folder / name), **keywords))
        return paths


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    made.merge("plain")
    made.merge("half", "--lambda", "0.5")
    made.merge("one_run", "--omega", "0.4")
    made.relax("plain", "two_runs", "--omega", "0.4")
    made.relax("plain", "sweep", "--omegas", "0,0.4")
    made.relax("plain", "uniform", "--control", "uniform")
    made.relax("plain", "permuted", "--control", "permuted", "--seed", "3")
    return made


def rows(table):
    return [(row.method, row.models, row.aim, row.omega, row.aim_settings) for row in table.rows]


def plain_of(table):
    return next(row for row in table.rows if row.aim == "no")


# ------------------------------------------------------------------------------------------- what belongs together


def test_aim_in_two_runs_with_its_controls(checkpoints, tmp_path):
    """performAIM.py on a merge: method and models come from the merge's own recipe."""
    names = ("permuted", "sweep/omega_0", "math", "plain", "uniform", "sweep/omega_0.4", "code", "base")
    table = compare(load_results(checkpoints.results(tmp_path / "r", *names)))
    assert rows(table) == [
        ("", "math", "", "", ""),
        ("", "code", "", "", ""),
        ("", "base", "", "", ""),
        ("task_arithmetic", "code+math", "no", "", ""),
        ("task_arithmetic", "code+math", "yes", "0", ""),
        ("task_arithmetic", "code+math", "yes", "0.4", ""),
        ("task_arithmetic", "code+math", "uniform", "0.4", ""),
        ("task_arithmetic", "code+math", "permuted", "0.4", ""),
    ]
    plain = plain_of(table)
    for row in table.rows[4:]:
        assert row.population == ("code", "math")
        assert row.hv_gain_change.value == row.hv_gain.value - plain.hv_gain.value
        assert row.hv_gain_change_percent == 100 * (row.hv_gain.value - plain.hv_gain.value) / plain.hv_gain.value
        for name, change in row.score_changes.items():
            assert change.value == row.entry.scores[name].value - plain.entry.scores[name].value


def test_aim_in_one_run(checkpoints, tmp_path):
    """merge.py --omega: the merge without AIM is the one with the same recipe."""
    table = compare(load_results(checkpoints.results(tmp_path / "r", "code", "math", "plain", "half", "one_run")))
    assert rows(table)[2:] == [
        ("task_arithmetic (lambda 1)", "code+math", "no", "", ""),
        ("task_arithmetic (lambda 1)", "code+math", "yes", "0.4", ""),
        ("task_arithmetic (lambda 0.5)", "code+math", "no", "", ""),
    ]
    row = table.rows[3]
    assert row.hv_gain_change.value == row.hv_gain.value - table.rows[2].hv_gain.value
    table = compare(load_results(checkpoints.results(tmp_path / "s", "code", "math", "half", "one_run")))
    assert table.rows[-1].aim == "yes"
    assert table.rows[-1].hv_gain_change is None, "another lambda is another merge"


def test_one_run_and_two_are_two_rows(checkpoints, tmp_path):
    table = compare(load_results(checkpoints.results(tmp_path / "r", "code", "math", "plain", "one_run", "two_runs")))
    assert [row.aim_settings for row in table.rows[3:]] == ["made by merge.py", "made by performAIM.py"]
    assert "yes, made by merge.py" in table.to_markdown()


def test_models_are_known_by_their_weights(checkpoints, tmp_path):
    """Wherever they are now and whatever they are called."""
    for name in ("code", "math"):
        shutil.copytree(checkpoints.folder / name, tmp_path / f"moved_{name}")
    paths = checkpoints.results(tmp_path / "r", "plain")
    for number, name in enumerate(("moved_math", "moved_code")):
        paths.append(write_results(tmp_path / f"{name}.json", verdicts(*[5 + number] * 6), digests(tmp_path / name)))
    assert compare(load_results(paths)).rows[2].hv_gain is not None
    assert compare(load_results(paths)).rows[2].population == ("moved_code", "moved_math")


def test_a_model_that_was_trained_again_is_another(checkpoints, tmp_path):
    """In the same folder, under the same name."""
    paths = checkpoints.results(tmp_path / "r", "code", "plain")
    again = digests(checkpoints.folder / "math") | {"fingerprint": "0" * 64}
    paths.append(write_results(tmp_path / "math.json", verdicts(4, 4, 4, 4, 4, 4), again))
    table = compare(load_results(paths))
    assert plain_of(table).hv_gain is None
    assert any("no HV gain: there are no results of" in note and "/math" in note for note in table.notes)


def test_without_fingerprints_folder_then_name_count(checkpoints, tmp_path):
    paths = checkpoints.results(tmp_path / "r", "plain")
    folder = str(checkpoints.folder / "code")
    paths.append(write_results(tmp_path / "one.json", verdicts(*[4] * 6), named("elsewhere/its", folder=folder)))
    paths.append(write_results(tmp_path / "two.json", verdicts(*[5] * 6), named("elsewhere/math")))
    paths.append(write_results(tmp_path / "three.json", verdicts(*[6] * 6), named("elsewhere/code")))
    assert plain_of(compare(load_results(paths))).population == ("its", "math")
    paths.append(write_results(tmp_path / "four.json", verdicts(*[6] * 6), named("other/math")))
    with pytest.raises(InputError) as refused:
        compare(load_results(paths))
    assert "math: expected the results of one model, got " in str(refused.value)
    assert "two.json" in str(refused.value)
    assert "four.json, which fit equally well. Leave all but one out." in str(refused.value)


def test_names_that_end_alike_are_told_apart(tmp_path):
    paths = [
        write_results(tmp_path / f"{org}.json", verdicts(*[4] * 6), named(f"{org}/m", fingerprint=org * 64))
        for org in "ab"
    ]
    assert [row.models for row in compare(load_results(paths)).rows] == ["a/m", "b/m"]
    with pytest.raises(InputError, match="population: unknown model 'm2'"):
        compare(load_results(paths), "m2")
    with pytest.raises(InputError, match=r"'m' is the name of .*a.json, .*b.json. Use a longer name"):
        compare(load_results(paths), "m")


def test_a_merge_without_a_recipe(checkpoints, tmp_path):
    """Merged elsewhere, relaxed here: it pairs, and needs --population for its gain."""
    shutil.copytree(checkpoints.folder / "plain", checkpoints.folder / "foreign")
    (checkpoints.folder / "foreign" / "merge_recipe.json").unlink()
    checkpoints.relax("foreign", "foreign_aim", "--omega", "0.4")
    paths = checkpoints.results(tmp_path / "r", "code", "foreign", "foreign_aim")
    table = compare(load_results(paths))
    assert rows(table)[1:] == [("unknown", "foreign", "no", "", ""), ("unknown", "foreign", "yes", "0.4", "")]
    assert [row.hv_gain for row in table.rows] == [None] * 3
    assert any("how it was merged is not recorded. Name the models as the population" in note for note in table.notes)
    assert set(table.rows[2].score_changes) == set(table.benchmarks)
    assert compare(load_results(paths), "code").rows[2].hv_gain_change is not None


def test_relaxed_twice(checkpoints, tmp_path):
    checkpoints.relax("two_runs", "twice", "--omega", "0.8")
    table = compare(load_results(checkpoints.results(tmp_path / "r", "code", "math", "plain", "two_runs", "twice")))
    assert table.rows[3].hv_gain_change is not None
    last = table.rows[4]
    assert (last.models, last.aim, last.omega, last.hv_gain_change) == ("code+math", "yes", "0.8", None)
    assert any("no results of the same merge without AIM" in note for note in table.notes)


def test_the_same_model_twice(checkpoints, tmp_path):
    paths = checkpoints.results(tmp_path / "r", "code", "plain") + checkpoints.results(tmp_path / "s", "code", "plain")
    with pytest.raises(Refusals) as refused:
        compare(load_results(paths))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert "r/code.json and " in lines[1]
    assert lines[2].endswith("s/plain.json: are results of the same model. Leave one of them out.")
    assert len(load_results([paths[0], paths[0]])) == 1


# ------------------------------------------------------------------------------------------- what may be compared


def pair(tmp_path, *, samples=True, **second):
    """Results of two models that differ in nothing but what is given."""
    first = write_results(tmp_path / "a.json", verdicts(*[4] * 6), named("a"), samples=samples)
    return [first, write_results(tmp_path / "b.json", verdicts(*[5] * 6), named("b"), samples=samples, **second)]


def test_nothing_to_say_of_equal_conditions(tmp_path):
    assert compare(load_results(pair(tmp_path))).warnings == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generation.prompts_sha256": "4" * 64, "data.files": []}, "(8 of 8 rows)"),
        ({"generation.prompts_sha256": "4" * 64, "counts": {"rows_answered": 4, "truncated": 0, "shortened": 0, "unanswered": 0}}, "(4 of 8 rows)"),
        ({"generation": None, "data.files": []}, "(8 of 8 rows)"),
    ],
)  # fmt: skip
def test_other_items_are_refused(tmp_path, changes, says):
    with pytest.raises(Refusals) as refused:
        compare(load_results(pair(tmp_path, changes={"math": changes})))
    assert re.search(r"math: expected the same items everywhere, got others in .*b\.json", str(refused.value))
    assert says in str(refused.value)
    assert "Evaluate all models on the same data with the same limit." in str(refused.value)


def test_other_rows_of_the_same_data_are_refused(tmp_path):
    paths = pair(tmp_path)
    samples = tmp_path / "b.samples.jsonl"
    samples.write_text(samples.read_text().replace('"index": 7', '"index": 9'))
    with pytest.raises(Refusals, match="expected the same items everywhere"):
        compare(load_results(paths))


def test_the_same_prompts_from_other_files_are_the_same_items(tmp_path):
    assert compare(load_results(pair(tmp_path, changes={"math": {"data.files": []}}))).warnings == ()


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({}, {"profile": "paper"}, "humaneval, mbpp, mmlu, math, gsm8k, ifeval: profile differs: fixed in A; paper in B."),
        ({"mbpp": {"generation.max_new_tokens": 256}}, {}, "mbpp: new tokens differs: 512 in A; 256 in B."),
        ({"mbpp": {"generation.chat_template_sha256": "5" * 64}}, {}, "mbpp: chat template differs: none in A; 55555555 in B."),
        ({"mbpp": {"generation": None}}, {}, "mbpp: responses differs: generated in A; given in B."),
        ({"mbpp": {"generation.prompts_sha256": "4" * 64}}, {}, "mbpp: the prompts differ."),
        ({"math": {"grader": {"name": "math-verify", "version": "1"}}}, {}, "math: grader differs: math-verify 0.9.0 in A; math-verify 1 in B."),
    ],
)  # fmt: skip
def test_what_differs_is_said(tmp_path, changes, settings, says):
    table = compare(load_results(pair(tmp_path, changes=changes, **settings)))
    said = [line.replace(f"{tmp_path}/a.json", "A").replace(f"{tmp_path}/b.json", "B") for line in table.warnings]
    assert f"{says} What differs between these scores is not the models alone." in said
    assert f"- Warning: {table.warnings[0]}" in table.to_markdown()


def test_partial_results_are_called_so(tmp_path):
    changes = {"math": {"partial": True, "data.rows": 100}}
    paths = [write_results(tmp_path / "a.json", verdicts(*[4] * 6), named("a"), changes=changes)]
    assert compare(load_results(paths)).warnings == ("partial: 8 of 100 rows of math. These are no full scores.",)


def test_a_csv_beside_results_is_warned_of(tmp_path):
    (tmp_path / "x.csv").write_text("method,models,aim,humaneval,mbpp,mmlu,math,gsm8k,ifeval\n,c,,1,2,3,4,5,6\n")
    table = compare(load_results([*pair(tmp_path), tmp_path / "x.csv"]))
    assert table.warnings == (
        f"{tmp_path}/x.csv: says nothing of how its scores were made; whether they are comparable is not known.",
    )


def test_missing_benchmarks(tmp_path):
    some = {name: right for name, right in verdicts(*[4] * 6).items() if name not in ("math", "mmlu")}
    paths = [*pair(tmp_path), write_results(tmp_path / "c.json", some, named("c"))]
    with pytest.raises(
        Refusals, match=r"c.json: expected scores of humaneval, .*, got none of mmlu, math. Evaluate these, or leave"
    ):
        compare(load_results(paths))
    assert compare(load_results(paths), benchmarks=list(some)).benchmarks == tuple(some)


def test_results_that_wait_for_grading(tmp_path):
    with pytest.raises(InputError, match=r"b.json: gsm8k is not graded yet. Run evaluate_model.py stage score"):
        load_results(pair(tmp_path, changes={"gsm8k": {"score": None, "stderr": None}}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "got no JSON ("),
        ("[" * 100_000, "got no JSON ("),
        ("[]", "got other JSON"),
        ('{"schema": 1, "rows": []}', "got other JSON"),
        ('{"schema": 7, "benchmarks": {}, "settings": {}}', "got schema 7, this program knows 1"),
        ('{"schema": 1, "benchmarks": {"math": {}}, "settings": {}, "model": null}', "got a file without 'score'"),
        ("\x00", "got no JSON ("),
    ],
)
def test_no_results_file(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_results([path])
    assert f"{path}: expected results of evaluate_model.py (.json) or a table of scores (.csv), {says}" in str(
        refused.value
    )


def test_every_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(Refusals) as refused:
        load_results([tmp_path / "x.json", tmp_path / "y.json", tmp_path, tmp_path / "z.csv", *pair(tmp_path)])
    assert len(refused.value.problems) == 4
    assert "y.json: cannot be read: No such file or directory" in str(refused.value)
    assert f"{tmp_path}: is a folder. Give the files in it: {tmp_path}/*.json." in str(refused.value)


@pytest.mark.parametrize(("key", "value"), [("score", 1.5), ("score", "1"), ("stderr", -0.1), ("score", True)])
def test_scores_that_are_none(tmp_path, key, value):
    path, _ = pair(tmp_path)
    results = json.loads(path.read_text())
    results["benchmarks"]["math"][key] = value
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"math: expected a score in \[0, 1\] and a standard error"):
        load_results([path])


def test_responses_that_were_given(tmp_path):
    entry = load_results([write_results(tmp_path / "given.json", verdicts(*[4] * 6), None)])[0]
    table = compare([entry])
    assert table.rows[0].models == "given"
    assert any("its responses were given; which model gave them is not known" in note for note in table.notes)


# ------------------------------------------------------------------------------------------------------- how sure


def sure(tmp_path, checkpoints, *, samples):
    """A merge that is a little better with AIM, on 200 items that are right or wrong for both."""
    folder = tmp_path / str(samples)
    folder.mkdir()
    right = {"code": 100, "math": 100, "plain": 140, "two_runs": 146}
    return compare(
        load_results(
            write_results(
                folder / f"{name}.json",
                verdicts(*[count] * 6, of=200),
                digests(checkpoints.folder / name),
                samples=samples,
            )
            for name, count in right.items()
        )
    )


def test_marks(checkpoints, tmp_path):
    """Paired over the same items, the change is sure; from the standard errors alone it is not, and is marked."""
    paired, alone = (sure(tmp_path, checkpoints, samples=samples) for samples in (True, False))
    after, before = paired.rows[3], paired.rows[2]
    assert after.hv_gain_change.value == alone.rows[3].hv_gain_change.value > 0
    assert not after.hv_gain_change.doubtful
    assert alone.rows[3].hv_gain_change.doubtful
    assert after.hv_gain_change.stderr < alone.rows[3].hv_gain_change.stderr / 2
    assert before.hv_gain.low < before.hv_gain.value < before.hv_gain.high
    last = [
        line.split("|")[-2].strip()
        for table in (paired, alone)
        for line in table.to_markdown().splitlines()
        if "| yes " in line
    ]
    assert last == [f"{after.hv_gain_change_percent:.2f}", f"{after.hv_gain_change_percent:.2f} ~"]
    assert "bootstrap, 2000 draws, over items, the same for all models." in paired.to_markdown()
    assert "bootstrap, 2000 draws, from each score's standard error, models independent." in alone.to_markdown()
    row = json.loads(alone.to_json())["rows"][3]
    assert row["under_two_stderr"] == "hv_gain_change"
    assert row["hv_gain_change_interval"][0] < row["hv_gain_change"] < row["hv_gain_change_interval"][1]


def test_standard_errors_are_those_of_the_scores(checkpoints, tmp_path):
    """A change of one benchmark's score: by hand, from what the items say and from the standard errors."""
    for samples in (True, False):
        row = sure(tmp_path, checkpoints, samples=samples).rows[3]
        change = row.score_changes["math"]
        assert change.value == pytest.approx(6 / 200)
        scores = [140 / 200, 146 / 200]
        independent = np.sqrt(sum(score * (1 - score) / 199 for score in scores))
        differences = 6 / 200 * (1 - 6 / 200) / 200  # 6 of 200 items change
        assert change.stderr == pytest.approx(np.sqrt(differences) if samples else independent, rel=0.05)


def test_samples_of_another_run_are_not_used(tmp_path):
    paths = pair(tmp_path)
    samples = tmp_path / "b.samples.jsonl"
    samples.write_text(
        samples.read_text().replace(
            '"math", "index": 0, "response": "x", "score": 1.0', '"math", "index": 0, "response": "x", "score": 0.0'
        )
    )
    entries = load_results(paths)
    assert entries[1].scores["math"].verdicts is None
    assert entries[1].scores["gsm8k"].verdicts is not None
    assert f"{paths[1]}: the samples beside it have other scores of math, and are not used." in compare(entries).notes


def test_samples_of_ifeval(tmp_path):
    path = tmp_path / "x.samples.jsonl"
    lines = [
        {"benchmark": "ifeval", "index": 1, "score": 0.25, "checks": {"strict": [True, False], "loose": [True, True]}},
        {"benchmark": "ifeval", "index": 0, "score": 1.0, "checks": {"strict": [True], "loose": [True]}},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    verdicts = read_samples(path)["ifeval"]
    assert verdicts.rows.tolist() == [0, 1]
    assert verdicts.score == (1 / 2 + 2 / 3) / 2
    path.write_text("{")
    assert read_samples(path) == {}
