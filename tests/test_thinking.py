"""--think_end: what follows the last mark is graded, both parts are counted, and other runs are told apart."""

import json

import jsonschema
import pytest

import evaluate_model
from evaluation.benchmarks.contract import Generation, Response
from evaluation.results import SCHEMA_FILE, read_results
from evaluation.thinking import answers_of, describe_thinking, to_think
from reports.comparison import compare
from reports.loading import load_results
from tests.evaluation_files import DATA, make_model, rows_of, samples, score, write_responses

MARK = "</think>"


def valid(results):
    jsonschema.validate(results, json.loads(SCHEMA_FILE.read_text()), jsonschema.Draft202012Validator)
    return results


def right_answer(index):
    """GSM8K's published answer to one of the sample rows."""
    return rows_of("gsm8k")[index]["answer"].rpartition("#### ")[2]


def run(*arguments, code=0):
    assert evaluate_model.main([str(argument) for argument in arguments]) == code


def test_what_follows_the_last_mark_is_the_answer():
    texts = {
        "so 4</think>\n\nThe answer is 5.": "The answer is 5.",
        "a</think>b</think> c ": " c ",
        "x</think>\n \n    return 1\n": "    return 1\n",  # a completion keeps the indentation of its first line
        "still thinking": "",
        "": "",
        "x</think>": "",
    }
    given = [Response(0, text) for text in texts]
    assert [answer.text for answer in answers_of(given, MARK, ("5",))] == list(texts.values())
    assert answers_of(given, None, ("5",)) == given


def test_stop_strings_end_a_generated_answer_and_no_thought():
    generation = Generation(9, ("\n#",))
    assert to_think(generation, MARK) == Generation(9, ())
    assert to_think(generation, None) == generation
    assert to_think(None, MARK) is None
    response = Response(0, "# a\n# b</think>5\n# c", "stop", 1, 9)
    assert answers_of([response], MARK, generation.stop)[0].text == "5"


def test_what_holds_no_text_is_not_split():
    responses = [Response(0, "B", "stop", 3, 0, loglikelihoods=(-2.0, -1.0)), Response(1, "", "no_room", 9, 0)]
    assert answers_of(responses, MARK, ()) == responses
    assert describe_thinking(responses, MARK, ()) is None


def test_both_parts_are_counted():
    responses = [Response(0, "abcd</think>\nxy"), Response(1, "ab"), Response(2, "</think>wxyz")]
    assert describe_thinking(responses, MARK, ()) == {
        "mark": MARK,
        "thought": {"count": 3, "mean_characters": 2.0},
        "answer": {"count": 2, "mean_characters": 3.0},
        "unfinished": 1,
    }
    cut = describe_thinking(responses[1:2], MARK, ())
    assert cut is not None
    assert cut["answer"] == {"count": 0, "mean_characters": None}


def test_given_responses(tmp_path, capsys):
    """The first answers right after a wrong thought, the second the other way round, the third is cut with the right number."""
    responses = [
        ("gsm8k", 0, f"Maybe 12345?</think>\nThe answer is {right_answer(0)}."),
        ("gsm8k", 1, f"It is {right_answer(1)}.</think>The answer is 98765."),
        ("gsm8k", 2, f"It is {right_answer(2)}."),
    ]
    results = valid(score(tmp_path, responses, "--think_end", MARK))
    entry = results["benchmarks"]["gsm8k"]
    assert entry["score"] == pytest.approx(1 / 3)
    assert entry["counts"]["no_answer"] == 1
    assert entry["thinking"]["unfinished"] == 1
    assert entry["thinking"]["thought"]["count"] == 3
    assert results["settings"]["think_end"] == MARK
    assert "graded from the last '</think>' on, the paper's responses whole" in entry["not_comparable_because"]
    assert "1 cut while thinking" in capsys.readouterr().out
    lines = samples(tmp_path / "scored0.json")
    assert [line["response"] for line in lines] == [text for _, _, text in responses]  # whole, thoughts and all
    assert [line["status"] for line in lines] == ["right", "wrong", "no_answer"]
    # Off by default: the last number of the whole text counts.
    whole = valid(score(tmp_path, responses))
    assert "thinking" not in whole["benchmarks"]["gsm8k"]
    assert whole["settings"]["think_end"] is None
    assert [line["status"] for line in samples(tmp_path / "scored1.json")] == ["right", "wrong", "right"]
    # What differs is said where both stand in one table.
    table = compare(load_results([tmp_path / "scored0.json", tmp_path / "scored1.json"]))
    assert any(
        "gsm8k: what is graded differs: what follows '</think>' in" in line and "; the whole response in" in line
        for line in table.warnings
    )


def test_generate_resume_and_score(tmp_path, capsys):
    """Stages with a mark that this model writes; another mark, or none, is another run."""
    model, save_path = make_model(tmp_path / "model"), tmp_path / "out.json"
    flags = ["--model", model, "--dtype", "float32", "--data_dir", DATA, "--limit", 3, "--benchmarks", "gsm8k,mmlu", "--math_max_tokens", 24, "--save_path", save_path, "--quiet"]  # fmt: skip
    run(*flags, "--stage", "generate", "--think_end", "e")
    generated = [json.loads(line) for line in (tmp_path / "out.responses.jsonl").read_text().splitlines()]
    with_mark = sum("e" in line["response"] for line in generated if line["benchmark"] == "gsm8k")
    run(*flags, "--resume", code=2)
    assert "think_end 'e' there, None here" in capsys.readouterr().err
    run(*flags, "--resume", "--think_end", "e")
    results = valid(json.loads(save_path.read_text()))
    assert results["benchmarks"]["gsm8k"]["thinking"]["answer"]["count"] == with_mark
    assert "thinking" not in results["benchmarks"]["mmlu"]
    # Scoring takes the generating run's mark over, and another one given now in its place.
    score_flags = ["--stage", "score", "--responses", tmp_path / "out.responses.jsonl", "--data_dir", DATA, "--quiet"]
    run(*score_flags, "--save_path", tmp_path / "same.json")
    run(*score_flags, "--save_path", tmp_path / "other.json", "--think_end", "no such mark")
    same, other = (valid(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("same", "other"))
    assert same["benchmarks"]["gsm8k"]["thinking"] == results["benchmarks"]["gsm8k"]["thinking"]
    assert same["settings"] == results["settings"]
    assert other["settings"]["think_end"] == "no such mark"
    assert other["benchmarks"]["gsm8k"]["thinking"]["unfinished"] == 3


def test_results_of_earlier_versions_are_read(tmp_path):
    score(tmp_path, [("gsm8k", 0, "5")])
    path = tmp_path / "scored0.json"
    results = json.loads(path.read_text())
    del results["settings"]["think_end"]
    path.write_text(json.dumps(valid(results)))
    assert read_results(path) == results
    assert load_results([path])[0].conditions["gsm8k"].settings["what is graded"] == "the whole response"


def test_refusals(tmp_path, capsys):
    given = ["--stage", "score", "--responses", write_responses(tmp_path / "r.jsonl", [("gsm8k", 0, "5")])]
    run(*given, "--data_dir", DATA, "--think_end", " ", code=2)
    assert (
        "--think_end: expected the text that ends a thought, such as '</think>', got ' '. Leave it out to grade responses whole."
        in capsys.readouterr().err
    )
    (tmp_path / "tasks.txt").write_text("arc_easy\n")
    run("--model", "m", "--tasks_file", tmp_path / "tasks.txt", "--data_dir", DATA, "--think_end", MARK, code=2)
    assert (
        "--think_end: lm_eval grades the tasks of --tasks_file itself, thoughts and all. Evaluate them without --think_end."
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*.json"))
