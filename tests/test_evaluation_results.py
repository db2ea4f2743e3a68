"""The results file: its schema, what is comparable to the paper, writing, resuming."""

import json
import os

import jsonschema
import pytest

from checkpoints.errors import ArgumentError, InputError
from evaluation import results as results_module
from evaluation.benchmarks import BENCHMARKS, PAPER, get_benchmark
from evaluation.benchmarks.contract import Grade, Response
from evaluation.benchmarks.settings import Settings
from evaluation.data import Data, DataFile
from evaluation.entries import Asked, generated_entry, given_entry, graded, responses_sha256, why_not_comparable
from evaluation.responses import read_responses, to_lines
from evaluation.results import SCHEMA_FILE, new_results, replace_benchmark, update_summary, write_results
from evaluation.table import format_table
from tests.evaluation_files import DATA

VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
PAPER_SETTINGS = Settings(profile="paper")


def problems(results):
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(results)]


def data_of(name, rows=None):
    size = get_benchmark(name).size if rows is None else rows
    row = {"subject": "law", "instruction_id_list": ["a"]}
    files = [DataFile(DATA / f"{name}.jsonl", size, "0" * 64)]
    return Data([row] * size, [], files, "hub", "0" * 40, complete=True)


def asked(**changes):
    bos = {"first_tokens": [5, 6], "bos_token_id": 1, "bos_count": 0}
    values = {
        "prompts_sha256": "0" * 64,
        "bos": bos,
        "chat_template_sha256": None,
        "dtype": "bfloat16",
        "backend": "vllm",
        "n_gpu": 1,
        "window": 4096,
        "batch_size": None,
        "ignored": {},
        "seconds": 1.0,
    }
    return Asked(**(values | changes))


def entry_of(name, settings=PAPER_SETTINGS, *, splitter="punkt", data=None, responses=None, **changes):
    benchmark = get_benchmark(name)
    data = data or data_of(name)
    responses = responses or [Response(index, "x", "stop", 5, 1) for index in range(len(data.rows))]
    entry = generated_entry(benchmark, settings, data, responses, asked(**changes))
    extra = {"subject": "law", "strict": [True], "loose": [True]}
    grades = [Grade(1.0, "right", extra=extra)] * len(responses)
    grader = {"name": "g", **({"sentence_splitter": splitter} if name == "ifeval" else {})}
    return graded(entry, benchmark, settings, grades, grader=grader, seconds=1.0)


def results_with(entries):
    settings = {
        "profile": "paper",
        "apply_chat_template": False,
        "math_prompt_type": "wcot",
        "math_max_tokens": 1024,
        "backend": "vllm",
        "dtype": "bfloat16",
        "n_gpu": 1,
        "max_model_len": 4096,
        "batch_size": None,
        "seed": 1234,
        "limit": None,
        "unsafe_code_execution": False,
    }
    results = new_results(stage="all", settings=settings, limit=None, wanted=list(entries), command=None)
    results["benchmarks"] = entries
    update_summary(results)
    return results


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["$defs"]["name"]["enum"] == list(BENCHMARKS)
    assert VALIDATOR.schema["properties"]["schema"]["const"] == results_module.SCHEMA


def test_all_six_at_the_papers_settings_are_comparable():
    results = results_with({name: entry_of(name) for name in PAPER})
    assert problems(results) == []
    assert results["not_comparable_because"] == []
    assert results["comparable_to_paper"]
    assert results["complete"]
    assert not results["partial"]
    table = format_table(results)
    assert "Comparable to the paper's table." in table
    assert [line.split()[-1] for line in table.split("\n") if line.startswith("average of six")] == ["100.00"]
    assert "partial" not in table.lower()


BOS = {"first_tokens": [1], "bos_token_id": 1, "bos_count": 1}
REASONS = [
    ("humaneval", {"dtype": "float16"}, "dtype float16, the paper's bfloat16"),
    ("humaneval", {"bos": BOS}, "prompts begin with BOS, the paper's do not (profile paper)"),
    ("mmlu", {"bos": BOS}, "prompts begin with BOS, the paper's do not (profile paper)"),
    ("gsm8k", {"bos": BOS}, None),
    ("ifeval", {"chat_template_sha256": "0" * 64}, "a chat template was applied"),
    ("math", {"window": 8192}, "window of 8192 tokens, the paper's 4096"),
    ("math", {"window": 2048}, None),
    ("math", {"backend": "hf", "n_gpu": 0}, None),
    ("ifeval", {"splitter": "simple"}, "sentences were split without nltk's punkt data"),
    ("mbpp", {"settings": Settings()}, "up to 512 new tokens, the paper's 256"),
    ("math", {"settings": Settings(math_max_tokens=2048)}, "up to 2048 new tokens, the paper's 1024"),
    ("math", {"settings": Settings()}, None),
    ("gsm8k", {"settings": Settings(math_prompt_type="direct")}, "prompt 'direct', the paper's 'wcot'"),
    ("humaneval", {"data": data_of("humaneval", 20)}, "the data has 20 rows, the paper's 164"),
    ("mmlu_pro", {}, "the paper's table has no MMLU-Pro"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REASONS, ids=range(len(REASONS)))
def test_what_is_not_comparable(name, changes, reason):
    entry = entry_of(name, **changes)
    assert entry["not_comparable_because"] == ([] if reason is None else [reason])
    assert entry["comparable_to_paper"] == (reason is None)


def test_answers_that_are_not_all_there_are_not_comparable():
    responses = [Response(0, "x", "length", 5, 1, shortened=True), Response(1, "", "no_room", 5000, 0)]
    entry = entry_of("gsm8k", responses=responses)
    assert entry["partial"]
    assert entry["counts"].items() >= {"truncated": 1, "shortened": 1, "unanswered": 1, "rows_answered": 2}.items()
    assert entry["not_comparable_because"] == [
        "partial: 2 of 1319 rows were answered",
        "prompts that do not fit into the window: 1",
        "answers with fewer tokens allowed, for lack of window: 1",
    ]
    given = given_entry(get_benchmark("gsm8k"), data_of("gsm8k"), [Response(n, "x") for n in range(1319)])
    assert why_not_comparable(given, get_benchmark("gsm8k"), PAPER_SETTINGS) == [
        "the responses were given: how they were made is not known"
    ]


def test_the_table_says_what_is_partial_and_why():
    results = results_with({"gsm8k": entry_of("gsm8k", responses=[Response(0, "x", "length", 5, 1)])})
    results["limit"] = 1
    update_summary(results)
    assert problems(results) == []
    table = format_table(results)
    assert "gsm8k (partial)  100.00       -  1  1 reached the token limit" in table
    assert "PARTIAL: limit 1, no full scores." in table
    assert "  gsm8k: partial: 1 of 1319 rows were answered" in table


def test_a_benchmark_that_waits_for_its_grades():
    entry = generated_entry(get_benchmark("gsm8k"), Settings(), data_of("gsm8k", 2), [Response(0, "x")], asked())
    results = results_with({"gsm8k": entry})
    assert problems(results) == []
    assert not results["complete"]
    assert not results["comparable_to_paper"]
    assert "gsm8k (partial)      -       -  1" in format_table(results)


def test_the_schema_finds_what_does_not_belong():
    results = results_with({"gsm8k": entry_of("gsm8k")})
    for change in (
        lambda r: r.update(unknown=1),
        lambda r: r["benchmarks"]["gsm8k"].update(score=17.5),
        lambda r: r["benchmarks"].update(other=r["benchmarks"]["gsm8k"]),
        lambda r: r["benchmarks"]["gsm8k"]["counts"].update(forged=-1),
        lambda r: r["settings"].pop("profile"),
    ):
        broken = json.loads(json.dumps(results))
        change(broken)
        assert problems(broken)


# ---------------------------------------------------------------------------------------------------------------- files


def test_results_appear_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "out.json"
    write_results(path, {"a": 1})

    def fail(*_, **__):
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(InputError, match="No space left"):
            write_results(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
    with pytest.raises(ValueError, match="nan"):
        write_results(path, {"a": float("nan")})


def test_one_benchmarks_lines_are_replaced(tmp_path):
    path = tmp_path / "r.jsonl"
    replace_benchmark(path, "gsm8k", to_lines("gsm8k", [Response(0, "old\u2028")]))
    replace_benchmark(path, "math", to_lines("math", [Response(1, "kept\r\n\x85\ud800")]))
    replace_benchmark(path, "gsm8k", to_lines("gsm8k", [Response(0, "new", "stop", 3, 2, loglikelihoods=(-1.5, -2.0))]))
    found = read_responses(path, None)
    assert found == {
        "math": [Response(1, "kept\r\n\x85\ud800")],
        "gsm8k": [Response(0, "new", "stop", 3, 2, loglikelihoods=(-1.5, -2.0))],
    }
    assert responses_sha256(found["math"]) != responses_sha256(found["gsm8k"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"benchmark": "gsm8k", "index": 0}', "line 2: expected text in 'response', got None"),
        (
            '{"benchmark": "gsm8k", "index": "0", "response": ""}',
            "line 2: expected a row number from 0 in 'index', got '0'",
        ),
        (
            '{"benchmark": "gsm8k", "index": true, "response": ""}',
            "line 2: expected a row number from 0 in 'index', got True",
        ),
        (
            '{"benchmark": "gsm9k", "index": 0, "response": ""}',
            "line 2: unknown benchmark 'gsm9k'. Did you mean 'gsm8k'",
        ),
        ('{"index": 0, "response": ""}', "line 2: expected a name in 'benchmark', got None"),
        (
            '{"benchmark": "gsm8k", "index": 0, "response": "", "finish": "x"}',
            "expected one of stop, length, no_room, given",
        ),
        ("nonsense", "line 2: expected a JSON object"),
    ],
)
def test_a_broken_response_is_named(line, message, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"benchmark": "gsm8k", "index": 0, "response": "5"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        read_responses(path, None)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_save_paths(tmp_path):
    check = results_module.check_save_path
    check(tmp_path / "new" / "out.json", resume=False)
    with pytest.raises(ArgumentError, match=r"expected a file that ends in \.json"):
        check(tmp_path / "out", resume=False)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ArgumentError, match="is a folder"):
        check(tmp_path / "x.json", resume=False)
    taken = tmp_path / "out.responses.jsonl"
    taken.write_text("")
    with pytest.raises(ArgumentError, match=r"out\.responses\.jsonl exists\. Choose another file, or add resume"):
        check(tmp_path / "out.json", resume=False)
    check(tmp_path / "out.json", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        check(tmp_path / "file" / "out.json", resume=False)


def test_default_paths_have_the_models_name():
    path = results_module.default_path("org/My Model@main")
    assert path.parent.name == "results"
    assert path.name.startswith("My_Model_main_2")
    assert path.suffix == ".json"
    assert results_module.default_path("///").name.startswith("model_")


def test_only_results_of_ours_are_read(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match=r"no such file\. Leave resume out to begin"):
        results_module.read_results(path)
    for content in ("{", "[]", '{"schema": 2, "benchmarks": {}}', '{"schema": 1}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"expected results of evaluate_model\.py"):
            results_module.read_results(path)


def test_forged_results_are_refused_in_words(tmp_path):
    """Whatever --resume reads may be missing, or something else."""
    path = tmp_path / "r.json"
    settings = {"profile": "paper", "apply_chat_template": False, "math_prompt_type": "wcot", "math_max_tokens": 8}
    entry = {
        "score": None, "metrics": {}, "metrics_stderr": {}, "partial": False, "counts": {"rows_answered": 1, "unanswered": 0, "shortened": 0}, "stderr": None,
        "data": {"files": [], "rows": 1}, "seconds": {}, "n": 1,
        "generation": {"dtype": "bfloat16", "window": 9, "chat_template": False, "bos": {"bos_count": 0}, "max_new_tokens": None},
        "not_comparable_because": [], "responses_sha256": "",
    }  # fmt: skip
    good = {
        "schema": 1, "settings": settings, "model": {"folder": "m", "files": {}}, "responses_file": None,
        "benchmarks": {"gsm8k": entry}, "extra_tasks": {}, "limit": None, "wanted": [],
    }  # fmt: skip
    path.write_text(json.dumps(good))
    assert results_module.read_results(path) == good
    places = [(good, key) for key in good] + [(settings, key) for key in settings] + [(entry, key) for key in entry]
    for place, key in [*places, (good["model"], "folder"), (good["model"], "files"), (entry["data"], "files")]:
        kept = place.pop(key)
        path.write_text(json.dumps(good))
        with pytest.raises(InputError, match=r"expected results of evaluate_model\.py, got"):
            results_module.read_results(path)
        place[key] = "x" if isinstance(kept, bool) else True
        path.write_text(json.dumps(good))
        with pytest.raises(InputError, match=r"expected results of evaluate_model\.py, got"):
            results_module.read_results(path)
        place[key] = kept
    path.write_text(json.dumps({**good, "settings": {**settings, "think_end": 5}}))
    with pytest.raises(InputError, match=r"got int at settings\.think_end"):
        results_module.read_results(path)
    for place, key in [(entry, "score"), (entry, "n"), (entry, "metrics"), (good, "limit"), (good, "extra_tasks")]:
        kept = place[key]
        place[key] = {"x": 10**400} if isinstance(kept, dict) else 10**400
        path.write_text(json.dumps(good))
        with pytest.raises(InputError, match=r"expected results of evaluate_model\.py, got"):
            results_module.read_results(path)
        place[key] = kept
    for raw in ("[" * 100_000, '{"schema": 1' + "0" * 5000 + "}", '"\\ud800"', "null"):
        path.write_text(raw)
        with pytest.raises(InputError, match=r"expected results of evaluate_model\.py, got"):
            results_module.read_results(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="got no plain file"):
        results_module.read_results(path)
