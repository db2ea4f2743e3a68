"""What an earlier version left on a disk is still read, gone on with and made again: recipes, statistics, unfinished runs.

tests/data/before holds what the commands below wrote at commit b1884ca, the folder of the inputs replaced by `INPUTS`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import merge
import performAIM
from aim.activations import load_activations
from checkpoints.provenance import versions
from checkpoints.work_folder import STATE
from merging.recipe_file import read_recipe_file

DATA = Path(__file__).parent / "data" / "before"
INPUTS = Path(__file__).parent / "goldens" / "inputs"
CALIBRATION = ["--calibration_data=in/calib.jsonl.gz", "--n_samples=8", "--block_size=64"]
MODELS = ["--base_model=in/base", "--models_to_merge=in/math,in/code"]
RELAX = ["--merged_model=in/math", "--pretrained_model_name=in/base"]
RUNS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "merge": (merge.main, ["--method=ties", "--density=0.3", "--exclude=lm_head", *MODELS]),
    "merge_aim": (merge.main, ["--method=dare_ties", "--seed=3", "--omega=mlp=0.2,0.6", *CALIBRATION, *MODELS]),
    "sweep": (
        merge.main,
        ["--method=linear", "--omegas=0,0.4", "--control=permuted", "--seed=5", *CALIBRATION, *MODELS],
    ),
    "perform_aim": (performAIM.main, ["--omega=0.2", "--scaling=sqrt", *RELAX, *CALIBRATION]),
    "perform_aim_reference": (performAIM.main, ["--numerics=reference", *RELAX, *CALIBRATION]),
    "from_file": (performAIM.main, ["--activations=activations.safetensors", *RELAX]),
}
CHANGING = {"versions", "command", "identity", "mtime_ns", "torch", "transformers"}
"""Keys whose values are of the machine, the moment, or the version."""
NEW = {"attention", "difference", "largest_abs", "mean_energy", "mode", "side_files", "threads", "tokens", "tolerance"}
"""Keys that the version of before did not write."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the golden models in `in` and the statistics of before."""
    shutil.copytree(INPUTS, tmp_path / "in")
    shutil.copy(DATA / "activations.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settled(content: Any, folder: Path) -> Any:
    """A recipe without what changes from run to run; the order of keys counts."""
    if isinstance(content, dict):
        return [(key, settled(value, folder)) for key, value in content.items() if key not in CHANGING | NEW]
    if isinstance(content, list):
        return [settled(value, folder) for value in content]
    return content.replace(f"{folder.resolve()}/in/", "INPUTS/") if isinstance(content, str) else content


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_differs_in_time_version_and_command_only(here: Path, name: str):
    main, flags = RUNS[name]
    assert main([*flags, "--save_path=out", "--quiet", "--digest_hash=sha256"]) == 0
    written = sorted(Path("out").rglob("merge_recipe.json"))
    assert len(written) == (2 if name == "sweep" else 1)
    for ours in written:
        before = DATA / "recipes" / ("_".join([name, *ours.parts[1:-1]]) + ".json")
        assert settled(json.loads(ours.read_text()), here) == settled(json.loads(before.read_text()), here)


def adopt(run: Path, here: Path) -> None:
    """Make an unfinished run one of this machine: its inputs lie here, and have the times that they have here."""
    identity = json.loads(run.read_text().replace("INPUTS/", f"{here.resolve()}/in/"))
    identity["versions"] = versions()
    for entry in identity["inputs"]:
        for name, file in entry["files"].items():
            file["mtime_ns"] = Path(entry["folder"], name).stat().st_mtime_ns
    if identity["aim"]:
        identity["aim"]["calibration"]["mtime_ns"] = Path("in/calib.jsonl.gz").stat().st_mtime_ns
    run.write_text(json.dumps(identity, indent=1))


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (DATA / "unfinished").iterdir() if path.name != "merge_aim")
)
def test_an_unfinished_run_is_gone_on_with(here: Path, capsys: pytest.CaptureFixture[str], name: str):
    main, flags = RUNS[name]
    assert main([*flags, "--save_path=whole", "--quiet"]) == 0
    shutil.copytree(DATA / "unfinished" / name, "out.partial")
    Path("out.partial", "state").rename(Path("out.partial", STATE))
    adopt(Path("out.partial", STATE, "run.json"), here)
    assert main([*flags, "--save_path=out"]) == 0
    # Taken for the same run: not refused, and nothing in it is used whose checksum was not written down then.
    assert "8 tensors that an earlier run finished" in capsys.readouterr().err
    for path in Path("whole").iterdir():
        same = Path("out", path.name).read_bytes() == path.read_bytes()
        assert same or path.name in ("README.md", "merge_recipe.json"), path.name


def test_an_unfinished_run_whose_calibration_would_be_another_today_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    """It ran on all of the text in the checkpoint's dtype; the same flags now stop when it is enough, in the faster dtype."""
    main, flags = RUNS["merge_aim"]
    shutil.copytree(DATA / "unfinished" / "merge_aim", "out.partial")
    Path("out.partial", "state").rename(Path("out.partial", STATE))
    adopt(Path("out.partial", STATE, "run.json"), here)
    assert main([*flags, "--save_path=out"]) == 1
    assert "holds an unfinished run that differs in aim.calibration" in capsys.readouterr().err.splitlines()[-1]


def test_an_unfinished_run_of_another_request_is_refused_in_one_message(here: Path, capsys: pytest.CaptureFixture[str]):
    main, flags = RUNS["merge"]
    shutil.copytree(DATA / "unfinished" / "merge", "out.partial")
    Path("out.partial", "state").rename(Path("out.partial", STATE))
    adopt(Path("out.partial", STATE, "run.json"), here)
    assert main([*flags, "--lambda=0.5", "--save_path=out"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "holds an unfinished run that differs in recipe.parameters.lambda (1.0 there, 0.5 here)" in err


def test_a_recipe_with_aim_means_what_it_meant(here: Path):
    """What --write_config wrote, and the merge_recipe.json of a merge with AIM."""
    shutil.copy(DATA / "recipe.yml", here)
    assert merge.main(["--config=recipe.yml", "--save_path=file", "--quiet"]) == 0
    flags = ["--method=ties", "--density=0.3", "--omega=mlp=0.2,0.6", "--control=permuted", "--seed=2", *CALIBRATION]
    assert merge.main([*flags, *MODELS, "--save_path=flags", "--quiet"]) == 0
    assert Path("file/model.safetensors").read_bytes() == Path("flags/model.safetensors").read_bytes()
    record = DATA / "recipes" / "merge_aim.json"
    assert merge.main([f"--config={record}", "--save_path=again", "--quiet"]) == 0
    main, flags = RUNS["merge_aim"]
    assert main([*flags, "--save_path=same", "--quiet"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    assert read_recipe_file(record).aim is not None


def test_statistics_are_read():
    activations = load_activations(DATA / "activations.safetensors")
    assert activations.calibration["n_samples"] == 8
    assert len(activations.statistics) == 20
