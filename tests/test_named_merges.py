"""Several merges in one recipe file: a named one is a model that is computed as it is read, with the bits of one that was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge
from checkpoints.errors import InputError
from merging.recipe_file import read_recipe_file
from tests import pico

STAGES = """\
name: stage1
merge_method: ties
base_model: {base}
models:
- {{model: {a}, parameters: {{density: 0.5}}}}
- {{model: {b}, parameters: {{density: 0.4, weight: 0.5}}}}
parameters: {{lambda: 0.8}}
out_dtype: float32
---
name: drawn
merge_method: dare_linear
base_model: {base}
models:
- {{model: {b}, parameters: {{density: 0.6}}}}
seed: 3
out_dtype: float32
---
merge_method: slerp
base_model: stage1
models:
- model: stage1
- model: drawn
parameters: {{t: 0.3}}
out_dtype: float32
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> pico.Family:
    return pico.make_family(tmp_path_factory.mktemp("family"), "qwen3")


def write(folder: Path, family: pico.Family, text: str = STAGES) -> Path:
    path = folder / "recipe.yml"
    a, b, c = family.models
    path.write_text(text.format(base=family.base, a=a, b=b, c=c))
    return path


def run(*flags: object) -> int:
    return merge.main([*map(str, flags), "--quiet", "--report", "none"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_named_merge_has_the_bits_of_one_that_was_written(family: pico.Family, tmp_path: Path) -> None:
    recipe = write(tmp_path, family)
    at_once, kept, again = (tmp_path / name for name in ("at_once", "kept", "again"))
    assert run("--config", recipe, "--save_path", at_once) == 0
    assert run("--config", recipe, "--save_path", kept, "--keep_intermediate", "stage1,drawn") == 0
    assert sorted(path.name for path in tmp_path.glob("kept*")) == ["kept", "kept-drawn", "kept-stage1"]
    first, second = tensors(at_once), tensors(kept)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], tensors(tmp_path / "kept-stage1")[name]) for name in first)
    # merge_recipe.json is a recipe that makes the same again, and says what the stages were made of.
    assert run("--config", at_once / "merge_recipe.json", "--save_path", again) == 0
    assert all(torch.equal(first[name], tensors(again)[name]) for name in first)
    record = json.loads((at_once / "merge_recipe.json").read_text())
    assert [entry["model"] for entry in record["inputs"]] == ["stage1", "drawn"]
    assert [entry["model"] for entry in record["inputs"][0]["inputs"]] == [str(family.base), *map(str, family.models[:2])]  # fmt: skip
    assert f"stage1: merged as it is read, in float32: ties of {family.base}, " in record["notes"][0]
    assert (at_once / "tokenizer.json").read_bytes() == (family.base / "tokenizer.json").read_bytes()


def test_an_earlier_run_is_found_complete_and_aim_relaxes_the_last_merge(
    family: pico.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"a channel of the base {number}" for number in range(40)))
    recipe = write(tmp_path, family, STAGES.replace("merge_method: slerp\nbase_model: stage1", "merge_method: task_arithmetic\nbase_model: {base}").replace("parameters: {{t: 0.3}}\n", ""))  # fmt: skip
    flags = ["--config", recipe, "--save_path", tmp_path / "out", "--omega", "0.4", "--calibration_data", texts, "--block_size", "64"]  # fmt: skip
    assert run(*flags) == 0
    capsys.readouterr()
    assert run(*flags) == 0
    assert "is complete already" in capsys.readouterr().out


def problems_of(path: Path) -> list[str]:
    with pytest.raises(InputError) as error:
        read_recipe_file(path)
    return str(error.value).splitlines()


BASE = "merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nmerge_method: linear\nmodels: [{{model: y}}]\n---\nname: y\nmerge_method: linear\nmodels: [{{model: x}}]\n---\n"
            "merge_method: linear\nmodels: [{{model: x}}]\n",
            "x uses y uses x: a merge cannot use itself. Leave one of them out.",
        ),
        (
            f"{BASE}---\n{BASE}",
            "expected at most one document without a name, the merge that is written, got 2. Name the others.",
        ),
        (f"name: x\n{BASE}---\n{BASE}", "x: nothing uses this merge. Use it as a model, or leave it out."),
        (f"name: x\n{BASE}---\nname: x\n{BASE}---\n{BASE}", "two merges are named x. Give each a name of its own."),
        (f"name: 7\n{BASE}---\n{BASE}", "name: expected text, got 7. Name each merge."),
        (
            f"name: x\n{BASE}aim: {{{{omega: 0.4}}}}\n---\nmerge_method: linear\nmodels: [{{{{model: x}}}}]\n",
            "x: aim: AIM relaxes the merge that is written. Move it there.",
        ),
        (f"name: x\n{BASE}---\n[1, 2]\n", "expected a recipe in each of its documents, got [1, 2]. Mend the file."),
        (f"{BASE}merges: [1]\n", "merges: expected merges by name, got [1]. Give each its name."),
        (
            f"name: x\n{BASE}---\nmerge_method: linear\nmodels: [{{{{model: x+./lora}}}}, {{{{model: x}}}}]\n",
            "models[0].model: x+./lora: an adapter cannot be put on x, a merge of this recipe. Write that one first.",
        ),
        (
            "merge_method: linear\nmodels: [{{model: {a}, revision: main}}]\n",
            "models[0].revision: {a} is a local folder, which has no revisions. Leave it out.",
        ),
        (
            "merge_method: linear\nmodels: [{{model: org/m@v1, revision: v2}}]\n",
            "models[0].revision: org/m@v1 has a revision already. Leave one of the two out.",
        ),
        (
            "merge_method: linear\nmodels: [{{model: org/m, revision: 2}}]\n",
            "models[0].revision: expected a branch, a tag or a commit, got 2.",
        ),
    ],
)
def test_refusals(text: str, message: str, family: pico.Family, tmp_path: Path) -> None:
    path = write(tmp_path, family, text)
    a, b, c = family.models
    assert problems_of(path)[0].endswith(message.format(a=a, b=b, c=c))


def test_a_revision_beside_a_model_is_its_revision(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: linear\nmodels:\n- {model: org/a, revision: v1}\n- {model: {path: org/b, revision: abc}}\n"
    )
    recipe = read_recipe_file(path)
    assert [str(source.name) for source in recipe.models] == ["org/a@v1", "org/b@abc"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_intermediate", "stage9"], "--keep_intermediate: expected one of stage1, drawn, got 'stage9'. Name a merge of the recipe."),
    ],
)  # fmt: skip
def test_keeping_what_is_not_there(
    flags: list[str], message: str, family: pico.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", write(tmp_path, family), "--save_path", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_in_a_stage_is_said_with_its_name(
    family: pico.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = pico.make_family(tmp_path / "other", "gpt2").base
    text = STAGES.replace("{{model: {b}, parameters: {{density: 0.4, weight: 0.5}}}}", f"{{{{model: {other}, parameters: {{{{density: 1}}}}}}}}")  # fmt: skip
    assert run("--config", write(tmp_path, family, text), "--save_path", tmp_path / "out") == 1
    assert f"stage1: {other}: expected a Qwen3ForCausalLM as {family.base}, got a GPT2LMHeadModel" in capsys.readouterr().err  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_keeping_needs_a_recipe_with_names(
    family: pico.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "linear", "--base_model", family.base, "--models_to_merge", f"{family.models[0]},{family.models[1]}"]  # fmt: skip
    assert run(*flags, "--save_path", tmp_path / "out", "--keep_intermediate", "x") == 2
    expected = "--keep_intermediate: expected a recipe with named merges, got 'x'. Name a merge of the recipe."
    assert expected in capsys.readouterr().err


def test_a_stage_that_runs_its_models_has_to_be_kept(
    family: pico.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = "name: x\nmerge_method: regmean\nbase_model: {base}\nmodels: [{{model: {a}, data: a.txt}}, {{model: {b}, data: b.txt}}]\n"
    recipe = write(
        tmp_path, family, f"{stage}---\nmerge_method: linear\nmodels: [{{{{model: x}}}}, {{{{model: {{c}}}}}}]\n"
    )
    assert run("--config", recipe, "--save_path", tmp_path / "out") == 1
    assert (
        "x: regmean runs its models, which a merge that is computed as it is read cannot. Add --keep_intermediate x."
        in capsys.readouterr().err
    )


def test_a_stage_gives_its_tokenizer(family: pico.Family, tmp_path: Path) -> None:
    text = STAGES.replace("parameters: {{t: 0.3}}", "parameters: {{t: 0.3}}\ntokenizer_source: drawn")
    assert run("--config", write(tmp_path, family, text), "--save_path", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["tokenizer_source"] == "drawn"
