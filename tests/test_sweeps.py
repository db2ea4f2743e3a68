"""merge.py --lambdas and --densities: each checkpoint of a sweep is the one that a merge by itself writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import merge
from checkpoints.writer import CheckpointWriter
from merging.moments_pass import MomentsPass
from merging.sweep import read_sweep
from tests.pico import Family, make_family
from tests.scene import Scene, call, names

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("sweep"), "llama", n_models=2)


def flags(family: Family, method: str = "ties") -> list[object]:
    return [f"--method={method}", "--base_model", family.base, "--models_to_merge", names(family.models)]


def test_each_checkpoint_is_that_of_a_merge_by_itself(family: Family, tmp_path: Path):
    ended = call(merge, *flags(family), "--lambdas=0.3,1", "--densities=0.2,0.7", "--save_path", tmp_path / "out")
    assert "4 merges are written from one reading" in ended.err
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {f"lambda_{a}_density_{b}" for a in ("0.3", "1") for b in ("0.2", "0.7")}
    for folder in folders:
        _, lambda_, _, density = folder.split("_")
        alone = tmp_path / folder
        call(merge, *flags(family), f"--lambda={lambda_}", f"--density={density}", "--save_path", alone)
        assert (tmp_path / "out" / folder / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()
        scene = Scene(tmp_path, merge)
        mine, its = scene.recipe(f"out/{folder}"), scene.recipe(folder)
        for key in ("parameters", "models", "merge_method", "outputs", "report"):
            assert mine[key] == its[key], key
        assert f"density `{density}`" in (tmp_path / "out" / folder / "README.md").read_text() or f"| {density} |" in (tmp_path / "out" / folder / "README.md").read_text()  # fmt: skip
    assert "as written" in call(merge, "--verify", tmp_path / "out").out
    assert "is complete already" in call(merge, *flags(family), "--lambdas=0.3,1", "--densities=0.2,0.7", "--save_path", tmp_path / "out").out  # fmt: skip
    # Another sweep takes its place only where that is said.
    call(merge, *flags(family), "--lambdas=0.3", "--density=0.2", "--save_path", tmp_path / "out", code=2)
    call(merge, *flags(family), "--lambdas=0.3", "--density=0.2", "--overwrite", "--save_path", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lambda_0.3"]


def write_texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(f'{{"text": "the merge of weights and norms {n} to the channels of 42 models"}}\n' for n in range(40)))  # fmt: skip
    return path


@pytest.mark.parametrize("aim", [("--omegas=0,0.4",), ("--omega=0.3", "--protect=mean"), ("--omega=mlp=0.2,0.6",)])
def test_a_sweep_with_aim_relaxes_each_merge(family: Family, tmp_path: Path, aim: tuple[str, ...]):
    """Calibrated once; each folder has the bytes, the `aim:` block and the report of a run by itself."""
    statistics = tmp_path / "statistics.safetensors"
    taken = ["--calibration_data", write_texts(tmp_path), "--n_samples=4", "--block_size=64", "--save_activations", statistics]  # fmt: skip
    ended = call(merge, *flags(family), "--lambdas=0.3,1", "--density=0.5", *aim, *taken, "--save_path", tmp_path / "out")  # fmt: skip
    assert ended.err.count("loading") == 1
    omegas = ["omega_0", "omega_0.4"] if "--omegas=0,0.4" in aim else [""]
    folders = {"_".join(filter(None, (first, then))) for first in ("lambda_0.3", "lambda_1") for then in omegas}
    assert {path.name for path in (tmp_path / "out").iterdir()} == folders
    for lambda_ in ("0.3", "1"):
        assert f"lambda_{lambda_}" in ended.out
        alone = tmp_path / lambda_
        call(merge, *flags(family), f"--lambda={lambda_}", "--density=0.5", *aim, "--activations", statistics, "--save_path", alone)  # fmt: skip
        for omega in omegas:
            mine, its = tmp_path / "out" / "_".join(filter(None, (f"lambda_{lambda_}", omega))), alone / omega
            assert (mine / WEIGHTS).read_bytes() == (its / WEIGHTS).read_bytes()
            said = [json.loads((folder / "merge_recipe.json").read_text()) for folder in (mine, its)]
            for key in ("parameters", "aim", "outputs", "report"):
                assert said[0][key] == said[1][key], key
            assert "elaxed" in (mine / "README.md").read_text()
    assert "as written" in call(merge, "--verify", tmp_path / "out").out
    again = call(merge, *flags(family), "--lambdas=0.3,1", "--density=0.5", *aim, *taken, "--save_path", tmp_path / "out")  # fmt: skip
    assert "is complete already" in again.out


def test_a_sweep_of_a_recipe_with_aim(family: Family, tmp_path: Path):
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family.base}\nmodels:\n"
        + "".join(f"- {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in family.models)
        + f"aim: {{omega: 0.2, calibration: {{source: {write_texts(tmp_path)}, n_samples: 4, block_size: 64}}}}\n"
    )
    config = ["--config", tmp_path / "recipe.yml"]
    plan = json.loads(call(merge, *config, "--lambdas=0.4,0.6", "--save_path", tmp_path / "out", "--dry_run", "--json").out)  # fmt: skip
    assert plan["aim"]["omegas"] == ["0.2"]
    call(merge, *config, "--lambdas=0.4,0.6", "--save_path", tmp_path / "out")
    text = (tmp_path / "recipe.yml").read_text()
    (tmp_path / "recipe.yml").write_text(f"{text}parameters: {{lambda: 0.6}}\n")
    call(merge, *config, "--save_path", tmp_path / "alone")
    assert (tmp_path / "out/lambda_0.6" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_a_sweep_of_regmean_runs_the_models_once(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = [f"--model_data={write_texts(tmp_path)},{tmp_path / 'texts.jsonl'}"]
    passes: list[object] = []
    parts = MomentsPass.parts
    monkeypatch.setattr(MomentsPass, "parts", lambda self, *rest: passes.append(self) or parts(self, *rest))
    call(merge, *flags(family, "regmean"), *data, "--lambdas=0.3,1", "--save_path", tmp_path / "out")
    assert len(passes) == 1
    for lambda_ in ("0.3", "1"):
        alone = tmp_path / lambda_
        call(merge, *flags(family, "regmean"), *data, f"--lambda={lambda_}", "--save_path", alone)
        mine = tmp_path / "out" / f"lambda_{lambda_}" / WEIGHTS
        assert mine.read_bytes() == (alone / WEIGHTS).read_bytes()
    scene = Scene(tmp_path, merge, {"--method": "regmean", "--base_model": family.base, "--models_to_merge": names(family.models)})  # fmt: skip
    scene.refuse(*data, "--inputs=merged", "--lambdas=0.3,1", says=("--inputs merged: runs every model behind",))


def test_a_sweep_of_a_recipe_file(family: Family, tmp_path: Path):
    """The values take the place of the file's, gradients over the layers included."""
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family.base}\nmodels:\n"
        + "".join(f"- {{model: {model}, parameters: {{weight: [0.2, 0.8]}}}}\n" for model in family.models)
        + "parameters: {lambda: [0.1, 0.9]}\n"
    )
    call(merge, "--config", tmp_path / "recipe.yml", "--lambdas=0.4,0.6", "--save_path", tmp_path / "out")
    text = (tmp_path / "recipe.yml").read_text()
    (tmp_path / "recipe.yml").write_text(text.replace("[0.1, 0.9]", "0.6"))
    call(merge, "--config", tmp_path / "recipe.yml", "--save_path", tmp_path / "alone")
    assert (tmp_path / "out/lambda_0.6" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_a_sweep_that_was_cut_off_goes_on(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = [*flags(family, "task_arithmetic"), "--lambdas=0.3,0.6", "--workers=1", "--save_path"]
    call(merge, *sweep, tmp_path / "whole")
    monkeypatch.setattr("streaming.commits.COMMIT_S", 0.0)
    monkeypatch.setattr("streaming.output.TURN_BYTES", 1)
    write, calls = CheckpointWriter.write, []

    def cut_off(self: CheckpointWriter, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 25:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "write", cut_off)
    call(merge, *sweep, tmp_path / "out", code=130)
    assert "going on" in call(merge, *sweep, tmp_path / "out").err
    for folder in ("lambda_0.3", "lambda_0.6"):
        assert (tmp_path / "out" / folder / WEIGHTS).read_bytes() == (
            tmp_path / "whole" / folder / WEIGHTS
        ).read_bytes()


def test_sweeps_that_are_none(family: Family, tmp_path: Path):
    scene = Scene(tmp_path, merge, {"--method": "ties", "--base_model": family.base, "--models_to_merge": names(family.models), "--density": 0.5})  # fmt: skip
    scene.refuse("--lambdas=0.3,x", says=("--lambdas: expected numbers separated by commas, got '0.3,x'",))
    scene.refuse("--lambdas=0.3,0.30", says=("--lambdas: expected different numbers",))
    scene.refuse("--lambdas=0.3", "--lambda=0.5", says=("--lambdas: excludes --lambda",))
    scene.refuse("--densities=0.3", says=("--densities: excludes --density",))
    scene.refuse("--lambdas=0.3,1", "--as_lora", says=("--lambdas: excludes --as_lora",))
    scene.refuse("--method=linear", "--lambdas=0.3", says=("--lambda: linear does not use it",))
    del scene.needed["--density"]  # type: ignore[union-attr, attr-defined]
    scene.refuse("--densities=0.3,1.5", says=("--densities: expected a number in [0, 1]",))
    said = scene.run("--densities=0.3,0.5", "--dry_run").out
    assert "2 merges are written from one reading" in said
    assert read_sweep({"lambdas": None, "densities": None}, merge_recipe(family)) == {}


def merge_recipe(family: Family):  # type: ignore[no-untyped-def]
    from merging import make_recipe

    return make_recipe("ties", str(family.base), names(family.models), parameters={"density": "0.5"})
