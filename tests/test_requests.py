"""A request is values: the same from flags, from a recipe file and from Python, and compared as such; each door names its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge
import performAIM
from aim import AimRequest, Calibration, CalibrationData, Omega, Relaxing, perform_aim, read_request
from aim.omegas import read_omega, read_omegas
from aim.reading import agree, make_request, read_section, read_values
from checkpoints.errors import ArgumentError, InputError
from commands import aim_flags
from commands.command_line import show_flag
from commands.merge import build_parser
from examples import merge_api
from merging import RunOptions, make_recipe, read_recipe_file
from merging import merge as merge_models
from streaming.values import split_filters

INPUTS = Path(__file__).parent / "goldens" / "inputs"
MODELS = [{"model": "in/math"}, {"model": "in/code"}]
TIES: dict[str, Any] = {"merge_method": "ties", "base_model": "in/base", "models": MODELS}
CALIBRATION = {"source": "in/calib.jsonl.gz", "n_samples": 8, "block_size": 64}
FLAGS = ["--method=ties", "--base_model=in/base", "--models_to_merge=in/math,in/code", "--density=1"]
CALIBRATION_FLAGS = ["--calibration_data=in/calib.jsonl.gz", "--n_samples=8", "--block_size=64"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the golden models in `in`."""
    shutil.copytree(INPUTS, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(recipe: Any) -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def refusal(capsys: pytest.CaptureFixture[str], recipe: Any, *flags: str) -> str:
    """What merge.py says of a recipe file that it refuses."""
    write(recipe)
    assert merge.main(["--config=recipe.yml", "--save_path=out", *flags]) in (1, 2)
    assert not Path("out").exists()
    return capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- values


def test_flags_a_block_and_python_make_the_same_request(here: Path):
    typed = ["--omega=mlp=0.20,0.6", "--control=permuted", "--seed=3", "--batch_size=2", *CALIBRATION_FLAGS]
    by_flags = make_request(aim_flags.read_flags(build_parser().parse(typed)))
    block = {
        "omega": [{"filter": "mlp", "value": 0.2}, {"value": 0.6}],
        "control": "permuted",
        "seed": 3,
        "calibration": {**CALIBRATION, "batch_size": 2},
    }
    by_block = read_request(block)
    by_hand = AimRequest(Relaxing((Omega(0.6, (("mlp", 0.2),)),), control="permuted", seed=3), by_block.statistics)
    assert by_flags == by_block == by_hand
    assert isinstance(by_hand.statistics, Calibration)
    assert by_hand.statistics.data == CalibrationData("in/calib.jsonl.gz", n_samples=8, block_size=64)
    assert by_hand.statistics.options.batch_size == 2


def test_a_block_written_and_read_is_the_same(here: Path):
    values = {"omegas": "0.2,1e-3", "scaling": "sqrt", "statistics": "in/base/config.json"}
    given = read_values(values)
    again = read_section(yaml.safe_load(yaml.safe_dump(given.as_section())), "r.yml")
    assert again.values == given.values
    values = {
        "omega": "a,b=0.2,0.4",
        "control": "permuted",
        "seed": 7,
        "calibration.dtype": "float32",
        "n_samples": "8",
    }
    given = read_values(values)
    again = read_section(json.loads(json.dumps(given.as_section())), "r.yml")
    assert again.values == given.values


@pytest.mark.parametrize("flag", ["--omega=0.40", "--omega=4e-1", "--n_samples=08", "--scaling=identity"])
def test_what_is_equal_as_a_value_is_no_contradiction(here: Path, capsys: pytest.CaptureFixture[str], flag: str):
    write({**TIES, "aim": {"omega": 0.4, "scaling": "identity", "calibration": CALIBRATION}})
    assert merge.main(["--config=recipe.yml", "--save_path=out", "--quiet", flag]) == 0, capsys.readouterr().err


def test_what_differs_is_refused_with_both(here: Path, capsys: pytest.CaptureFixture[str]):
    aim = {"omega": 0.4, "calibration": CALIBRATION}
    said = refusal(capsys, {**TIES, "aim": aim}, "--omega=0.5", "--n_samples=9")
    assert "- --omega: recipe.yml says 0.4 under aim. Leave one of the two out." in said
    assert "- --n_samples: recipe.yml says 8 under aim. Leave one of the two out." in said
    file = read_section({"omegas": [0, 0.4]}, "r.yml")
    with pytest.raises(InputError, match=r"omegas: r.yml says 0,0.4 under aim"):
        make_request(agree(file, read_values({"omegas": "0,0.5"}), "r.yml"))


# ------------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.4", [(None, "0.4")]),
        ("mlp=0.2,0.4", [("mlp", "0.2"), (None, "0.4")]),
        ("a,b=0.2,0.4", [("a,b", "0.2"), (None, "0.4")]),
        ("x{1,2}=0.2, c =0.1,0.4", [("x{1,2}", "0.2"), ("c", "0.1"), (None, "0.4")]),
        ("a=b=0.2,0.4", [("a=b", "0.2"), (None, "0.4")]),
        ("0.2,0.4", [(None, "0.2"), (None, "0.4")]),
        ("mlp=0.2", [("mlp", "0.2")]),
        ("a,b", [(None, "a,b")]),
        ("", [(None, "")]),
    ],
)
def test_filters_as_they_are_typed(text: str, parts: list[tuple[str | None, str]]):
    assert split_filters(text) == parts


def test_a_filter_may_contain_a_comma(here: Path, capsys: pytest.CaptureFixture[str]):
    content = [{"filter": "up,proj", "value": 0.2}, {"filter": "mlp", "value": 0.6}, {"value": 1}]
    omega = read_omega(content)
    assert omega == Omega(1.0, (("up,proj", 0.2), ("mlp", 0.6)))
    assert [omega.of(name) for name in ("a.up,proj.b", "mlp.x", "norm")] == [0.2, 0.6, 1.0]
    assert omega.as_json() == content
    assert read_omega(omega.as_json()) == read_omega(str(omega)) == omega
    said = refusal(capsys, {**TIES, "aim": {"omega": content, "calibration": CALIBRATION}})
    assert "recipe.yml: aim.omega: the filter 'up,proj' is in no name of what is relaxed" in said


def test_omegas_are_told_apart_by_value():
    assert [str(omega) for omega in read_omegas([0, 0.4, 1])] == ["0", "0.4", "1"]
    assert [str(omega) for omega in read_omegas("0.2,0.20000001")] == ["0.2", "0.20000001"]
    with pytest.raises(ArgumentError, match="omegas: expected different numbers"):
        read_omegas("0.2,0.20")


# --------------------------------------------------------------------------------------- what a recipe file gets wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"aim": {"omega": 0.4, "calibration": {**CALIBRATION, "n_samples": 64.0}}}, "recipe.yml: aim.calibration.n_samples: expected a whole number, got 64.0."),
        ({"aim": {"omega": 0.4, "calibration": {"n_samples": 0}}}, "recipe.yml: aim.calibration.n_samples: expected at least 1, got 0."),
        ({"aim": {"omega": 0.4, "calibration": {"seed": -1}}}, "recipe.yml: aim.calibration.seed: expected a whole number from 0"),
        ({"aim": {"omega": 0.4, "calibration": {"dtype": "int8"}}}, "recipe.yml: aim.calibration.dtype: expected auto, float32"),
        ({"aim": {"omega": 0.4, "scaling": "cube"}}, "recipe.yml: aim.scaling: unknown value 'cube'."),
        ({"aim": {"omega": 0.4, "calibration": {"source": "no.txt"}}}, "recipe.yml: aim.calibration.source no.txt: no such file."),
        ({"aim": {"omega": 0.4, "statistics": "no.safetensors"}}, "recipe.yml: aim.statistics no.safetensors: no such file."),
        ({"aim": {"omega": [{"filter": "mlp", "value": "abc"}, {"value": 0.4}], "calibration": CALIBRATION}}, "recipe.yml: aim.omega: expected a number in [0, 1], got 'abc' for the filter 'mlp'."),
        ({"aim": {"omega": [{"filter": "mlp", "value": {}}, {"value": 0.4}]}}, "recipe.yml: aim.omega: expected a number in [0, 1], got a mapping for the filter 'mlp'."),
        ({"aim": {"omega": [{"filter": 3, "value": 0.1}, {"value": 0.4}]}}, "recipe.yml: aim.omega: expected a part of a tensor's name as filter, got 3."),
        ({"aim": {"omega": [0.1, 0.4]}}, "recipe.yml: aim.omega: expected one number for each filter, got several."),
        ({"aim": {"omega": [{"filter": "mlp", "value": 0.1}]}}, "recipe.yml: aim.omega: expected one entry for the rest"),
        ({"parameters": {"lambda": [{"filter": "mlp", "value": "abc"}, {"value": 1}]}}, "recipe.yml: parameters.lambda: expected a finite number, got 'abc' for the filter 'mlp'."),
        ({"tokenizer_source": "nonsense"}, "recipe.yml: tokenizer_source: expected one of base, union"),
        ({"new_token_rows": "zero"}, "recipe.yml: new_token_rows: expected auto or owner or owners_mean or mean"),
        ({"chat_template": "nonsense"}, "recipe.yml: chat_template: unknown template 'nonsense'"),
        ({"exclude": "no_such_tensor"}, "recipe.yml: exclude: 'no_such_tensor' is found in no tensor's name"),
        ({"merge_method": "slerp", "models": MODELS[:1], "parameters": {"t": [{"filter": "mlp", "value": 0.5}]}}, "recipe.yml: parameters.t: says nothing of"),
        ({"models": [{"model": "in/math"}, {"model": "in/../in/math"}]}, "recipe.yml: models"),
        ({"aim": {"omega": 0.4, "calibration": {**CALIBRATION, "tolerance": [1]}}}, "recipe.yml: aim.calibration.tolerance: expected a number, got [1]."),
        ({"aim": {"omega": 0.4, "calibration": {**CALIBRATION, "source": True}}}, "recipe.yml: aim.calibration.source: expected text, got"),
        ({"aim": {"omega": 0.4, "calibration": {**CALIBRATION, "mode": "whole"}}}, "recipe.yml: aim.calibration.mode: belongs to a machine, and to no recipe. Use --calibration_mode."),
        ({"aim": {"omega": 0.4, "calibration": {**CALIBRATION, "texts": 3}}}, "recipe.yml: aim.calibration: unknown key 'texts'."),
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_s_settings_are_named_by_their_place_in_it(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
):
    said = refusal(capsys, {**TIES, **change})
    assert says in said
    assert not {f"--{word}" for word in ("n_samples", "omega ", "tokenizer_source", "exclude", "scaling")} & set(
        said.split()
    )


def test_a_flag_beside_a_recipe_is_named_as_a_flag(here: Path, capsys: pytest.CaptureFixture[str]):
    aim = {"omega": 0.4, "calibration": {"source": "in/calib.jsonl.gz"}}
    said = refusal(capsys, {**TIES, "aim": aim}, "--n_samples=0", "--tokenizer_source=nonsense")
    assert "--n_samples: expected at least 1, got 0." in said
    said = refusal(capsys, TIES, "--exclude=no_such_tensor")
    assert "--exclude: 'no_such_tensor' is found in no tensor's name" in said
    said = refusal(capsys, {**TIES, "aim": aim}, "--max_memory=much", "--calibration_mode=fast", "--figures= ")
    assert "--max_memory: expected a size such as 500MB or 8GB, got 'much'." in said
    assert "--calibration_mode: unknown mode 'fast'." in said or "--figures: expected a folder, got nothing." in said


def test_python_names_settings_bare(here: Path):
    with pytest.raises(InputError, match=r"^seed: expected a whole number from 0"):
        CalibrationData(seed=-1)
    with pytest.raises(InputError, match=r"^exclude: 'no_such_tensor' is found"):
        merge_models(make_recipe("ties", "in/base", "in/math", exclude="no_such_tensor"), "out")
    write({**TIES, "tokenizer_source": "in/nonsense"})
    with pytest.raises(InputError, match=r"^recipe.yml: tokenizer_source: "):
        merge_models(read_recipe_file("recipe.yml"), "out")


def test_every_setting_of_aim_has_its_flag():
    parser = performAIM.build_parser()
    flags = {option for action in parser._actions for option in action.option_strings}
    for flag, name in aim_flags.SETTINGS.items():
        assert show_flag(name, None) == f"--{flag}"
        assert f"--{flag}" in flags


# ------------------------------------------------------------------------------------------------------------- from Python


def test_a_merge_with_aim_is_one_call(here: Path):
    assert merge.main([*FLAGS, "--omega=0.4", *CALIBRATION_FLAGS, "--save_path=command", "--quiet"]) == 0
    recipe = make_recipe("ties", "in/base", "in/math,in/code", parameters={"density": 1})
    request = AimRequest(Relaxing((Omega(0.4),)), Calibration(CalibrationData(**CALIBRATION)))  # type: ignore[arg-type]
    moved: list[int] = []
    result = merge_models(recipe, "call", progress=moved.append, aim=request)
    assert not result.was_complete
    assert Path("call/model.safetensors").read_bytes() == Path("command/model.safetensors").read_bytes()
    assert sum(moved) == result.written.bytes_read + result.plan.bytes_to_write
    assert merge_models(recipe, "call", aim=request).was_complete
    with pytest.raises(InputError, match="not empty"):
        merge_models(recipe, "call")
    written = json.loads(Path("command/merge_recipe.json").read_text())
    with pytest.raises(InputError, match=r"command/merge_recipe.json: aim: the recipe asks for AIM"):
        merge_models(read_recipe_file("command/merge_recipe.json"), "again")
    again = merge_models(
        read_recipe_file("command/merge_recipe.json"), "again", aim=read_request(written["aim"], "command")
    )
    assert again.save_path == Path("again")
    assert Path("again/model.safetensors").read_bytes() == Path("command/model.safetensors").read_bytes()


def test_a_relaxation_is_one_call(here: Path):
    flags = ["--merged_model=in/math", "--pretrained_model_name=in/base", "--omega=0.2", *CALIBRATION_FLAGS]
    assert performAIM.main([*flags, "--save_path=command", "--quiet"]) == 0
    request = AimRequest(Relaxing((Omega(0.2),)), Calibration(CalibrationData(**CALIBRATION)))  # type: ignore[arg-type]
    result = perform_aim("in/math", "in/base", "call", request, RunOptions(quiet=True))
    assert result.written.bytes_written > 0
    assert Path("call/model.safetensors").read_bytes() == Path("command/model.safetensors").read_bytes()
    again = perform_aim("in/math", "in/base", "call", request)
    assert again.was_complete
    assert again.written.bytes_written == 0


def test_a_merge_called_twice_says_that_it_was_complete(here: Path, capsys: pytest.CaptureFixture[str]):
    recipe = make_recipe("ties", "in/base", "in/math,in/base")
    first = merge_models(recipe, "out")
    second = merge_models(recipe, "out")
    assert (first.was_complete, second.was_complete) == (False, True)
    assert first.message == ""
    assert second.message == "out: is complete already, made of the same inputs in the same way."
    assert second.report == first.report
    assert second.warnings == first.warnings != []
    assert second.written.bytes_written == 0
    for _ in range(2):
        assert merge_api.main(["in/base", "in/math", "--save_path=halfway"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]
    assert lines[0].startswith("halfway: |merged - base| / |base| = 0.")


def test_both_commands_say_that_it_is_complete(here: Path, capsys: pytest.CaptureFixture[str]):
    for main, flags in (
        (merge.main, FLAGS),
        (performAIM.main, ["--merged_model=in/math", "--pretrained_model_name=in/base", *CALIBRATION_FLAGS]),
    ):
        shutil.rmtree("out", ignore_errors=True)
        assert main([*flags, "--save_path=out", "--quiet"]) == 0
        capsys.readouterr()
        for more in ([], ["--dry_run"]):
            assert main([*flags, "--save_path=out", "--quiet", *more]) == 0
            assert capsys.readouterr().out == "out: is complete already, made of the same inputs in the same way.\n"
