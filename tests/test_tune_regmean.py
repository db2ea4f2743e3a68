"""tune_merge.py with regmean: the models run once, on texts that nothing is held out of, and its candidates are what merge.py writes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge
import tune_merge
from checkpoints.errors import Refusals
from checkpoints.model import open_models
from forward.loading import load
from merging import kept_moments
from merging.kept_moments import KeptMoments
from merging.merge_work import prepare_moments
from merging.methods.regmean import Solved
from merging.model_texts import read_model_text
from merging.moments_pass import MomentsPass
from merging.plan import make_plan
from merging.recipe import source_key
from search.candidates import Candidates, KeptStatistics, of_base, read_candidate
from search.memory import LoadedModel
from search.model_data import choose_rows, with_data
from search.space import Space
from search.texts import Texts, parse_texts, read_texts
from streaming.output import DEFAULT_SHARD_BYTES, RunOptions
from streaming.stream import StreamOptions
from tests.pico import Family, make_family
from tests.scene import Scene, call, read_tensors
from tests.test_tune_merge import CPU, sentences, write_rows, written


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("tune"), "llama", n_models=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "a.jsonl", [{"text": text} for text in sentences(0, 30)])
    write_rows(folder / "b.jsonl", [{"prompt": text, "answer": text.upper()[:20]} for text in sentences(1, 30)])
    return folder


def recipe_of(family: Family, texts: Path, **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": str(model), "data": str(texts / name)}
        for model, name in zip(family.models, ("a.jsonl", "a.jsonl"), strict=True)
    ]
    return {"merge_method": "regmean", "base_model": str(family.base), "models": models, "parameters": parameters}


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_candidates_are_the_checkpoints_that_merge_writes(architecture: str, texts: Path, tmp_path: Path):
    """From moments that were taken once, with experts and with matrices whose inputs run down the columns; whichever was in memory before."""
    family = make_family(tmp_path / "family", architecture, n_models=2)
    recipes = [
        recipe_of(family, texts, **{"lambda": 0.9, "ridge": 0.01}),
        recipe_of(family, texts, **{"lambda": 0.4, "ridge": 0.01, "rest_lambda": 0.3}),
        recipe_of(family, texts, **{"gram_scale": 0.7}),
        recipe_of(family, texts, **{"moments": "diagonal", "ridge": 0.1}),
        recipe_of(family, texts, **{"base_weight": 0.5}),
        {**recipe_of(family, texts), "exclude": r"\.1\."},
    ]
    candidates = [read_candidate(recipe, "test") for recipe in recipes]
    names = candidates[0].recipe.inputs
    opened = open_models(names)
    widest = read_candidate(recipe_of(family, texts, base_weight=1.0), "test").recipe
    plan = make_plan(of_base(widest), opened, max_shard_bytes=DEFAULT_SHARD_BYTES)
    moments, _, _ = prepare_moments(plan, opened, RunOptions(), read_model_text)
    kept = KeptMoments(moments)
    kept.take(tmp_path / "moments")
    taken = sum(path.stat().st_size for path in (tmp_path / "moments").glob("layer_*"))
    assert 0 < taken <= kept.nbytes + 20_000 * kept.layers
    loaded = LoadedModel(opened[0], load(opened[0], dtype="float32", device=CPU))
    keys = [source_key(name) for name in names]
    made = Candidates(opened, keys, loaded, StreamOptions(workers=2), prepare=kept.prepare)
    for number, (recipe, candidate) in enumerate(zip(recipes, candidates, strict=True)):
        made.make(candidate)
        got = {name: tensor.detach().clone() for name, tensor in loaded.model.state_dict().items()}
        for name, tensor in written(recipe, tmp_path / str(number)).items():
            assert torch.equal(got[name], tensor), (number, name)


def test_what_is_solved_is_kept_for_another_lambda_and_what_is_multiplied_for_another_ridge(family: Family, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    recipes = [recipe_of(family, texts, **{"lambda": value, "ridge": ridge}) for value, ridge in ((0.9, 0.1), (0.3, 0.1), (0.3, 1.0))]  # fmt: skip
    candidates = [read_candidate(recipe, "test") for recipe in recipes]
    opened = open_models(candidates[0].recipe.inputs)
    plan = make_plan(of_base(candidates[0].recipe), opened, max_shard_bytes=DEFAULT_SHARD_BYTES)
    kept = KeptMoments(prepare_moments(plan, opened, RunOptions(), read_model_text)[0])
    kept.take(tmp_path / "moments")
    loaded = LoadedModel(opened[0], load(opened[0], dtype="float32", device=CPU))
    keys = [source_key(name) for name in candidates[0].recipe.inputs]
    made = Candidates(opened, keys, loaded, StreamOptions(workers=1), prepare=kept.prepare)
    calls: list[str] = []

    def counted(name: str, what: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: calls.append(name) or what(*given, **named)

    monkeypatch.setattr(Solved, "answers", counted("answers", Solved.answers))
    monkeypatch.setattr(kept_moments, "solve", counted("solve", kept_moments.solve))
    counts = []
    for candidate in candidates:
        made.make(candidate)
        counts.append((calls.count("answers"), calls.count("solve")))
    matrices = counts[0][0]
    assert matrices > 0
    assert counts == [(matrices, matrices), (matrices, matrices), (matrices, 2 * matrices)]


def test_moments_that_were_cut_off_go_on(family: Family, texts: Path, tmp_path: Path):
    """A layer's file is there whole or not at all, and is not made again."""
    recipe = read_candidate(recipe_of(family, texts), "test").recipe
    opened = open_models(recipe.inputs)
    plan = make_plan(of_base(recipe), opened, max_shard_bytes=DEFAULT_SHARD_BYTES)

    def kept() -> KeptMoments:
        return KeptMoments(prepare_moments(plan, opened, RunOptions(), read_model_text)[0])

    kept().take(tmp_path / "whole")

    def stop(layers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept().take(tmp_path / "cut", stop)
    first = tmp_path / "cut" / "layer_0.safetensors"
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [first.name]
    before = first.stat().st_mtime_ns
    kept().take(tmp_path / "cut")
    assert first.stat().st_mtime_ns == before
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_statistics_are_kept_as_far_as_there_is_room():
    kept = KeptStatistics(4000)
    calls: list[str] = []

    def measure(name: str, numel: int) -> Any:
        return kept.get(name, lambda: calls.append(name) or (torch.zeros(numel), {"more": [torch.zeros(4)]}))

    for _ in range(2):
        measure("a", 100)
        measure("b", 1000)
        measure("c", 10)
    assert calls == ["a", "b", "c", "b"]


# --------------------------------------------------------------------------------------------------------- what runs


def read(family: Family, texts: Path) -> Texts:
    (base,) = open_models([str(family.base)])
    return read_texts(base, parse_texts(f"a={texts / 'a.jsonl'},b={texts / 'b.jsonl'}"), share=0.5, documents=8)


def rows_of(found: Texts) -> list[list[Any]]:
    return [[one.row for one in part] for part in found.searched.values()]  # type: ignore[attr-defined]


def test_models_run_on_the_texts_searched_with_of_their_task(family: Family, texts: Path, tmp_path: Path):
    """By name, whatever their order, else by place; prompt and answer together where there is no chat template."""
    found, models = read(family, texts), open_models(list(map(str, family.models)))
    searched_a, searched_b = rows_of(found)
    tree = {"base_model": "base", "models": [{"model": "org/x-B-135M"}, {"model": "org/A"}]}
    data = choose_rows(tree, models, found, tmp_path)
    assert list(data.rows.values())[1] == searched_a
    assert next(iter(data.rows.values())) in (
        searched_b,
        [{"text": row["prompt"] + row["answer"]} for row in searched_b],
    )
    tree["models"] = [{"model": "first"}, {"model": "base"}, {"model": "second"}]
    data = choose_rows(tree, models, found, tmp_path)
    assert list(data.rows) == [tmp_path / "model_data" / "model_1.jsonl", tmp_path / "model_data" / "model_2.jsonl"]
    assert next(iter(data.rows.values())) == searched_a
    tree["models"] = [{"model": "a"}, {"model": "second"}]
    with pytest.raises(Refusals, match=r"model_data: .* its own task is not told by the names of texts"):
        choose_rows(tree, models, found, tmp_path)


def test_nothing_that_is_held_out_is_run_on(family: Family, texts: Path, tmp_path: Path):
    """Of a file that holds both sides the one is left out, by its prompt too, whatever the answer."""
    found, models = read(family, texts), open_models(list(map(str, family.models)))
    held_out = [one.row for part in found.held_out.values() for one in part]  # type: ignore[attr-defined]
    other_answers = [{**row, "answer": "another"} for row in held_out if "prompt" in row]
    spaced = [{"text": f"  {row['text']} \n"} for row in held_out if "text" in row]
    assert other_answers
    assert spaced
    searched = [row for rows in rows_of(found) for row in rows]
    fresh = [{"text": "something else altogether"}]
    file = write_rows(tmp_path / "all.jsonl", [*held_out, *other_answers, *spaced, *searched, *fresh])
    only = write_rows(tmp_path / "only.jsonl", held_out)
    tree = {"base_model": "base", "models": [{"model": "a", "data": str(file)}, {"model": "b", "data": str(file)}]}
    data = choose_rows(tree, models, found, tmp_path)
    for rows in data.rows.values():
        assert rows == [*searched, *fresh]
    assert f"without {2 * len(held_out)} rows that are held out" in data.says[0]
    tree["models"][1]["data"] = str(only)  # type: ignore[index]
    with pytest.raises(Refusals, match=r"expected rows for .* that are not held out, got none"):
        choose_rows(tree, models, found, tmp_path)
    tree["models"][1]["data"] = str(tmp_path / "none.jsonl")  # type: ignore[index]
    with pytest.raises(Refusals, match="no such file"):
        choose_rows(tree, models, found, tmp_path)


def test_data_stand_in_a_recipe_whose_method_has_a_use_for_them(tmp_path: Path):
    tree = {"merge_method": "regmean", "base_model": "b", "models": [{"model": "b"}, {"model": "m", "data": "x"}]}
    assert with_data(tree, tmp_path)["models"] == [
        {"model": "b"},
        {"model": "m", "data": str(tmp_path / "model_data" / "model_1.jsonl")},
    ]
    assert with_data({**tree, "merge_method": "ties"}, tmp_path)["models"] == [{"model": "b"}, {"model": "m"}]
    assert with_data({"merge_method": "ties", "slices": []}, tmp_path) == {"merge_method": "ties", "slices": []}


@pytest.mark.parametrize("key", ["first_token_weight", "data_tokens"])
def test_what_decides_how_models_run_is_not_searched(key: str):
    tree: dict[str, Any] = {"merge_method": {"search": ["ties", "regmean"]}, "parameters": {"lambda": 1.0}}
    tree["parameters"][key] = {"search": [1, 2]}
    with pytest.raises(Refusals, match=f"{key}: regmean runs the models once for all candidates"):
        Space(tree, "r")


def test_the_widest_recipe_serves_every_other():
    tree = {
        "merge_method": {"search": ["ties", "regmean"]},
        "exclude": {"search": ["mlp", "attn"]},
        "only": "layers",
        "parameters": {
            "moments": {"search": ["diagonal", "full"]},
            "base_weight": {"search": [0.0, 0.5]},
            "ridge": {"search": [0.01, 0.5]},
        },
    }
    widest = Space(tree, "r").widest("regmean", {"moments": "full", "base_weight": 1.0})
    assert widest == {
        "merge_method": "regmean",
        "only": "layers",
        "parameters": {"moments": "full", "base_weight": 1.0, "ridge": 0.01},
    }


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def scene(family: Family, texts: Path, tmp_path: Path) -> Scene:
    needed = {
        "--base_model": family.base,
        "--models_to_merge": ",".join(map(str, family.models)),
        "--texts": f"a={texts / 'a.jsonl'},b={texts / 'b.jsonl'}",
        "--trials": 5,
        "--study": tmp_path / "study",
    }

    def flags(given: Mapping[str, str]) -> Mapping[str, object]:
        if "--config" in given:
            return {key: value for key, value in needed.items() if key not in ("--base_model", "--models_to_merge")}
        return needed

    return Scene(tmp_path, tune_merge, flags)


def test_a_search_runs_the_models_once(scene: Scene, family: Family, texts: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written is what merge.py makes of recipe.yml, which names the rows that were used; a second run takes no moments again."""
    passes: list[MomentsPass] = []
    take = MomentsPass.take
    monkeypatch.setattr(MomentsPass, "take", lambda self, *rest: passes.append(self) or take(self, *rest))
    flags = ("--methods=regmean", "--no-early_stopping")
    plan = json.loads(scene.run(*flags, "--dry_run", "--json").out)
    assert plan["bytes_of_moments"] > 0
    assert [entry["documents"] for entry in plan["model_data"]] == [len(part) for part in read_16(family, texts)]
    dry = scene.run(*flags, "--dry_run")
    assert f"take at most {plan['bytes_of_moments']:,} bytes" in dry.out
    assert not (scene.folder / "study").exists()
    assert len(passes) == 1  # to say how long a candidate takes
    ended = scene.run(*flags)
    study = scene.folder / "study"
    assert "default regmean" in ended.out
    assert len(passes) == 2
    trials = list(csv.DictReader((study / "trials.csv").open()))
    assert [row["state"] for row in trials] == ["complete"] * 5
    assert len({row["loss"] for row in trials}) == 5
    recipe = yaml.safe_load((study / "recipe.yml").read_text())
    assert [entry["data"] for entry in recipe["models"]] == [str(study / "model_data" / f"model_{n}.jsonl") for n in (1, 2)]  # fmt: skip
    used = [json.loads(line) for line in (study / "model_data" / "model_1.jsonl").read_text().splitlines()]
    assert used == [one.row for one in read_16(family, texts)[0]]
    call(merge, "--config", study / "recipe.yml", "--save_path", scene.folder / "again")
    mine, again = read_tensors(scene.out), read_tensors(scene.folder / "again")
    assert all(torch.equal(mine[name], again[name]) for name in again)
    shutil.rmtree(scene.out)
    scene.run("--methods=regmean", "--no-early_stopping", "--trials=6")
    assert len(passes) == 2


def read_16(family: Family, texts: Path) -> list[list[Any]]:
    (base,) = open_models([str(family.base)])
    found = read_texts(base, parse_texts(f"a={texts / 'a.jsonl'},b={texts / 'b.jsonl'}"), share=0.5, documents=16)
    return [list(part) for part in found.searched.values()]


def test_moments_serve_a_model_run_layer_by_layer(scene: Scene):
    in_memory = scene.run("--methods=regmean", "--trials=2", "--no-early_stopping")
    shutil.rmtree(scene.folder / "study")
    shutil.rmtree(scene.out)
    by_layers = scene.run("--methods=regmean", "--trials=2", "--no-early_stopping", "--mode=layerwise")
    first, second = ([line for line in ended.out.splitlines() if "default regmean" in line] for ended in (in_memory, by_layers))  # fmt: skip
    assert float(first[0].split()[2]) == pytest.approx(float(second[0].split()[2]), abs=0.02)


def test_what_does_not_fit_is_said_before_anything_runs(scene: Scene, family: Family, texts: Path, monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    data = f"--model_data={texts / 'a.jsonl'}"
    scene.refuse("--methods=ties", data, says=("--model_data: none of ties runs the models",))
    scene.refuse("--methods=regmean", data, says=("--model_data: expected a file for each of 2 models, got 1",))
    scene.refuse("--methods=regmean", f"--texts=a={texts / 'a.jsonl'}", code=1, says=("--model_data", "Give a file for each model"))  # fmt: skip
    recipe = recipe_of(family, texts, **{"lambda": {"search": [0.1, 1.2]}, "inputs": "merged"})
    (scene.folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    config = f"--config={scene.folder / 'recipe.yml'}"
    scene.refuse(config, says=("merged: runs every model behind each candidate's own layers",))
    scene.refuse(config, data, says=("--model_data: --config says what to search",))
    monkeypatch.setattr("search.beforehand.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    scene.refuse("--methods=regmean", code=1, says=("--study", "the moments of the models' inputs (regmean) need up to", "has 1 free"))  # fmt: skip
    assert not (scene.folder / "study").exists()
