"""The benchmarks' data: both layouts, the hub, what is missing, what is broken."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

import evaluate_model
from checkpoints.errors import InputError
from evaluation.benchmarks import BENCHMARKS, get_benchmark
from evaluation.data import load_data
from evaluation.dataset_files import Missing
from evaluation.fetch import fetch_data, hub_snapshot
from evaluation.grading.ifeval_checks import _verifiers
from tests.evaluation_files import DATA, rows_of
from tests.fake_hub import FakeHub

PLACES = {
    "humaneval": "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet",
    "mbpp": "google-research-datasets/mbpp/full/test-00000-of-00001.parquet",
    "mmlu": "cais/mmlu/all/test-00000-of-00001.parquet",
    "math": "EleutherAI/hendrycks_math/algebra/test-00000-of-00001.parquet",
    "gsm8k": "openai/gsm8k/main/test-00000-of-00001.parquet",
    "ifeval": "google/IFEval/ifeval_input_data.jsonl",
}


def source(name):
    return "mmlu_stem" if name == "mmlu" else name


def write_hub_layout(folder, names=tuple(PLACES)):
    """The sample rows in the files that the hub's datasets have."""
    for name in names:
        path = folder / PLACES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of(source(name))
        if name == "mmlu":
            rows = [{**row, "subject": row.pop("type")} for row in rows]
        if path.suffix == ".jsonl":
            shutil.copyfile(DATA / f"{name}.jsonl", path)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return folder


@pytest.mark.parametrize("name", PLACES)
def test_both_layouts_hold_the_same_rows(name, tmp_path):
    benchmark = get_benchmark(name)
    plain = load_data(benchmark, DATA)
    hub = load_data(benchmark, write_hub_layout(tmp_path, [name]))
    assert plain.rows == hub.rows
    assert len(plain.rows) == len(rows_of(source(name)))
    assert plain.files[0].path.name == f"{source(name)}.jsonl"
    assert (plain.origin, plain.revision) == (hub.origin, hub.revision) == ("folder", None)
    assert plain.complete == (name != "mmlu")
    assert hub.complete
    assert len(plain.files[0].sha256) == 64


def test_ifeval_from_parquet_has_no_empty_arguments(tmp_path):
    """A table gives every dictionary all keys; verifiers would take None for an argument."""
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of("ifeval")), path)
    benchmark = get_benchmark("ifeval")
    assert [benchmark.read_row(row) for row in pyarrow.parquet.read_table(path).to_pylist()] == [
        benchmark.read_row(row) for row in rows_of("ifeval")
    ]


def test_a_complete_mmlu_wins_over_a_part(tmp_path):
    shutil.copyfile(DATA / "mmlu_stem.jsonl", tmp_path / "mmlu_stem.jsonl")
    shutil.copyfile(DATA / "mmlu_stem.jsonl", tmp_path / "mmlu.jsonl")
    data = load_data(get_benchmark("mmlu"), tmp_path)
    assert (data.files[0].path.name, data.complete) == ("mmlu.jsonl", True)


def test_mmlu_pro_needs_its_examples(tmp_path):
    row = {"question": "q", "options": ["a", "b"], "answer": "A", "category": "law", "cot_content": "A: so."}
    (tmp_path / "mmlu_pro.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(Missing, match=r"expected mmlu_pro_validation\.jsonl beside"):
        load_data(get_benchmark("mmlu_pro"), tmp_path)
    (tmp_path / "mmlu_pro_validation.jsonl").write_text(json.dumps(row) + "\n")
    data = load_data(get_benchmark("mmlu_pro"), tmp_path)
    assert (len(data.rows), len(data.fewshots), len(data.files)) == (1, 1, 2)


GOOD = {name: rows_of(source(name))[0] for name in PLACES}
BROKEN = [
    ("gsm8k", "{", r"line 2: expected a JSON object, got Expecting property name"),
    ("gsm8k", "[1]", r"line 2: expected a JSON object, got list"),
    ("gsm8k", "", r"line 2: expected a JSON object, got an empty line"),
    ("gsm8k", b"\xff\xfe{}", r"line 2: expected a JSON object, got UnicodeDecodeError"),
    ("gsm8k", {"question": "q"}, r"line 2: expected a field 'answer', got question"),
    ("gsm8k", {"question": "q", "answer": "18"}, r"line 2: expected 'answer' to end in '#### N', got '18'"),
    ("gsm8k", {"question": 5, "answer": "#### 1"}, r"line 2: expected text in 'question', got 5"),
    ("math", {"problem": "p", "solution": "5"}, r"line 2: expected an answer in \\boxed\{\} in 'solution', got '5'"),
    ("mmlu", {**GOOD["mmlu"], "answer": 4}, r"line 2: expected 0 to 3 or A to D in 'answer', got 4"),
    ("mmlu", {**GOOD["mmlu"], "answer": True}, r"line 2: expected 0 to 3 or A to D in 'answer', got True"),
    ("mmlu", {**GOOD["mmlu"], "choices": ["a"]}, r"line 2: expected a list of 4 of str in 'choices', got \['a'\]"),
    ("mbpp", {**GOOD["mbpp"], "test_list": []}, r"line 2: expected a list of str in 'test_list', got \[\]"),
    ("mbpp", {**GOOD["mbpp"], "test_list": ["a"]}, r"line 2: expected at least 3 asserts in 'test_list', got 1"),
    ("humaneval", {**GOOD["humaneval"], "test": ""}, r"line 2: expected text in 'test', got ''"),
    ("ifeval", {**GOOD["ifeval"], "kwargs": []}, r"line 2: expected a list of 3 of dict in 'kwargs', got \[\]"),
    ("ifeval", {**GOOD["ifeval"], "instruction_id_list": ["a:b"] * 3}, r"expected known instructions in .*, got 'a:b'"),
]


@pytest.mark.parametrize(("name", "bad", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_named(name, bad, message, tmp_path):
    lines = [json.dumps(GOOD[name]).encode()] * 3
    lines[1] = bad if isinstance(bad, bytes) else bad.encode() if isinstance(bad, str) else json.dumps(bad).encode()
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=message) as error:
        load_data(get_benchmark(name), tmp_path)
    assert str(error.value).startswith(f"{path}: line 2: ")


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text("")
    with pytest.raises(InputError, match=r"gsm8k\.jsonl: expected rows, got an empty file"):
        load_data(get_benchmark("gsm8k"), tmp_path)
    path = tmp_path / PLACES["humaneval"]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet: expected a Parquet file, got "):
        load_data(get_benchmark("humaneval"), tmp_path)


def test_an_empty_last_line_is_fine(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(GOOD["gsm8k"]) + "\n\n")
    assert len(load_data(get_benchmark("gsm8k"), tmp_path).rows) == 1


# ------------------------------------------------------------------------------------------------- missing, and fetched


def test_everything_missing_is_said_at_once(tmp_path, capsys):
    """Before a model is loaded: this one could not be."""
    shutil.copyfile(DATA / "gsm8k.jsonl", tmp_path / "gsm8k.jsonl")
    (tmp_path / "math.jsonl").write_text("{}\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_path = tmp_path / "out.json"
    arguments = ["--model", str(model), "--data_dir", str(tmp_path), "--benchmarks", "gsm8k,math,mbpp,ifeval,mmlu"]
    assert evaluate_model.main([*arguments, "--save_path", str(save_path)]) == 1
    error = capsys.readouterr().err
    assert "mbpp: expected mbpp.jsonl or google-research-datasets/mbpp/full/test-*.parquet" in error
    assert "ifeval: expected ifeval.jsonl or google/IFEval/ifeval_input_data.jsonl" in error
    assert "mmlu: expected mmlu.jsonl or cais/mmlu/all/test-*.parquet" in error
    assert "math.jsonl: line 1: expected a field 'solution'" in error
    assert "gsm8k" not in error, "it is there"
    assert f"python evaluate_model.py --fetch_data --benchmarks mbpp,mmlu,ifeval --data_dir {tmp_path}" in error
    assert "evaluate_model.py: 4 problems:" in error
    assert not save_path.exists()


def test_without_network_and_cache_the_hub_is_named(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"benchmark": "gsm8k", "index": 0, "response": "5"}) + "\n")
    assert (
        evaluate_model.main(["--stage", "score", "--responses", str(given), "--save_path", str(tmp_path / "o.json")])
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "gsm8k: the cache holds no copy of the dataset openai/gsm8k, and HF_HUB_OFFLINE=1 forbids to ask the hub"
        in error
    )
    assert "python evaluate_model.py --fetch_data --benchmarks gsm8k" in error


@pytest.fixture
def hub(tmp_path):
    served = write_hub_layout(tmp_path / "served")
    (served / "openai/gsm8k/socratic").mkdir()
    (served / "openai/gsm8k/socratic/test-00000-of-00001.parquet").write_bytes(b"large and not needed")
    datasets = {"/".join(place.split("/")[:2]): served / "/".join(place.split("/")[:2]) for place in PLACES.values()}
    with FakeHub(datasets=datasets) as hub:
        yield hub


def test_data_comes_from_the_hub_and_then_from_its_cache(hub, tmp_path, monkeypatch):
    hub.attach(monkeypatch, tmp_path / "cache")
    benchmark = get_benchmark("gsm8k")
    data = load_data(benchmark, None)
    assert data.rows == load_data(benchmark, DATA).rows
    commit = hub.repos["datasets", "openai/gsm8k"].branches["main"]
    assert (data.origin, data.revision, data.complete) == ("hub", commit, True)
    assert not any("socratic" in path for method, path in hub.requests if "resolve" in path)
    asked = len(hub.requests)
    assert load_data(benchmark, None) == data
    assert len(hub.requests) == asked, "a complete copy in the cache needs no request"


def test_fetch_data(hub, tmp_path, monkeypatch, capsys):
    hub.attach(monkeypatch, tmp_path / "cache")
    punkt = tmp_path / "usual"
    english = punkt / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (english / name).write_text("")
    monkeypatch.setenv("NLTK_DATA", str(punkt))
    folder = tmp_path / "data"
    assert evaluate_model.main(["--fetch_data", "--data_dir", str(folder)]) == 0
    assert f"gsm8k: openai/gsm8k -> {folder / 'openai/gsm8k'}" in capsys.readouterr().out
    for name in PLACES:
        data = load_data(get_benchmark(name), folder)
        assert data.rows == load_data(get_benchmark(name), DATA).rows
        repo = get_benchmark(name).dataset.repo
        assert data.revision == hub.repos["datasets", repo].branches["main"]


def test_fetching_says_why_it_cannot(hub, tmp_path, monkeypatch):
    hub.attach(monkeypatch, tmp_path / "cache")
    hub.status = 503
    with pytest.raises(InputError, match=r"gsm8k: the dataset openai/gsm8k cannot be fetched: the hub"):
        fetch_data([get_benchmark("gsm8k")], tmp_path, quiet=True)
    hub.status = None
    with pytest.raises(InputError):
        hub_snapshot(get_benchmark("mmlu_pro"))


def test_every_benchmark_names_its_data():
    for name in BENCHMARKS:
        benchmark = get_benchmark(name)
        assert benchmark.name == name
        assert benchmark.files[0] == f"{name}.jsonl"
        assert "test" in benchmark.dataset.splits


# --------------------------------------------------------------------------------------------------------- sentences


def test_the_simple_splitter_follows_punkt():
    from evaluation.grading.sentences import simple_splitter

    split = simple_splitter()
    text = 'Dr. Smith paid $3.50, e.g. for tea. Was it good? "Yes!" He left at 5 p.m. on Monday.'
    assert split(text) == [
        "Dr. Smith paid $3.50, e.g. for tea.",
        "Was it good?",
        '"Yes!"',
        "He left at 5 p.m. on Monday.",
    ]


def test_without_punkt_no_check_needs_it():
    """Every verifier runs; none looks for data that is not there."""
    from evaluation.grading.ifeval_checks import check

    assert _verifiers(None).__name__ == "lm_eval.tasks.ifeval.utils"
    for row in rows_of("ifeval"):
        result = check(get_benchmark("ifeval").read_row(row), "Hello there. I AM here, all of me.", None)
        assert len(result["strict"]) == len(result["loose"]) == len(row["instruction_id_list"])
