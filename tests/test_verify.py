"""merge.py --verify, and what is said of parameters that do nothing or too much."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
import performAIM
from merging import make_recipe
from merging.remarks import remarks
from tests.scene import call

INPUTS = Path(__file__).parent / "goldens" / "inputs"
CALIBRATION = [f"--calibration_data={INPUTS / 'calib.jsonl.gz'}", "--n_samples=8", "--block_size=64"]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in three files, a sweep, a relaxed model, and a merge without digests."""
    folder = tmp_path_factory.mktemp("results")
    models = [f"--base_model={INPUTS / 'base'}", f"--models_to_merge={INPUTS / 'math'},{INPUTS / 'code'}", "--quiet"]
    call(merge, *models, "--method=ties", "--max_shard_size=80kB", f"--save_path={folder / 'merged'}")
    call(merge, *models, "--method=ties", "--digest=none", f"--save_path={folder / 'undigested'}")
    sweep = ["--method=linear", "--omegas=0,0.5", *CALIBRATION, f"--save_path={folder / 'sweep'}"]
    call(merge, *models, *sweep)
    relax = [
        f"--merged_model={folder / 'merged'}",
        f"--pretrained_model_name={INPUTS / 'base'}",
        *CALIBRATION,
        "--quiet",
    ]
    call(performAIM, *relax, f"--save_path={folder / 'relaxed'}")
    return folder


@pytest.mark.parametrize("name", ["merged", "undigested", "sweep", "relaxed"])
def test_what_a_run_wrote_is_as_written(results, name):
    said = call(merge, f"--verify={results / name}")
    assert said.out.count("as written") == (2 if name == "sweep" else 1)
    assert ("no digests" in said.err) == (name == "undigested")


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def flip(folder: Path) -> None:
    path = first_file(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(folder: Path) -> None:
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-2])


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))


def forge(folder: Path, side_files: object) -> None:
    recipe = json.loads((folder / "merge_recipe.json").read_text())
    (folder / "merge_recipe.json").write_text(json.dumps(recipe | {"side_files": side_files}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip, "its bytes are not those that the run wrote"),
    "the end": (shorten, "bytes, got"),
    "a file": (lambda folder: first_file(folder).unlink(), "is missing"),
    "one more": (lambda folder: shutil.copy(first_file(folder), folder / "more.safetensors"), "did not write it"),
    "config": (change_config, "config.json: expected"),
    "config, as long": (
        lambda folder: (folder / "config.json").write_bytes(
            (folder / "config.json").read_bytes().replace(b"\n", b" ", 1)
        ),
        "config.json: its bytes are not those that the run wrote",
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "card": (lambda folder: (folder / "README.md").write_text("# mine"), "README.md: expected"),
    "index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json: expected"),
    "a program": (lambda folder: (folder / "modeling_evil.py").touch(), "modeling_evil.py: the run did not write it"),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").touch(),
        "adapter_config.json: the run did not write it",
    ),
    "in a folder": (
        lambda folder: ((folder / "more").mkdir(), (folder / "more" / "x").touch()),
        "more/x: the run did not write it",
    ),
    "a link": (lambda folder: (folder / "more").symlink_to(".."), "more: the run did not write it"),
    "a pipe": (
        lambda folder: ((folder / "README.md").unlink(), os.mkfifo(folder / "README.md")),
        "README.md: is no file",
    ),
    "recipe": (lambda folder: (folder / "merge_recipe.json").write_text("{}"), "expected a recipe of ours"),
    "path": (
        lambda folder: (folder / "merge_recipe.json").write_text('{"outputs": {"../x": {"bytes": 1}}}'),
        "expected a recipe of ours",
    ),
    "forged sizes": (
        lambda folder: forge(folder, {"README.md": {"bytes": int("9" * 400), "sha256": "0"}}),
        "a recipe of ours",
    ),
    "forged digests": (lambda folder: forge(folder, {"README.md": {"bytes": 1, "sha256": [1]}}), "a recipe of ours"),
    "forged names": (lambda folder: forge(folder, {"../x": {"bytes": 1, "sha256": "0"}}), "a recipe of ours"),
    "forged list": (lambda folder: forge(folder, [1]), "a recipe of ours"),
    "too deep": (lambda folder: (folder / "merge_recipe.json").write_text("[" * 100_000), "a recipe of ours"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(results, tmp_path, name):
    damage, says = DAMAGE[name]
    folder = shutil.copytree(results / "merged", tmp_path / "copy")
    damage(folder)
    ended = call(merge, f"--verify={folder}", code=1)
    assert says in ended.err


def test_every_file_of_a_result_has_its_digest(results):
    for folder in (results / "merged", results / "sweep" / "omega_0.5", results / "relaxed"):
        recipe = json.loads((folder / "merge_recipe.json").read_text())
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there == {"merge_recipe.json", *recipe["outputs"], *recipe["side_files"]}
        for name, entry in recipe["side_files"].items():
            content = (folder / name).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_result_of_an_earlier_version_is_verified_as_far_as_its_recipe_says(results, tmp_path):
    folder = shutil.copytree(results / "merged", tmp_path / "copy")
    recipe = json.loads((folder / "merge_recipe.json").read_text())
    del recipe["side_files"]
    (folder / "merge_recipe.json").write_text(json.dumps(recipe))
    (folder / "README.md").write_text("# mine")
    said = call(merge, f"--verify={folder}")
    assert "as written" in said.out
    assert "has no digests of config, tokenizer and other small files" in said.err
    flip(folder)
    call(merge, f"--verify={folder}", code=1)


def test_hidden_files_beside_a_result_are_not_its_own(results, tmp_path):
    """What git and the hub's client keep there."""
    folder = shutil.copytree(results / "merged", tmp_path / "copy")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x").touch()
    (folder / ".gitattributes").touch()
    call(merge, f"--verify={folder}")


def test_numbers_that_are_not_finite_are_found(results, tmp_path):
    """Without digests nothing else tells."""
    folder = shutil.copytree(results / "undigested", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][1, 2] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    size = (folder / "model.safetensors").stat().st_size
    recipe = json.loads((folder / "merge_recipe.json").read_text())
    recipe["outputs"]["model.safetensors"]["bytes"] = size
    (folder / "merge_recipe.json").write_text(json.dumps(recipe))
    ended = call(merge, f"--verify={folder}", code=1)
    assert f"{UP}: holds a NaN or an infinity" in ended.err


def test_a_folder_that_no_run_wrote(tmp_path):
    ended = call(merge, f"--verify={tmp_path}", code=1)
    assert "expected merge_recipe.json, got none" in ended.err


@pytest.mark.parametrize(
    ("method", "parameters", "says"),
    [
        ("task_arithmetic", {}, []),
        ("ties", {"density": "0.5,1"}, []),
        ("task_arithmetic", {"lambda": 0}, ["lambda 0"]),
        ("ties", {"density": 1}, ["density 1: ties drops and trims nothing."]),
        ("dare_linear", {"density": 0}, ["density 0: every change is dropped"]),
        ("task_arithmetic", {"weight": "0,0"}, ["weight 0 for every model"]),
        ("task_arithmetic", {"weight": "1,-1"}, ["weights that sum to 0: the task vectors are subtracted"]),
        ("task_arithmetic", {"weight": "1,-1.5"}, ["weights that sum to -0.5"]),
        ("task_arithmetic", {"weight": "2,1"}, ["weights times lambda sum to 3 for 2 models"]),
        ("task_arithmetic", {"weight": "2,1", "normalize": True}, []),
        ("task_arithmetic", {"lambda": 1.5}, ["weights times lambda sum to 3 for 2 models"]),
        ("linear", {"weight": "0.7,0.7", "normalize": False}, ["weights that sum to 1.4 without normalize"]),
        ("linear", {"weight": "0.7,0.7"}, []),
        ("linear", {"weight": "0.7,0.3", "normalize": False}, []),
        ("widen", {}, []),
    ],
)
def test_remarks(method, parameters, says):
    found = remarks(make_recipe(method, "base", "a,b", parameters=parameters))
    assert len(found) == len(says)
    for remark, part in zip(found, says, strict=True):
        assert part in remark


def test_remarks_are_printed_logged_and_recorded(tmp_path):
    models = [f"--base_model={INPUTS / 'base'}", f"--models_to_merge={INPUTS / 'math'}"]
    out, log = tmp_path / "out", tmp_path / "run.jsonl"
    flags = [*models, "--method=ties", "--density=1", f"--save_path={out}", f"--log_file={log}", "--quiet"]
    ended = call(merge, *flags)
    says = "density 1: ties drops and trims nothing."
    assert ended.err == f"warning: {says}\n"
    assert json.loads((out / "merge_recipe.json").read_text())["warnings"] == [says]
    assert [
        json.loads(line)["message"] for line in log.read_text().splitlines() if '"warning"' in line.split("warnings")[0]
    ] == [says]
