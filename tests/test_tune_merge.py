"""tune_merge.py: candidates in memory are the checkpoints that merge.py writes, bit for bit; texts, losses, the command."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merge
import tune_merge
from checkpoints.errors import InputError, Refusals
from checkpoints.model import open_model, open_models
from forward.loading import load
from merging.recipe import source_key
from search import SearchRequest, tune
from search.candidates import Candidates, read_candidate
from search.kept import keep_computed
from search.layer_by_layer import LayerByLayer
from search.losses import AskedRows, batches, score
from search.memory import LoadedModel
from search.study import Budget
from search.texts import Document, parse_texts, read_texts
from streaming.stream import StreamOptions
from tests.adapter_files import make_adapter
from tests.pico import Family, make_family
from tests.scene import Scene, call, read_tensors

CPU = torch.device("cpu")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "merging",
    "models",
    "with",
    "great",
    "care",
]


def sentences(seed: int, count: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (8 + n % 7,), generator=generator).tolist())
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("tune"), "llama", n_models=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "a.jsonl", [{"text": text} for text in sentences(0, 30)])
    rows = [{"prompt": text, "answer": text.upper()[:20]} for text in sentences(1, 30)]
    write_rows(folder / "b.jsonl", rows)
    write_rows(folder / "calibration.jsonl", [{"text": text} for text in sentences(2, 60)])
    return folder


# --------------------------------------------------------------------------------------------- candidates in memory


def in_memory(recipes: list[Mapping[str, Any]], **how: Any) -> list[dict[str, torch.Tensor]]:
    """The parameters of the loaded model after each recipe, one after the other in one place."""
    candidates = [read_candidate(recipe, "test") for recipe in recipes]
    names = candidates[0].recipe.inputs
    opened = keep_computed(open_models(names))
    loaded = LoadedModel(opened[0], load(opened[0], dtype="float32", device=CPU))
    made = Candidates(opened, [source_key(name) for name in names], loaded, StreamOptions(workers=2), **how)
    found = []
    for candidate in candidates:
        made.make(candidate)
        found.append({name: tensor.detach().clone() for name, tensor in loaded.model.state_dict().items()})
    return found


def written(recipe: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The same of the checkpoint that merge.py writes, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    (folder / "recipe.yml").write_text(yaml.safe_dump(dict(recipe)))
    call(merge, "--config", folder / "recipe.yml", "--save_path", folder / "out", "--report=none")
    return dict(AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).state_dict())


def recipe_of(family: Family, method: str, weights: tuple[float, ...] = (0.7, 0.4), **parameters: float) -> dict[str, Any]:  # fmt: skip
    models = [
        {"model": str(model), "parameters": {"weight": weight}}
        for model, weight in zip(family.models, weights, strict=True)
    ]
    return {"merge_method": method, "base_model": str(family.base), "models": models, "parameters": parameters}


def test_a_candidate_is_the_checkpoint_that_merge_writes(family: Family, tmp_path: Path):
    """Whatever was in memory before, with kept statistics too, and rounded to the checkpoint's dtype."""
    recipes = [
        recipe_of(family, "ties", density=0.3, **{"lambda": 0.9}),
        recipe_of(family, "task_arithmetic", **{"lambda": 0.5}),
        recipe_of(family, "dare_ties", density=0.5, **{"lambda": 0.8}),
        # The thresholds of the first are used again.
        recipe_of(family, "ties", (0.2, 1.0), density=0.3, **{"lambda": 0.4}),
        recipe_of(family, "breadcrumbs", density=0.5, gamma=0.1, **{"lambda": 0.4}),
        recipe_of(family, "breadcrumbs", density=0.5, gamma=0.2, **{"lambda": 0.4}),
        recipe_of(family, "linear"),
    ]
    for number, (recipe, got) in enumerate(zip(recipes, in_memory(recipes), strict=True)):
        for name, tensor in written(recipe, tmp_path / str(number)).items():
            assert torch.equal(got[name], tensor), (number, name)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_layer_by_layer_scores_as_in_memory(architecture: str, tmp_path: Path):
    """Also of an input as it is, and with rows of a tied table read for the embedding and all of it for the head."""
    other = make_family(tmp_path, architecture, n_models=2)
    generator = torch.Generator().manual_seed(3)
    documents = [
        Document(tuple(torch.randint(3, 300, (length,), generator=generator).tolist()), begin)
        for length, begin in ((9, 1), (30, 20), (900, 4), (700, 1))
        if architecture == "llama" or length < 500
    ]
    found = []
    for is_whole in (True, False):
        candidates = [read_candidate(recipe_of(other, method, **{"lambda": 0.5, **more}), "t") for method, more in (("ties", {"density": 0.3}), ("task_arithmetic", {}))]  # fmt: skip
        opened = open_models(candidates[0].recipe.inputs)
        base = opened[0]
        place = LoadedModel(base, load(base, dtype="float32", device=CPU)) if is_whole else LayerByLayer(base, torch.float32, CPU)  # fmt: skip
        made = Candidates(opened, [source_key(name) for name in candidates[0].recipe.inputs], place, StreamOptions(workers=2))  # fmt: skip
        losses = []
        for candidate in candidates:
            made.make(candidate)
            losses.append(made.score(documents))
        made.make_input(1)
        found.append([*losses, made.score(documents)])
    for whole, by_layer in zip(*found, strict=True):
        assert by_layer == pytest.approx(whole, rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-4)


def test_statistics_are_measured_once_for_candidates_that_share_them(family: Family, monkeypatch: pytest.MonkeyPatch):
    from merging.methods.ties import Ties

    measured: list[str] = []
    measure = Ties.measure

    def counting(self: Ties, tensor: Any, scan: Any) -> Any:
        measured.append(tensor.name)
        return measure(self, tensor, scan)

    monkeypatch.setattr(Ties, "measure", counting)
    densities = (0.3, 0.5, 0.3, 0.3)
    in_memory([recipe_of(family, "ties", (0.2 * n + 0.2, 1.0), density=d, **{"lambda": 0.5 + n / 10}) for n, d in enumerate(densities)])  # fmt: skip
    assert len(measured) == 2 * len(set(measured)) == 2 * 21


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3", "gpt_neox"])
def test_layouts_that_loading_changes(architecture: str, tmp_path: Path):
    """Stored input first, experts that are packed when loaded, tied heads, fused projections."""
    other = make_family(tmp_path / "family", architecture, n_models=2)
    recipe = recipe_of(other, "task_arithmetic", **{"lambda": 0.5})
    (got,) = in_memory([recipe])
    for name, tensor in written(recipe, tmp_path / "merged").items():
        assert torch.equal(got[name], tensor), name


def test_adapters_are_computed_once(family: Family, tmp_path: Path):
    """And what is kept of them gives the same weights."""
    adapters = [make_adapter(tmp_path / f"lora{n}", family.base, seed=n, r=4, target_modules=["q_proj", "up_proj"]) for n in range(2)]  # fmt: skip
    adapted = Family(family.base, [Path(f"{family.base}+{adapter}") for adapter in adapters])
    recipes = [recipe_of(adapted, "task_arithmetic", **{"lambda": value}) for value in (0.3, 0.6)]
    for number, (recipe, got) in enumerate(zip(recipes, in_memory(recipes), strict=True)):
        for name, tensor in written(recipe, tmp_path / str(number)).items():
            assert torch.equal(got[name], tensor), name


def test_outputs_of_other_shapes_are_refused(family: Family, tmp_path: Path):
    larger = tmp_path / "larger"
    shutil.copytree(family.models[0], larger)
    tokenizer = json.loads((larger / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 300, "content": "<new>", **added})
    (larger / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(larger / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    from safetensors.torch import save_file

    save_file(tensors, larger / "model.safetensors", {"format": "pt"})
    config = json.loads((larger / "config.json").read_text()) | {"vocab_size": 301}
    (larger / "config.json").write_text(json.dumps(config))
    other = Family(family.base, [larger, family.models[1]])
    recipe = recipe_of(other, "task_arithmetic", **{"lambda": 0.5}) | {"tokenizer_source": "union"}
    with pytest.raises(InputError, match=r"expected shape \[300, 32\] .* use tokenizer_source: base"):
        in_memory([recipe])
    assert in_memory([recipe_of(other, "task_arithmetic", **{"lambda": 0.5})])


# ---------------------------------------------------------------------------------------------------- texts and losses


def test_losses_are_those_of_each_document_by_itself(family: Family):
    """In batches, with padding, and with a head that sees the scored rows alone."""
    model = open_model(str(family.base))
    loaded = load(model, dtype="float32", device=CPU)
    generator = torch.Generator().manual_seed(3)
    documents = [
        Document(tuple(torch.randint(3, 300, (length,), generator=generator).tolist()), begin)
        for length, begin in ((9, 1), (30, 20), (5, 4), (30, 1), (64, 63))
    ]
    got = score(loaded, documents, CPU)
    for document, loss in zip(documents, got, strict=True):
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([document.ids])).logits[0].double()
        logs = logits.log_softmax(-1)[range(document.begin - 1, len(document) - 1), document.ids[document.begin :]]
        assert loss == pytest.approx(-float(logs.mean()), rel=1e-4)
    assert sorted(index for batch in batches(documents, 64) for index in batch) == list(range(5))
    with AskedRows(loaded) as rows, torch.no_grad():  # without a batch, the head is left alone
        assert rows.batch is None
        assert loaded(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 300)


def test_texts_are_split_by_content(family: Family, tmp_path: Path):
    """The same text, or the same prompt, is on one side wherever it stands and however it is spaced; twice counts once."""
    base = open_model(str(family.base))
    rows = [{"prompt": text, "answer": f"{n} {text[:9]}"} for n, text in enumerate(sentences(5, 40))]
    again = [{"prompt": "  ".join(row["prompt"].split()), "answer": "another"} for row in rows]
    files = {
        "one": write_rows(tmp_path / "one.jsonl", rows),
        "two": write_rows(tmp_path / "two.jsonl", [*again, rows[0], {"text": "x y"}, "a text by itself"]),
    }
    texts = read_texts(base, files, share=0.5, documents=100)
    assert texts.twice == 1
    tokenizer_says = {
        (task, side): {document.ids[: document.begin] for document in part[task]}
        for side, part in (("searched", texts.searched), ("held_out", texts.held_out))
        for task in files
    }
    squeezed = {key: {tuple(ids) for ids in found} for key, found in tokenizer_says.items()}
    assert not squeezed["one", "searched"] & squeezed["one", "held_out"]
    sides = [len(texts.searched["one"]), len(texts.held_out["one"])]
    assert sum(sides) == 40
    assert min(sides) > 10
    # Reordered rows are split alike; fewer documents are the first of them.
    shuffled = {"one": write_rows(tmp_path / "shuffled.jsonl", rows[::-1])}
    alike = read_texts(base, shuffled, share=0.5, documents=100)
    assert alike.searched["one"] == texts.searched["one"]
    assert read_texts(base, shuffled, share=0.5, documents=5).searched["one"] == texts.searched["one"][:5]
    # Only the answer is scored.
    assert all(0 < document.begin < len(document) for document in texts.held_out["one"])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "x"}] * 9, "row 1: expected a text, or the fields text, or prompt and answer, got question"),
        (sentences(7, 5), "expected at least 4 texts on either side"),
    ],
)
def test_texts_that_are_none(family: Family, tmp_path: Path, rows: list[Any], says: str):
    with pytest.raises(Refusals) as caught:
        read_texts(open_model(str(family.base)), {"t": write_rows(tmp_path / "t.jsonl", rows)}, share=0.5, documents=9)
    assert says in str(caught.value)


def test_names_of_tasks():
    assert parse_texts("maths=a/b.jsonl, c/code.jsonl.gz") == {"maths": Path("a/b.jsonl"), "code": Path("c/code.jsonl.gz")}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def scene(family: Family, texts: Path, tmp_path: Path) -> Scene:
    needed = {
        "--base_model": family.base,
        "--models_to_merge": ",".join(map(str, family.models)),
        "--texts": f"a={texts / 'a.jsonl'},b={texts / 'b.jsonl'}",
        "--trials": 6,
        "--study": tmp_path / "study",
    }

    def flags(given: Mapping[str, str]) -> Mapping[str, object]:
        if "--config" in given:
            return {key: value for key, value in needed.items() if key not in ("--base_model", "--models_to_merge")}
        return needed

    return Scene(tmp_path, tune_merge, flags)


def test_a_search_from_flags_to_a_checkpoint(scene: Scene, texts: Path, family: Family):
    """With AIM: what is written is what merge.py makes of recipe.yml; a second run finds all done and scores nothing again."""
    calibration = f"--calibration_data={texts / 'calibration.jsonl'}"
    ended = scene.run("--methods=task_arithmetic,ties", calibration, "--no-early_stopping")
    study = scene.folder / "study"
    assert "held-out texts" in ended.out
    for name in ("default task_arithmetic", "default ties", "best single model", "uniform soup", "base ("):
        assert name in ended.out
    trials = list(csv.DictReader((study / "trials.csv").open()))
    assert [row["state"] for row in trials] == ["complete"] * 6
    assert {row["merge_method"] for row in trials} == {"task_arithmetic", "ties"}
    report = json.loads((study / "report.json").read_text())
    assert report["trials"] == {"finished": 6, "complete": 6}
    assert len(report["rows"][0]["losses"]["a"]) >= 4
    assert all("on the held-out texts the best found is" in line for line in report["verdict"])
    best = min(float(row["loss"]) for row in trials)
    assert report["rows"][0]["name"] == "best found"
    assert {path.name for path in (study / "figures").iterdir()} >= {"trials.png", "parameters.svg"}
    # The checkpoint.
    assert (scene.out / "README.md").read_text().count("## How it was found") == 1
    call(merge, "--config", study / "recipe.yml", "--save_path", scene.folder / "again")
    mine, again = read_tensors(scene.out), read_tensors(scene.folder / "again")
    assert all(torch.equal(mine[name], again[name]) for name in again)
    # Its loss on the texts searched with is the trial's.
    model = open_model(str(scene.out))
    documents = read_texts(model, parse_texts(f"a={texts / 'a.jsonl'},b={texts / 'b.jsonl'}"), share=0.5, documents=16).searched  # fmt: skip
    losses = [sum(score(load(model, dtype="float32", device=CPU), part, CPU)) / len(part) for part in documents.values()]  # fmt: skip
    assert sum(losses) / 2 == pytest.approx(best, rel=0.02)  # the search may have run it in bfloat16
    # Once more.
    shutil.rmtree(scene.out)
    journal = (study / "journal.log").stat().st_size
    again_ended = scene.run("--methods=task_arithmetic,ties", calibration, "--no-early_stopping")
    assert again_ended.out.splitlines()[0] == ended.out.splitlines()[0]
    assert (study / "journal.log").stat().st_size < journal + 2000
    assert json.loads((study / "report.json").read_text())["rows"] == report["rows"]


def test_a_search_of_a_recipe_for_two_goals(scene: Scene, family: Family):
    recipe = recipe_of(family, "task_arithmetic")
    recipe["parameters"] = {"lambda": {"search": [0.1, 1.2]}}
    (scene.folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    ended = scene.run(
        f"--config={scene.folder / 'recipe.yml'}", "--goal=loss,hypervolume", "--trials=5", "--mode=layerwise"
    )
    assert "is run layer by layer" in ended.err
    assert "hypervolume" in ended.out
    found = yaml.safe_load((scene.folder / "study" / "recipe.yml").read_text())
    assert 0.1 <= found["parameters"]["lambda"] <= 1.2
    assert found["models"][0]["parameters"] == {"weight": 0.7}
    goals = json.loads((scene.folder / "study" / "report.json").read_text())["goals"]
    assert [goal["name"] for goal in goals] == ["loss", "hypervolume"]


def test_a_dry_run_says_what_is_searched_and_how_long_it_takes(scene: Scene):
    plan = json.loads(scene.run("--dry_run", "--json").out)
    assert plan["refusals"] == []
    assert [entry["entry"] for entry in plan["searches"]][:2] == ["merge_method", "models[0].parameters.weight"]
    said = scene.run("--dry_run").out
    assert "parameters.density" in said
    assert "a candidate: " in said
    assert "6 trials take" in said
    assert not (scene.folder / "study").exists()


def test_flags_that_are_wrong_are_said_at_once(scene: Scene, texts: Path, family: Family):
    message = scene.refuse("--goal=lss", "--methods=ties,tis", "--trials=", says=("--trials",))
    message = scene.refuse("--goal=lss", "--texts=x=", "--study=", says=("3 problems", "--goal: unknown goal 'lss'", "--texts", "--study"))  # fmt: skip
    assert "Did you mean 'loss'" in message
    scene.refuse("--methods=ties,tis", says=("unknown method 'tis'",))
    scene.refuse("--goal=loss,worst", "--early_stopping", says=("--early_stopping: works with one goal only",))
    scene.refuse("--held_out=1", says=("--held_out: expected a share between 0 and 1",))
    scene.refuse(f"--texts={texts / 'nothing.jsonl'}", code=1, says=("--texts", "no such file"))
    scene.refuse(f"--save_path={family.base}", says=("--save_path", "is the input"))
    scene.refuse("--config=recipe.yml", "--methods=ties", says=("--methods: --config says what to search",))


def test_ctrl_c_while_the_best_are_compared(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """What was scored on the held-out texts by then is not scored again."""
    flags = ("--methods=task_arithmetic", "--trials=2", "--no-early_stopping")
    make, calls = Candidates.make, []

    def cut_off(self: Candidates, candidate: Any) -> None:
        calls.append(candidate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        make(self, candidate)

    monkeypatch.setattr(Candidates, "make", cut_off)
    assert "Run the same command again to go on; " in scene.run(*flags, code=130).err
    scene.run(*flags)
    assert len(calls) == 4 + 2  # the second best or the default, and the soup


def test_a_study_of_another_search_is_refused(scene: Scene, texts: Path):
    scene.run("--methods=task_arithmetic", "--trials=1", "--no-early_stopping")
    shutil.rmtree(scene.out)
    scene.fail("--methods=task_arithmetic", "--trials=1", code=2, says=("--study", "holds a search that differs in"))


def test_from_python(family: Family, texts: Path, tmp_path: Path):
    recipe = recipe_of(family, "task_arithmetic")
    recipe["parameters"] = {"lambda": {"search": [0.1, 1.2]}}
    request = SearchRequest(recipe, {"a": texts / "a.jsonl"}, tmp_path / "study", Budget(trials=3))
    outcome = tune(request)
    assert outcome.rows[0].rival.name == "best found"
    assert outcome.recipe["merge_method"] == "task_arithmetic"
    assert not list(tmp_path.glob("*.partial"))
