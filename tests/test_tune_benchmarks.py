"""tune_merge.py with benchmarks: what the model in memory earns is what evaluate_model.py gives the written checkpoint, item by item."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate_model
import tune_merge
from checkpoints.model import open_model
from evaluation.benchmarks.settings import Settings
from reports.hypervolume import hv_gain
from search.benchmarks import Benchmarks, Item, read_benchmarks
from search.goals import read_goals
from search.held_out import single_best
from search.texts import Document, read_texts
from tests.scene import Scene, call

FAMILY = Path(__file__).resolve().parent.parent / "examples" / "family"
ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the family's benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "mmlu", "ifeval"):
        lines = (FAMILY / "data" / "validation" / f"{name}.jsonl").read_text().splitlines()[:ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def scene(data: Path, tmp_path: Path) -> Scene:
    def flags(given: Mapping[str, str]) -> Mapping[str, object]:
        return {
            "--base_model": FAMILY / "models" / "base",
            "--models_to_merge": ",".join(str(FAMILY / "models" / name) for name in ("math", "code")),
            "--methods": "task_arithmetic",
            "--benchmarks": "gsm8k,mmlu",
            "--data_dir": data,
            "--documents": 8,
            "--trials": 2,
            "--study": tmp_path / "study",
        }

    return Scene(tmp_path, tune_merge, flags)


def read(data: Path, names: tuple[str, ...], **how: bool) -> Benchmarks:
    base = open_model(str(FAMILY / "models" / "base"))
    wanted = {"scores": True, "asks": True, **how}
    return read_benchmarks(base, names, data, Settings(), share=0.5, documents=8, **wanted)


def test_a_candidate_earns_what_its_checkpoint_does(scene: Scene, data: Path):
    """Both searched with and held out, of generated answers and of choices; the report compares them as it does losses."""
    ended = scene.run("--goal=accuracy", "--no-early_stopping")
    assert "found, number 2" in ended.out
    report = json.loads((scene.folder / "study" / "report.json").read_text())
    assert report["goals"] == [{"name": "accuracy", "text": "mean accuracy over benchmarks", "more_is_better": True}]
    results = scene.folder / "results.json"
    flags = ("--benchmarks=gsm8k,mmlu", f"--data_dir={data}", f"--save_path={results}", "--dtype=auto", "--backend=hf")
    call(evaluate_model, "--model", scene.out, *flags, "--quiet")
    samples = [json.loads(line) for line in results.with_suffix(".samples.jsonl").read_text().splitlines()]
    earned = {(line["benchmark"], line["index"]): line["score"] for line in samples}
    assert len(earned) == 2 * ROWS
    benchmarks = read(data, ("gsm8k", "mmlu"), scores=False)
    trials = list(csv.DictReader((scene.folder / "study" / "trials.csv").open()))
    best = max(trials, key=lambda row: float(row["accuracy"]))
    for name in ("gsm8k", "mmlu"):
        there, here = (
            [earned[name, item.request.index] for item in side[f"accuracy:{name}"] if isinstance(item, Item)]
            for side in (benchmarks.held_out, benchmarks.searched)
        )
        assert report["rows"][0]["losses"][f"accuracy:{name}"] == there
        assert float(best[f"accuracy:{name}"]) == pytest.approx(np.mean(here), abs=1e-6)
    values = report["rows"][0]["losses"].values()
    assert report["rows"][0]["values"] == [pytest.approx(np.mean([np.mean(one) for one in values]))]
    assert 0.1 < report["rows"][0]["values"][0] < 1  # the family can do some of it
    assert report["rows"][1]["winner_minus_this"][0]["stderr"] >= 0


def test_reference_answers_are_texts(data: Path):
    """A benchmark's loss is of its right answers behind the very prompts that are asked, on the same sides."""
    found = read(data, ("gsm8k", "mmlu"))
    tokenizer_ids = {}
    for side in (found.searched, found.held_out):
        for name, answer in (("gsm8k", " {solution}"), ("mmlu", " {letter}")):
            items, documents = side[f"accuracy:{name}"], side[name]
            for item, document in zip(items, documents, strict=True):
                assert isinstance(item, Item)
                assert isinstance(document, Document)
                assert document.begin == len(item)
                row = found.data[name].rows[item.request.index]
                right = answer.format(solution=row.get("solution"), letter="ABCD"[row["answer"]] if name == "mmlu" else "")  # fmt: skip
                tokenizer_ids[item.request.prompt + right] = document.ids
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "models" / "base")
    assert all(tuple(tokenizer.encode(text)) == ids for text, ids in tokenizer_ids.items())
    assert len(tokenizer_ids) == 32


def test_a_question_is_on_one_side_as_a_text_too(data: Path, tmp_path: Path):
    found = read(data, ("gsm8k",), scores=False)
    rows = [{"prompt": row["question"] + " ", "answer": "1"} for row in found.data["gsm8k"].rows]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = open_model(str(FAMILY / "models" / "base"))
    texts = read_texts(base, {"t": tmp_path / "t.jsonl"}, share=0.5, documents=8)
    for side, documents in ((found.searched, texts.searched["t"]), (found.held_out, texts.held_out["t"])):
        questions = [found.data["gsm8k"].rows[item.request.index]["question"] for item in side["accuracy:gsm8k"] if isinstance(item, Item)]  # fmt: skip
        assert len(questions) == len(documents) == 8
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(FAMILY / "models" / "base")
        for question, document in zip(questions, documents, strict=True):
            assert isinstance(document, Document)
            assert question.split()[-1] in tokenizer.decode(document.ids[: document.begin])


def test_goals_of_accuracies():
    losses = [0.5, 0.7]
    inputs = [{"t": losses, "accuracy:a": [0, 0, 0, 1], "accuracy:b": [1, 0]}, {"t": losses, "accuracy:a": [1, 0, 0, 1], "accuracy:b": [0, 0]}]  # fmt: skip
    candidate = {"t": losses, "accuracy:a": [1, 1, 0, 1], "accuracy:b": [1, 0]}
    goals = read_goals("accuracy,accuracy:gsm8k,accuracy_hypervolume,loss")
    assert goals[0].value(candidate, inputs) == pytest.approx(0.625)
    renamed = {key.replace(":a", ":gsm8k"): values for key, values in candidate.items()}
    assert goals[1].value(renamed, inputs) == pytest.approx(0.75)
    assert goals[2].value(candidate, inputs) == hv_gain([[0.25, 0.5], [0.5, 0.0]], [0.75, 0.5]) > 0
    assert goals[3].value(candidate, inputs) == pytest.approx(0.6)
    difference = goals[0].difference(candidate, inputs[0], inputs)
    assert difference.value == pytest.approx(0.25)
    assert difference.stderr is not None
    assert difference.stderr > 0.05
    # The best single model is the one with the highest accuracy, also for a gain over the inputs.
    assert single_best([inputs[0], inputs[1], candidate], goals[0]) == single_best([*inputs, candidate], goals[2]) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--goal=accuracy:gsm9k",), "--goal: unknown benchmark 'gsm9k'"),
        (("--goal=accuracy:math",), "--benchmarks lacks math"),
        (("--benchmarks=gsm9k",), "--benchmarks: unknown benchmark 'gsm9k'"),
        (("--texts=a.jsonl",), "--texts: the task gsm8k is a benchmark's"),
        (("--texts=a.jsonl", "--goal=accuracy"), "--texts: texts have a loss, and --goal accuracy asks for none"),
        (("--mode=layerwise",), "answering benchmarks needs the model in memory"),
        (("--benchmarks=ifeval", "--goal=loss"), "--benchmarks ifeval: has no reference answers"),
        (("--held_out=0.01",), "expected at least 4 rows on either side"),
        (("--data_dir=nowhere",), "--data_dir nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_refused_first(scene: Scene, flags: tuple[str, ...], says: str):
    named = [flag.replace("--texts=", "--texts=gsm8k=") for flag in flags]
    scene.fail(*named, says=(says,), code=None)


def test_a_base_without_chat_template(scene: Scene, tmp_path: Path):
    base = tmp_path / "plain"
    shutil.copytree(FAMILY / "models" / "base", base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    scene.fail(f"--base_model={base}", "--apply_chat_template", says=("has no chat template. Leave it out",))


def test_goals_without_benchmarks(tmp_path: Path):
    from search import SearchRequest
    from search.study import Budget

    def ask(**how: Any) -> None:
        SearchRequest({}, {}, tmp_path, Budget(trials=1), **how)

    with pytest.raises(Exception, match="expected a file of texts for each task, or benchmarks, got none"):
        ask()
    with pytest.raises(Exception, match=r"accuracy is of benchmarks\. Name some"):
        SearchRequest({}, {"a": Path("a")}, tmp_path, Budget(trials=1), goals=read_goals("accuracy,loss"))
