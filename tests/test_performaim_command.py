"""performAIM.py and merge.py --omega as a user meets them: what they print, write and refuse.

What the numbers are is checked elsewhere (test_aim_*.py). Here the commands run in this process, on the golden family and
on pico models.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import aim.step
import merge
import performAIM
from tests.fake_hub import FakeHub
from tests.pico import ARCHITECTURES, copy_tokenizer, make_family
from tests.scene import Scene, call, snapshot

INPUTS = Path(__file__).parent / "goldens" / "inputs"
TEXTS = INPUTS / "calib.jsonl.gz"
UP = "model.layers.0.mlp.up_proj.weight"
CALIBRATION = {"--calibration_data": str(TEXTS), "--n_samples": "8", "--block_size": "64"}
WIDE = tuple(
    f"{after}{key}"
    for after in ("", "after_first.")
    for key in ("mean_abs", "mean_sq", "mean", "max_abs", "max_at")
    if not after or key.startswith("mean")
)
CHECKPOINT = ["README.md", "config.json", "merge_recipe.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A base and a model merged from fine-tunes of it, and the command that relaxes it; a calibration is work."""
    folder = tmp_path / "models"
    for name, source in (("base", "base"), ("merged", "math")):
        shutil.copytree(INPUTS / source, folder / name)
    begun: list[object] = []
    calibrate = aim.step.calibrate
    monkeypatch.setattr(
        aim.step, "calibrate", lambda *given, **named: begun.append(given) or calibrate(*given, **named)
    )
    return Scene(folder, performAIM, needed_by(folder), work=lambda: len(begun))


def needed_by(folder: Path) -> Callable[[Mapping[str, str]], dict[str, object]]:
    """Flags that a run in a folder needs beside given ones: models, and the calibration, if statistics are not loaded."""
    models = {"--merged_model": folder / "merged", "--pretrained_model_name": folder / "base"}
    return lambda given: models if "--activations" in given else {**models, **CALIBRATION}


@pytest.fixture(scope="session")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the golden base."""
    folder = tmp_path_factory.mktemp("statistics")
    file = folder / "activations.safetensors"
    flags = {"--merged_model": INPUTS / "math", "--pretrained_model_name": INPUTS / "base", **CALIBRATION}
    Scene(folder, performAIM, flags).run("--save_activations", file, "--quiet")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a checkpoint's tensors anew after `change`, which works in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def recipe(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge_recipe.json").read_text())
    return content


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- what a run says


def test_what_a_run_prints_and_writes(scene):
    _, out, err = scene.run()
    short = "calibration: 384 tokens of text, fewer than the 2,048 after which both halves are first compared: all of it is used"
    assert err == f"loading {scene.base}\n{short}\n"
    lines = out.splitlines()
    # Of the first 57 texts in the order of the shuffle, 49 have more than 64 tokens.
    assert re.fullmatch(
        rf"calibration: 8 texts of {re.escape(str(TEXTS))} \(49 passed over as longer than 64 tokens, 0 as empty\), "
        r"6 blocks of 64 tokens, 11 tokens left over",
        lines[0],
    )
    assert re.fullmatch(
        r"calibrated on 384 tokens in \d+\.\d\d s, [\d,]+ tokens/s, in bfloat16",
        lines[1],
    )
    header = next(line for line in lines if line.startswith("layer"))
    assert header.split("  ")[-5:] == ["tensors", "mean s", "median s", "s > 0.5", "largest/median"]
    kinds = [line.split()[:2] for line in lines[lines.index(header) + 1 :][:12]]
    assert kinds[0] == ["lm_head", "1"]
    assert kinds[4] == ["model.layers.*.mlp.up_proj", "2"]
    assert kinds[11] == ["all", "20"]
    assert "outlier channels: none has 10 times the median s of its tensor" in lines
    assert re.search(r"^omega 0\.4: 20 tensors relaxed, 1 copied; mean s 0\.\d{3}, \d\d\.\d % of their task", out, re.M)
    assert "copied as merged:\n      1 x model.embed_tokens.weight (an embedding)\n" in out
    assert lines[-1].startswith(f"{scene.out}: read 411.39 kB, wrote 227.06 kB in ")
    assert names(scene.out) == CHECKPOINT
    assert names(scene.folder) == ["base", "merged", "out"]


def test_the_result_is_a_model(scene):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scene.run()
    model = AutoModelForCausalLM.from_pretrained(scene.out, local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(scene.out, local_files_only=True)) == 300
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (scene.out / name).read_bytes() == (scene.merged / name).read_bytes()


def test_recipe_says_what_was_done(scene):
    scene.run("--control", "permuted", "--seed", "3", "--scaling", "sqrt", "--omega", "self_attn=1,mlp=0.2,0.4")
    content = recipe(scene.out)
    aim_block = content["aim"]
    assert content["merge_method"] == "passthrough"
    assert [entry["model"] for entry in content["inputs"]] == [str(scene.base), str(scene.merged)]
    assert content["outputs"]["model.safetensors"]["bytes"] == 227056
    assert {key: aim_block[key] for key in ("omega", "scaling", "control", "seed", "numerics", "relaxed")} == {
        "omega": "self_attn=1,mlp=0.2,0.4", "scaling": "sqrt", "control": "permuted", "seed": 3, "numerics": "float32",
        "relaxed": 12,
    }  # fmt: skip
    calibration = aim_block["calibration"]
    counts = {"texts": 8, "too_long": 49, "empty": 0, "blocks": 6, "dropped_tokens": 11, "seed": 42}
    assert {key: calibration[key] for key in counts} == counts
    assert sum(entry["count"] for entry in aim_block["kept"]) == 21 - 12
    assert {"tensors": "model.layers.*.self_attn.q_proj.weight", "count": 2, "why": "omega 1"} in aim_block["kept"]
    base, merged = (entry["fingerprint"] for entry in content["inputs"])
    assert aim_block["base_fingerprint"] == base != merged
    assert 0 < aim_block["statistics"]["all"]["mean_s"] < 1
    assert 0 < aim_block["share_kept"] < 1
    assert aim_block["mean_change"].keys() == {
        name.replace(".0.", ".*.")
        for name in load_file(scene.out / "model.safetensors")
        if "self_attn" not in name and "embed" not in name and ".1." not in name
    }


def test_card_says_what_was_relaxed(scene):
    scene.run("--control", "uniform")
    card = (scene.out / "README.md").read_text()
    assert f"`{scene.merged}`, a model merged from fine-tunes of `{scene.base}`, relaxed towards it." in card
    assert "with omega 0.4" in card
    assert "This is the `uniform` control" in card
    assert "6 blocks of 64 tokens" in card
    assert "20 tensors were relaxed, mean s 0." in card
    assert "A merge of these models" not in card
    assert "python performAIM.py --merged_model=" in card


def test_card_of_a_merge_lists_what_was_merged(scene, activations):
    argv = ["--method", "linear", "--base_model", INPUTS / "base", "--models_to_merge", f"{INPUTS}/math,{INPUTS}/code"]
    argv += ["--save_path", scene.out, "--omega", "0.4", "--activations", activations]
    out = call(merge, *argv).out
    card = (scene.out / "README.md").read_text()
    assert (
        f"A merge of these models, fine-tuned from `{INPUTS}/base`:\n\n- `{INPUTS}/math`\n- `{INPUTS}/code`\n" in card
    )
    assert "with omega 0.4" in card
    assert recipe(scene.out)["aim"]["relaxed"] == 20
    assert "omega 0.4: 20 tensors relaxed, 1 copied; mean s 0." in out
    assert "Merge report" in out


def test_what_merge_copies_is_not_called_relaxed(scene, activations):
    argv = ["--method", "ties", "--base_model", INPUTS / "base", "--models_to_merge", f"{INPUTS}/math,{INPUTS}/code"]
    argv += ["--save_path", scene.out, "--omega", "0.4", "--activations", activations, "--exclude", "layernorm"]
    out = call(merge, *argv).out
    assert "omega 0.4: 16 tensors relaxed, 5 copied;" in out
    assert "2 x model.layers.*.input_layernorm.weight (--exclude)" in out


def test_quiet_prints_nothing(scene):
    assert scene.run("--quiet") == (0, "", "")


def test_warnings_are_printed_even_when_quiet(scene):
    family = make_family(scene.folder / "qwen3", "qwen3", n_models=1)
    models = ("--merged_model", family.models[0], "--pretrained_model_name", family.base)
    _, out, err = scene.run(*models, "--numerics", "reference", "--quiet")
    assert out == ""
    assert err.splitlines()[-1] == (
        "warning: --numerics reference: the embedding model.embed_tokens.weight is relaxed too, as lm_head.weight is tied to it."
    )


def test_progress_is_in_tokens_per_second(scene, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    bars = scene.run(terminal=True).err.replace("\r", "\n").splitlines()
    assert any(re.search(r"calibrating: 100%.* 384/384 .*tokens/s\]", line) for line in bars)
    assert any(re.search(r"relaxing: 100%.* 636k/636k ", line) for line in bars)  # read 411, written 225


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_every_architecture_is_relaxed_or_copied(scene, architecture):
    family = make_family(scene.folder / architecture, architecture, n_models=1)
    out = scene.run("--merged_model", family.models[0], "--pretrained_model_name", family.base, "--n_samples", "4").out
    relaxed, copied = map(int, re.search(r"^omega 0\.4: (\d+) tensors relaxed, (\d+) copied;", out, re.M).groups())
    stored = load_file(family.base / "model.safetensors")
    assert relaxed + copied == len(stored)
    assert relaxed == len([name for name in stored if not re.search(r"bias|embed_tokens|embed_in|wte|wpe|word_embeddings\.", name)])  # fmt: skip
    listed = out.partition("copied as merged:\n")[2].splitlines()[:-1]
    assert sum(int(line.split()[0]) for line in listed) == copied


def test_outlier_channels_are_named(scene):
    def amplify(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.input_layernorm.weight"][5] = 100.0

    rewrite(scene.base, amplify)
    out = scene.run().out
    attention = ", ".join(f"model.layers.*.self_attn.{name}_proj" for name in "kqv")
    assert re.search(
        rf"^outlier channels of {re.escape(attention)}: 5 \(\d\d+ times the median, in 2 of 2 tensors\)", out, re.M
    )
    named = recipe(scene.out)["aim"]["statistics"]["model.layers.*.self_attn.q_proj.weight"]["outlier_channels"]
    assert (named[0]["channel"], named[0]["tensors"]) == (5, 2)
    assert named[0]["largest_against_median"] > 10


def test_a_silent_tensor_is_listed_with_the_reason(scene):
    rewrite(scene.base, lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].zero_())
    out = scene.run().out
    assert "omega 0.4: 19 tensors relaxed, 2 copied;" in out
    assert "1 x model.layers.*.self_attn.o_proj.weight (its module's input is zero throughout)" in out


def test_the_base_as_merged_model_is_noted(scene):
    err = scene.run("--merged_model", scene.base).err
    assert f"note: {scene.base}: is the base itself, so that relaxing changes nothing." in err
    base = load_file(scene.base / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(scene.out / "model.safetensors").items())


def test_what_loading_recomputes_is_left_out_with_a_note(scene):
    rewrite(scene.merged, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    err = scene.run().err
    assert "note: " in err
    assert "left out, as loading ignores or recomputes them: model.rotary_emb.inv_freq." in err
    assert load_file(scene.out / "model.safetensors").keys() == load_file(scene.base / "model.safetensors").keys()


def test_vocabularies_are_matched_by_token(scene):
    err = scene.run("--merged_model", INPUTS / "instruct_pad").err
    assert "300 matched, 0 added, 1 filled with the owner's row, 0 dropped" in err
    assert load_file(scene.out / "model.safetensors")["lm_head.weight"].shape[0] == 301


# -------------------------------------------------------------------------------------------- statistics and figures


def test_statistics_are_kept_and_used_again(scene):
    file = scene.folder / "kept" / "activations.safetensors"
    assert f"{file}: statistics of 20 tensors\n" in scene.run("--save_activations", file).out
    before = file.read_bytes()
    direct = (scene.out / "model.safetensors").read_bytes()
    out = scene.run("--activations", file, "--save_path", scene.folder / "again").out
    assert "calibrat" not in out
    assert (scene.folder / "again" / "model.safetensors").read_bytes() == direct
    assert recipe(scene.folder / "again")["aim"] == recipe(scene.out)["aim"]
    scene.run("--save_activations", file, "--overwrite")  # an earlier one of ours may be replaced
    assert file.read_bytes() == before
    assert names(file.parent) == [file.name]
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["schema"] == "aim-activations/2"
        assert opened.get_tensor(f"{UP}.mean_abs").shape == (64,)


def test_figures(scene, activations):
    folder = scene.folder / "figures" / "of base"
    out = scene.run("--activations", activations, "--figures", folder).out
    drawn = ("importance_layers", "importance_sorted", "massive_activations")
    files = [f"{name}.{suffix}" for name in drawn for suffix in ("png", "svg")]
    assert names(folder) == files
    assert all(f"{folder / file}: written" in out for file in files)
    for file in files:
        assert (folder / file).read_bytes().startswith(b"\x89PNG" if file.endswith("png") else b"<?xml")
    svg = (folder / "importance_sorted.svg").read_bytes()
    assert b"self_attn.k_proj, self_attn.q_proj, self_attn.v_proj" in svg
    scene.run("--activations", activations, "--figures", folder, "--overwrite")
    assert (folder / "importance_sorted.svg").read_bytes() == svg


# -------------------------------------------------------------------------------------------------- sweeps, controls


def test_a_sweep_is_one_folder_each(scene, activations):
    out = scene.run("--activations", activations, "--omegas", "0,0.2,1").out
    assert names(scene.out) == ["omega_0", "omega_0.2", "omega_1"]
    assert all(names(scene.out / folder) == CHECKPOINT for folder in names(scene.out))
    assert [recipe(scene.out / name)["aim"]["relaxed"] for name in names(scene.out)] == [20, 20, 0]
    assert "omega 1: 0 tensors relaxed, 21 copied; as merged" in out
    assert re.search(r"^layer +tensors +omega 0 +omega 0\.2 +omega 1$", out, re.M)
    merged = load_file(scene.merged / "model.safetensors")
    for name, tensor in load_file(scene.out / "omega_1" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name])
    scene.run("--activations", activations, "--omega", "0.2", "--save_path", scene.folder / "one")
    assert (scene.folder / "one" / "model.safetensors").read_bytes() == (
        scene.out / "omega_0.2" / "model.safetensors"
    ).read_bytes()


def test_a_sweep_of_one_has_its_folder(scene, activations):
    scene.run("--activations", activations, "--omegas", "0.2")
    assert names(scene.out) == ["omega_0.2"]


def test_overwrite_replaces_a_sweep(scene, activations):
    scene.run("--activations", activations, "--omegas", "0,0.2")
    scene.refuse("--activations", activations, "--omegas", "0.4", code=2, says=("not empty", "--overwrite"))
    scene.run("--activations", activations, "--omegas", "0.4,0.6", "--overwrite")
    assert names(scene.out) == ["omega_0.4", "omega_0.6"]
    scene.run("--activations", activations, "--overwrite")
    assert names(scene.out) == CHECKPOINT


@pytest.mark.parametrize("beside", ["notes.txt", "omega_mine/x", "merge/merge_recipe.json"])
def test_overwrite_spares_what_is_no_sweep(scene, activations, beside):
    scene.run("--activations", activations, "--omegas", "0,0.2", "--quiet")
    (scene.out / beside).parent.mkdir(exist_ok=True)
    (scene.out / beside).write_text("mine")
    scene.refuse("--activations", activations, "--overwrite", code=2, says=("--overwrite replaces only",))


def test_controls_relax_as_much(scene, activations):
    shares, weights = [], []
    for control in ("none", "uniform", "permuted"):
        out = scene.run("--activations", activations, "--control", control, "--overwrite").out
        assert ("control: 20 tensors relaxed" in out) == (control != "none")
        shares.append(recipe(scene.out)["aim"]["share_kept"])
        weights.append((scene.out / "model.safetensors").read_bytes())
    assert shares[0] == pytest.approx(shares[1], abs=1e-4) == pytest.approx(shares[2], abs=1e-4)
    assert len(set(weights)) == 3
    scene.run("--activations", activations, "--control", "permuted", "--seed", "1", "--overwrite")
    assert (scene.out / "model.safetensors").read_bytes() not in weights


# ------------------------------------------------------------------------------------------------------ common flags


def test_dry_run_writes_nothing(scene, activations):
    before = snapshot(scene.folder)
    out = scene.run("--dry_run", "--omega", "mlp=1,0.4", "--control", "uniform").out
    assert "8 texts, 6 blocks, 49 texts too long" in out
    assert "control = uniform" in out
    assert "2 x model.layers.*.self_attn.q_proj.weight: relax" in out
    assert "2 x model.layers.*.mlp.up_proj.weight: stays as merged (omega 1)" in out
    assert "1 x model.embed_tokens.weight: stays as merged (an embedding)" in out
    assert out.endswith("Nothing was written.\n")
    out = scene.run("--dry_run", "--json", "--omegas", "0,0.4", "--activations", activations).out
    plan = json.loads(out)
    assert plan["refusals"] == []
    assert plan["aim"]["omegas"] == ["0", "0.4"]
    assert sum(plan["aim"]["relaxes"].values()) == 20
    assert snapshot(scene.folder) == before


def test_dry_run_prints_refusals_as_json(scene):
    _, out, err = scene.run("--dry_run", "--json", "--omega", "2", "--scaling", "cube", code=2)
    assert json.loads(out)["refusals"] == [
        "--omega: expected a number in [0, 1], got 2.",
        "--scaling: unknown value 'cube'. Known: after_first, after_first_sqrt, after_first_square, identity, sqrt, square.",
    ]
    assert "2 problems" in err


def test_output_flags(scene, activations):
    one = ("--activations", activations, "--workers", "1", "--device", "cpu", "--digest", "none")
    scene.run(*one, "--dtype", "float32")
    assert {tensor.dtype for tensor in load_file(scene.out / "model.safetensors").values()} == {torch.float32}
    assert json.loads((scene.out / "config.json").read_text())["torch_dtype"] == "float32"
    assert "blake3_64MiB" not in recipe(scene.out)["outputs"]["model.safetensors"]
    rest = ("--activations", activations, "--digest", "full", "--max_shard_size", "100kB")
    scene.run(*rest, "--dtype", "float32", "--save_path", scene.folder / "sharded")
    shards = sorted((scene.folder / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(
        torch.equal(tensor, together[name]) for name, tensor in load_file(scene.out / "model.safetensors").items()
    )
    content = recipe(scene.folder / "sharded")
    assert all("blake3_64MiB" in file for file in content["outputs"].values())
    assert "blake3_64MiB" in content["inputs"][0]["files"]["model.safetensors"]


# --------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--omega", "1.5"], ["--omega: expected a number in [0, 1], got 1.5"]),
        (["--omega", "-0.1"], ["--omega: expected a number in [0, 1], got -0.1"]),
        (["--omega", "nan"], ["--omega: expected a number in [0, 1], got nan"]),
        (["--omega", "some"], ["--omega: expected a number in [0, 1], got 'some'"]),
        (["--omega="], ["--omega: expected a number in [0, 1], got ''"]),
        (["--omega", "mlp=0.2"], ["--omega: expected a number for the rest at the end", "mlp=0.2,1.0"]),
        (["--omega", "=0.2,0.4"], ["--omega: expected FILTER=NUMBER"]),
        (["--omega", "mlp=2,0.4"], ["--omega: expected a number in [0, 1], got 2"]),
        (["--omega", "0.2,0.4"], ["--omega: expected FILTER=NUMBER", "--omegas"]),
        (["--omega", "mpl=0.2,0.4"], ["--omega: the filter 'mpl' is in no name", "model.layers.*.mlp.up_proj.weight"]),
        (["--omega", "mlp=0.2,mlp.up=0.3,0.4"], ["the filter 'mlp.up'", "an earlier filter", "Put it first"]),
        (["--omegas", "0.2,0.2"], ["--omegas: expected different numbers"]),
        (["--omegas", "0.2,mlp=0.4"], ["--omegas: expected a number in [0, 1], got 'mlp=0.4'"]),
        (["--omegas", "0.2,2"], ["--omegas: expected a number in [0, 1], got 2"]),
        (["--omega", "0.2", "--omegas", "0.2,0.4"], ["--omegas: excludes --omega"]),
        (["--scaling", "cube"], ["--scaling: unknown value 'cube'", "identity, sqrt, square"]),
        (["--control", "permute"], ["--control: unknown value", "Did you mean 'permuted'"]),
        (["--numerics", "f32"], ["--numerics: unknown value 'f32'"]),
        (["--seed", "3"], ["--seed: nothing is drawn but by --control permuted and --control random"]),
        (["--seed", "3", "--control", "uniform"], ["--seed: nothing is drawn but by --control permuted and --control random"]),
        (["--n_samples", "0"], ["--n_samples: expected at least 1, got 0"]),
        (["--n_samples", "many"], ["--n_samples: expected a whole number, got 'many'"]),
        (["--block_size", "-3"], ["--block_size: expected at least 1, got -3"]),
        (["--batch_size", "0"], ["--batch_size: expected at least 1, got 0"]),
        (["--calibration_seed", "-1"], ["--calibration_seed: expected a whole number from 0"]),
        (["--calibration_dtype", "int8"], ["--calibration_dtype: expected auto, float32"]),
        (["--numerics", "reference", "--batch_size", "2"], ["--batch_size: --numerics reference runs one block"]),
        (["--numerics", "reference", "--calibration_dtype", "float32"], ["--calibration_dtype: --numerics reference"]),
        (["--activations", "none.safetensors"], ["--activations none.safetensors: no such file"]),
        (["--dtype", "float64"], ["--dtype: unknown dtype 'float64'", "float32"]),
        (["--device", "tpu"], ["--device: expected auto, cpu, cuda"]),
        (["--max_shard_size", "x"], ["--max_shard_size: expected a size"]),
        (["--digest", "some"], ["--digest: unknown value 'some'"]),
        (["--json"], ["--json: works with --dry_run only"]),
        (["--save_path="], ["--save_path: expected a folder, got nothing"]),
        (["--omega", "2", "--control", "x", "--n_samples", "0", "--digest", "y"], ["4 problems", "--omega", "--control", "--n_samples", "--digest"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)  # fmt: skip
def test_wrong_arguments(scene, flags, says):
    scene.refuse(*flags, code=2, says=tuple(says))


@pytest.mark.parametrize("flag", ["--calibration_data", "--text_field", "--n_samples", "--block_size", "--calibration_seed", "--batch_size", "--calibration_dtype"])  # fmt: skip
def test_calibration_flags_beside_activations(scene, activations, flag):
    says = (f"{flag}: --activations brings the statistics",)
    scene.refuse("--activations", activations, flag, "1", code=2, says=says)


def test_an_unknown_flag(scene):
    message = scene.refuse("--omga", "0.4", code=2, says=("unknown flag '--omga'", "Did you mean '--omega'"))
    assert "--merged_model" in message


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--control", "uniform"], "--control: belongs to AIM. Add --omega"),
        (["--n_samples", "4"], "--n_samples: belongs to AIM. Add --omega"),
        (["--figures", "f"], "--figures: belongs to AIM. Add --omega"),
        (["--omega", "0.4", "--seed", "1"], "--seed: ties draws no random numbers"),
        (["--omega", "2"], "--omega: expected a number in [0, 1], got 2"),
        (["--omega", "0.4", "--activations", "no.safetensors"], "no such file"),
        (["--omega", "0.4", "--density", "2"], "density"),
    ],
)
def test_wrong_arguments_of_merge(scene, flags, says):
    needed = {"--method": "ties", "--base_model": scene.base, "--models_to_merge": scene.merged}
    Scene(scene.folder, merge, needed, scene.work).refuse(*flags, says=(says,))


# ---------------------------------------------------------------------------------------------------- where to write


@pytest.mark.parametrize(
    ("flag", "where", "code", "says"),
    [
        ("--save_activations", "base", 2, "expected a file, got a folder"),
        ("--save_activations", "merged/model.safetensors", 2, "is no activations file, and is not replaced"),
        ("--save_activations", "out/activations.safetensors", 2, "lies in --save_path"),
        ("--save_activations", "/proc/none/activations.safetensors", 1, "cannot be written"),
        ("--save_activations", "base/config.json/activations.safetensors", 1, "cannot be written"),
        ("--figures", "base/config.json", 2, "expected a folder, got a file"),
        ("--figures", "out/figures", 2, "lies in --save_path"),
        ("--figures", "/proc/none", 1, "cannot be written"),
        ("--save_path", "base", 2, "is the input"),
        ("--save_path", "../file/x", 2, "is a file, no folder"),
        ("--save_path", "base/x", 2, "lies inside the input"),
        ("--save_path", "merged", 2, "is the input"),
        ("--save_path", "/proc/none", 1, "cannot be written to"),
    ],
)
def test_where_nothing_can_be_written(scene, flag, where, code, says):
    (scene.folder.parent / "file").touch()
    scene.refuse(flag, scene.folder / where, code=code, says=(f"{flag} ", says))


def test_a_folder_in_use_is_not_replaced(scene):
    scene.out.mkdir()
    (scene.out / "thesis.tex").write_text("mine")
    scene.refuse(code=2, says=("the folder is not empty",))
    scene.refuse("--overwrite", code=2, says=("--overwrite replaces only a folder that holds a merge_recipe.json",))


def test_saving_loaded_statistics_is_refused(scene, activations):
    flags = ("--activations", activations, "--save_activations", scene.folder / "copy.safetensors")
    scene.refuse(*flags, code=2, says=("--save_activations: --activations brings statistics that are kept already",))


def test_half_an_activations_file_is_never_left(scene, monkeypatch):
    file = scene.folder / "kept.safetensors"
    rename = os.rename

    def fail(source: str, target: str, **folders: int) -> None:
        if target == file.name:
            raise OSError(28, "No space left on device")
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", fail)
    err = scene.run("--save_activations", file, code=1).err
    assert f"{file}: cannot be written: No space left on device" in err
    assert not any(path.name.startswith(file.name) for path in scene.folder.iterdir())
    monkeypatch.setattr(os, "rename", rename)
    out = scene.run("--save_activations", file).out  # with the statistics that are kept beside the output
    assert ("calibrated on" in out, file.is_file()) == (False, True)


# ------------------------------------------------------------------------------------------------- calibration text


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


LINE = json.dumps({"text": "a b c", "id": 3, "words": ["a"]}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "flags", "says"),
    [
        ("empty.jsonl", "", [], ["expected texts, got an empty file"]),
        ("empty.txt", "\n \n", [], ["expected texts, got an empty file"]),
        ("long.txt", "word " * 500 + "\n", [], ["at least one block of 64 tokens, got 0 texts", "1 of 1 were longer"]),
        ("short.txt", "a b\n", [], ["at least one block of 64 tokens, got 1 texts", "Use a smaller --block_size"]),
        ("a.jsonl", LINE * 9, ["--text_field", "body"], ["field 'body', got no such field", "The row has: id, text, words", "--text_field"]),
        ("b.jsonl", LINE * 9, ["--text_field", "id"], ["field 'id', got int"]),
        ("c.jsonl", "[1]\n" * 9, [], ["expected a text or an object, got list"]),
        ("d.jsonl", LINE + '{"text":\n', [], ["line 2: expected JSON"]),
        ("e.json", "{", [], ["expected JSON"]),
        ("f.csv", "text\na\n", [], ["expected .txt, .json, .jsonl, .parquet, or .gz of one, got '.csv'"]),
        ("g.jsonl.gz", "no gzip", [], ["cannot be read as .jsonl"]),
        ("h.parquet", "no parquet", [], ["cannot be read as parquet"]),
    ],
    ids=lambda value: value if isinstance(value, str) and re.fullmatch(r"\w+\.[\w.]+", value) else "",
)  # fmt: skip
def test_unusable_text(scene, tmp_path, name, content, flags, says):
    file = write(tmp_path, name, content)
    scene.refuse("--calibration_data", file, *flags, code=1, says=(str(file), *says))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./none.jsonl", "no such file"),
        ("none.txt", "no such file"),
        ("org/data::train", "the hub dataset cannot be loaded"),
        ("mit-han-lab/pile-val-backup::validation", "the hub dataset cannot be loaded"),
    ],
)
def test_text_that_is_not_there(scene, source, says, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    scene.refuse("--calibration_data", source, code=1, says=(f"--calibration_data {source}: ", says))


def test_a_missing_package_is_named(scene, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("Compression type zstd not supported")  # what datasets says without zstandard

    monkeypatch.setattr("datasets.load_dataset", fail)
    scene.refuse("--calibration_data", "org/data", code=1, says=("zstd", "pip install zstandard"))


def test_more_tokens_than_the_base_has_positions(scene):
    says = ("--block_size: expected at most the 1024 positions of", "got 1025")
    scene.refuse("--block_size", "1025", code=1, says=says)


# ------------------------------------------------------------------------------------------------------- base models


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:-1]


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def test_a_base_of_other_shapes(scene):
    rewrite(scene.base, cut)
    says = (f"{scene.base}: {UP}: expected shape [128, 64] as in {scene.merged}, got [127, 64]. Name the base that",)
    scene.refuse(code=1, says=says)


@pytest.mark.parametrize("which", ["base", "merged"])
def test_a_base_with_other_tensors(scene, which):
    rewrite(scene.folder / which, drop)
    scene.refuse(code=1, says=(f"{scene.base}: {UP}: expected ", "Name the base that the merged model was made from"))


def test_a_base_that_lacks_what_the_merged_model_lacks(scene):
    rewrite(scene.base, drop)
    rewrite(scene.merged, drop)
    scene.refuse(code=1, says=(f"{scene.base}: expected a tensor for {UP}, got none",))


def test_a_base_that_does_not_fit_its_config(scene):
    configure(scene.base, intermediate_size=100)
    scene.refuse(code=1, says=(f"{scene.base}: model.layers.0.mlp.down_proj.weight: does not fit config.json",))


def test_a_base_without_model_type(scene):
    configure(scene.base, model_type=None)
    scene.refuse(code=1, says=(f"{scene.base}: config.json: expected a model_type",))


@pytest.mark.parametrize("which", ["base", "merged"])
def test_quantised_models(scene, which):
    configure(scene.folder / which, quantization_config={"quant_method": "gptq"})
    scene.refuse(code=1, says=(f"{scene.folder / which}: its weights are quantised (gptq)",))


def test_a_base_without_tokenizer(scene):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.base / name).unlink()
    says = (f"{scene.base}: expected a tokenizer, which calibration needs: there is none", "Add its tokenizer files")
    scene.refuse(code=1, says=says)
    # transformers makes an empty tokenizer for models of this class that have none.
    configure(scene.base, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    scene.refuse(code=1, says=says)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BertForMaskedLM"])
def test_models_that_are_no_causal_language_models(scene, name):
    import transformers

    sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    if name.startswith("Bert"):
        sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**sizes)).save_pretrained(scene.folder / "other")
    copy_tokenizer(scene.folder / "other")
    models = ("--pretrained_model_name", scene.folder / "other", "--merged_model", scene.folder / "other")
    scene.refuse(*models, code=1, says=(f"{scene.folder / 'other'}: expected a causal language model, got {name}",))


@pytest.mark.parametrize(("architecture", "kind"), [("gpt2", "conv1d"), ("mixtral", "experts")])
def test_what_the_published_program_cannot_do(scene, architecture, kind):
    family = make_family(scene.folder / architecture, architecture, n_models=1)
    models = ("--merged_model", family.models[0], "--pretrained_model_name", family.base)
    says = ("--numerics reference: ", kind, "Use --numerics float32")
    scene.refuse(*models, "--numerics", "reference", code=1, says=says)


def test_models_that_are_not_there(scene):
    says = ("2 problems", f"{scene.base}x: no such folder. Did you mean", f"{scene.merged}x: no such folder")
    scene.refuse("--pretrained_model_name", f"{scene.base}x", "--merged_model", f"{scene.merged}x", code=1, says=says)


def test_hub_models_are_refused_before_they_are_downloaded(scene, tmp_path, monkeypatch):
    with FakeHub({"org/base": INPUTS / "base", "org/merged": INPUTS / "math"}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        models = ("--pretrained_model_name", "org/base", "--merged_model", "org/merged")
        scene.refuse(*models, "--calibration_data", "./none.jsonl", code=1, says=("no such file",))
    fetched = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert "config.json" in fetched
    assert "model.safetensors" not in fetched


# ----------------------------------------------------------------------------------------- what only a run can find


def scale(folder: Path, part: str, factor: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if part in name:
                tensors[name] *= factor

    rewrite(folder, change)


@pytest.mark.parametrize(
    ("part", "factor", "flags", "module"),
    [
        ("layers.0.mlp.up_proj", 1e38, [], "model.layers.0.mlp.down_proj"),
        ("layers.0.mlp", 300.0, ["--calibration_dtype", "float16"], "model.layers.0.mlp.down_proj"),
        ("layers.1.self_attn.v_proj", float("nan"), [], "model.layers.1.self_attn.o_proj"),
    ],
)
def test_statistics_that_are_not_finite_name_the_first_module(scene, part, factor, flags, module):
    scale(scene.base, part, factor)
    file = scene.folder / "activations.safetensors"
    says = (f"{module}: its input holds NaN or an infinity", "--calibration_dtype float32")
    scene.fail("--save_activations", file, *flags, code=1, says=says)


CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes. Error code 12 (Cannot allocate memory)"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to"), RuntimeError(CPU_ALLOCATOR), MemoryError()], ids=["gpu", "cpu", "python"])  # fmt: skip
def test_out_of_memory_says_what_to_lower(scene, error, monkeypatch):
    load = LlamaForCausalLM.from_pretrained

    def fail(*_: object, **__: object) -> None:
        raise error

    def load_to_fail(*arguments: Any, **keywords: Any) -> Any:
        model = load(*arguments, **keywords)
        model.forward = fail
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load_to_fail)
    says = ("calibration: ", "too little memory", "Lower --batch_size (now 2) or --block_size (now 64)")
    message = scene.fail("--batch_size", "2", code=1, says=says)
    assert ("--device cpu" in message) == isinstance(error, torch.OutOfMemoryError)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    scene.fail(code=1, says=(f"{scene.base}: loading it: ", "too little memory"))


def test_a_base_that_cannot_be_loaded(scene, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel wants\nanother driver")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    says = (f"{scene.base}: cannot be loaded as a LlamaForCausalLM: the kernel wants.",)
    scene.fail(code=1, says=says)


def test_an_interrupted_calibration_leaves_nothing(scene, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(aim.step, "calibrate", interrupt)
    before = snapshot(scene.folder)
    err = scene.run("--save_activations", scene.folder / "activations.safetensors", code=130).err
    assert snapshot(scene.folder) == before
    assert err.endswith("performAIM.py: interrupted; nothing is left behind.\n")


# ------------------------------------------------------------------------------------------------ activations files


def edited(file: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Path:
    """A copy of an activations file with other tensors or metadata."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = {**opened.metadata(), **metadata}
    change(tensors)
    save_file(tensors, target, metadata=header)
    return target


def nothing(_: dict[str, torch.Tensor]) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (lambda t: t.update({f"{UP}.mean_abs": torch.full((64,), float("nan"))}), {}, f"{UP}: expected finite means"),
        (lambda t: t.update({f"{UP}.mean_abs": -torch.ones(64)}), {}, f"{UP}: expected finite means >= 0"),
        (lambda t: t.update({f"{UP}.mean_abs": torch.zeros(64)}), {}, f"{UP}: expected finite means"),
        (lambda t: t.update({f"{UP}.mean_abs": torch.ones(64).double()}), {}, f"{UP}: expected finite means"),
        (lambda t: t.update({f"{UP}.{key}": torch.ones(63) for key in WIDE}), {}, f"{UP}: expected shape [64] as in"),
        (lambda t: t.update({f"other.{key}": torch.ones(4) for key in ("mean_abs", "mean_sq", "tokens")}), {}, "other: expected no statistics as in"),
        (lambda t: t.pop(f"{UP}.mean_sq"), {}, "is damaged"),
        (nothing, {"schema": "aim-activations/9"}, "expected a file written by --save_activations (aim-activations/2), got another"),
        (nothing, {"calibration": "[1]"}, "is damaged"),
        (nothing, {"base": "0" * 64}, "were taken with another base model than"),
    ],
)  # fmt: skip
def test_damaged_activations(scene, activations, change, metadata, says):
    file = edited(activations, scene.folder / "edited.safetensors", change, **metadata)
    scene.refuse("--activations", file, code=1, says=(f"--activations {file}: ", says))


def test_foreign_activations(scene, activations):
    says = ("expected a file written by --save_activations",)
    scene.refuse("--activations", scene.base / "model.safetensors", code=1, says=says)
    file = write(scene.folder, "text.safetensors", "no safetensors at all")
    scene.refuse("--activations", file, code=1, says=("text.safetensors: expected a safetensors header",))
    swapped = ("--pretrained_model_name", scene.merged, "--merged_model", scene.base)
    for more in ((), ("--dry_run",)):
        says = (f"were taken with another base model than {scene.merged}",)
        scene.refuse("--activations", activations, *swapped, *more, code=1, says=says)
    says = ("were taken with --numerics float32. Use the same here",)
    scene.refuse("--activations", activations, "--numerics", "reference", code=1, says=says)


# ------------------------------------------------------------------------------------------------------------ Python


def test_the_packages_own_example(scene):
    example = (aim.__doc__ or "").partition("\n\n")[2]
    assert "relax_checkpoint" in example
    texts = scene.folder / "texts.jsonl"
    texts.write_bytes(gzip.decompress(TEXTS.read_bytes()))
    for name, path in (
        ("./base", scene.base),
        ("./added", scene.merged),
        ("./relaxed", scene.out),
        ("texts.jsonl", texts),
    ):
        example = example.replace(f'"{name}"', repr(str(path)))
    exec(example.replace("n_samples=64", "n_samples=8, block_size=64"), {})
    direct = snapshot(scene.out)["model.safetensors"]
    scene.run("--overwrite")
    assert (scene.out / "model.safetensors").read_bytes() == direct
    assert os.listdir(scene.out.parent).count("out.partial") == 0


# -------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_the_packages_example():
    page = (Path(__file__).parent.parent / "docs" / "aim.md").read_text()
    example = (aim.__doc__ or "").partition("\n\n")[2].strip()
    assert f"```python\n{example}\n```" in page
