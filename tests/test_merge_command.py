"""merge.py from its flags to what it prints and writes; what it refuses is in test_bad_input.py, its numbers elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from safetensors.torch import load_file

import merge
from checkpoints import VERSION
from checkpoints.provenance import fingerprint
from checkpoints.reader import open_checkpoint
from merging.methods import METHODS, get_method
from tests.fake_hub import FakeHub
from tests.in_memory import WITHOUT_DATA, fitting, required_flags
from tests.pico import Family, make_family, write_checkpoint
from tests.scene import Ended, Scene

ROOT = Path(__file__).parent.parent
INPUTS = Path(__file__).parent / "goldens" / "inputs"
PLAIN = [
    "README.md",
    "config.json",
    "merge_recipe.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
TENSORS = 21

Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the goldens' inputs, as other tests' folders are not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "math", "code", "instruct", "instruct_pad"):
        shutil.copytree(INPUTS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base with a tied head and a generation config, in three files, and two fine-tunes."""
    return make_family(tmp_path_factory.mktemp("family"), "qwen3", n_models=2, max_shard_size="20KB")


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """merge.py in a folder where `in` holds the models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").symlink_to(models)

    def needed(given: Mapping[str, str]) -> dict[str, object]:
        method = given.get("--method", "ties").lower()
        paths = ",".join(fitting(method, ["in/math", "in/code"]))
        required = dict(flag.split("=") for flag in required_flags(method))
        return {
            "--method": "ties",
            "--base_model": "in/base",
            "--models_to_merge": paths,
            "--save_path": "out",
            **required,
        }

    return Scene(tmp_path, merge, needed).run


def names(folder: str | Path) -> list[str]:
    """Every file below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def recipe(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "merge_recipe.json").read_text())


def card(folder: str = "out") -> tuple[dict[str, Any], str]:
    """Front matter and text of the model card."""
    _, front, text = Path(folder, "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def weights(folder: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def same_bytes(first: str, second: str) -> bool:
    return Path(first, "model.safetensors").read_bytes() == Path(second, "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------- output folder


def test_files_of_one_shard(run):
    run()
    assert names("out") == PLAIN
    assert not Path("out.partial").exists()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert Path("out", name).read_bytes() == Path("in/base", name).read_bytes()


def test_files_of_many_shards(run):
    run("--max_shard_size=50KB")
    one = weights("out")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert names("out") == sorted({*PLAIN, *shards, "model.safetensors.index.json"} - {"model.safetensors"})
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(Path("out", shard))}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(sum(t.nbytes for t in load_file(Path("out", shard)).values()) <= 50_000 for shard in shards)
    assert len(shards) == 6
    run("--save_path=whole")
    whole = weights("whole")
    assert one.keys() == whole.keys()
    assert all(torch.equal(one[name], whole[name]) for name in one)


def test_one_tensor_in_each_shard(run):
    run("--max_shard_size=1")
    assert len([name for name in names("out") if name.endswith(".safetensors")]) == TENSORS


def test_everything_beside_the_weights(run, models, tmp_path):
    """All files are copied but weights, what a training leaves behind, copies of old files, and ours."""
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    wanted = [
        "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "tokenizer.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja",
        "preprocessor_config.json", "modeling_own.py", "configuration_own.py", "LICENSE", "LICENSE.txt", "NOTICE",
        "notes.txt", "run.py",
    ]  # fmt: skip
    other = [
        "pytorch_model.bin", "model.safetensors.index.json.bak", "optimizer.pt", "training_args.bin", "trainer_state.json",
        ".gitattributes", "checkpoint-5/config.json", "model.gguf", "README.md", "merge_recipe.json",
    ]  # fmt: skip
    for name in wanted + other:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(f"{name}: \r\n\xff".encode("latin-1"))
    (base / "added_tokens.json").write_bytes(b'{"<unk>":\r\n0}')  # the two of them that are read
    (base / "generation_config.json").write_bytes(b"{\r\n}")
    run("--base_model=base")
    assert names("out") == sorted([*PLAIN, *wanted])
    for name in wanted:
        assert Path("out", name).read_bytes() == (base / name).read_bytes()


def test_what_transformers_makes_of_it(run, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    run(f"--base_model={family.base}", "--models_to_merge", ",".join(map(str, family.models)), "--max_shard_size=20KB")
    stored = {name for name in names(family.base) if not name.endswith(".md")}
    assert set(names("out")) == stored | {"README.md", "merge_recipe.json"}  # the same number of files, too
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert Path("out", name).read_bytes() == (family.base / name).read_bytes()
    assert "lm_head.weight" not in weights("out")
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained("out")
    prompt = tokenizer("Merging models", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert answer.shape[1] == prompt.shape[1] + 5
    assert isinstance(tokenizer.decode(answer[0]), str)
    assert GenerationConfig.from_pretrained("out").eos_token_id == 2


@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("float16", torch.float16)])
def test_dtype_changes_one_word_of_the_config(run, dtype, stored):
    run(f"--dtype={dtype}")
    before, after = (Path(folder, "config.json").read_text() for folder in ("in/base", "out"))
    assert after == before.replace('"torch_dtype": "bfloat16"', f'"torch_dtype": "{dtype}"') != before
    assert {tensor.dtype for tensor in weights("out").values()} == {stored}
    assert recipe()["out_dtype"] == dtype


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_dtype_of_the_base_changes_nothing(run, dtype):
    run(f"--dtype={dtype}")
    assert Path("out/config.json").read_bytes() == Path("in/base/config.json").read_bytes()
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.bfloat16}


def test_float64_is_written_as_float32(run, models):
    for name in ("base", "math"):
        config = json.loads((models / name / "config.json").read_text()) | {"torch_dtype": "float64"}
        wide = {key: tensor.double() for key, tensor in load_file(models / name / "model.safetensors").items()}
        write_checkpoint(Path("wide", name), wide, config, tokenizer=True)
    ended = run("--base_model=wide/base", "--models_to_merge=wide/math")
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.float32}
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float32"
    assert "written as float32" in ended.err


def test_permissions_are_those_of_other_files(run):
    Path("plain").touch()
    run()
    assert {path.stat().st_mode for path in Path("out").iterdir()} == {Path("plain").stat().st_mode}


# ------------------------------------------------------------------------------------------------------- model card


def test_model_card(run):
    flags = ("--weights=0.6,0.4", "--density=0.3", "--exclude=norm")
    run(*flags)
    front, text = card()
    assert front == {"library_name": "transformers", "tags": ["merge"]}  # the hub takes no card that names folders
    assert "\n# out\n" in text
    assert (
        "| model | weight | density |\n| --- | ---: | ---: |\n| `in/math` | 0.6 | 0.3 |\n| `in/code` | 0.4 | 0.3 |\n"
        in text
    )
    assert "Method `ties`, lambda `1.0`, normalize `true`, exclude `norm`, out_dtype `auto`\n" in text
    command = re.search(r"```sh\n(.*)\n```", text)
    assert command is not None
    typed = ["python", "merge.py", "--method=ties", "--base_model=in/base"]
    typed += ["--models_to_merge=in/math,in/code", "--save_path=out", *flags]
    assert shlex.split(command[1]) == typed == recipe()["command"]


def test_model_card_without_parameters_of_models(run):
    run("--method=widen")
    assert "Method `widen`, widen_ratio `1.0`, widen_calibration `1.0`" in card()[1]
    assert "| model |" not in card()[1]


def test_the_seed_is_on_the_card_where_it_matters(run):
    run("--method=dare_ties", "--seed=7")
    assert "seed `7`" in card()[1]


LICENCES = [
    (["apache-2.0", "apache-2.0", "apache-2.0"], "apache-2.0"),
    (["apache-2.0", "apache-2.0", "mit"], None),
    (["apache-2.0", None, "apache-2.0"], None),
    (["other", "other", "other"], None),
    ([None, None, None], None),
    (["'mit'", '"mit"', "mit # agreed"], "mit"),
    (["\n- mit", "\n- mit", "\n- mit"], None),
]


@pytest.mark.parametrize(("licences", "expected"), LICENCES)
def test_licence_only_where_all_agree(run, models, licences, expected):
    for name, licence in zip(("base", "math", "code"), licences, strict=True):
        shutil.copytree(models / name, Path("licensed", name))
        if licence is not None:
            Path("licensed", name, "README.md").write_text(
                f"---\ntags:\n- a\nlicense: {licence}\n---\nlicense: wtfpl\n"
            )
    run("--base_model=licensed/base", "--models_to_merge=licensed/math,licensed/code")
    assert card()[0].get("license") == expected


# ----------------------------------------------------------------------------------------------------- merge_recipe.json


def test_recipe_file(run):
    run("--method=DARE_Ties", "--weights=0.6,0.4", "--density=0.3,0.7", "--lambda=0.9", "--seed=5")
    content = recipe()
    assert list(content) == [
        "schema", "merge_method", "base_model", "models", "parameters", "tokenizer_source", "new_token_rows",
        "pad_to_multiple_of", "tie_word_embeddings", "chat_template", "copy_tokenizer_from", "out_dtype", "exclude", "only", "seed",
        "outputs", "notes", "warnings", "report", "inputs", "versions", "command", "identity", "side_files",
    ]  # fmt: skip
    assert content["merge_method"] == "dare_ties"
    assert content["base_model"] == "in/base"
    assert content["models"] == [
        {"model": "in/math", "parameters": {"weight": 0.6, "density": 0.3}},
        {"model": "in/code", "parameters": {"weight": 0.4, "density": 0.7}},
    ]
    assert content["parameters"] == {"lambda": 0.9, "normalize": False}
    assert (content["tokenizer_source"], content["out_dtype"], content["exclude"]) == ("base", "auto", None)
    assert (content["seed"], content["notes"], content["warnings"]) == (5, [], [])
    assert content["versions"].keys() == {"toolkit", "python", "torch", "safetensors", "transformers"}
    assert content["versions"]["toolkit"] == VERSION
    assert [entry["model"] for entry in content["inputs"]] == ["in/base", "in/math", "in/code"]


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_the_seed_is_always_there(run, method):
    run(f"--method={method}")
    assert recipe()["seed"] == (0 if get_method(method).draws else None)


def file_digest(path: Path) -> str:
    """blake3 over the blake3 of the file's one chunk of 64 MiB."""
    return blake3(blake3(path.read_bytes()).digest()).hexdigest()


@pytest.mark.parametrize("digest", ["none", "outputs", "full"])
def test_digests(run, models, digest):
    run(f"--digest={digest}")
    content = recipe()
    output = {"bytes": Path("out/model.safetensors").stat().st_size}
    if digest != "none":
        output["blake3_64MiB"] = file_digest(Path("out/model.safetensors"))
    assert content["outputs"] == {"model.safetensors": output}
    for entry, name in zip(content["inputs"], ("base", "math", "code"), strict=True):
        path = models / name / "model.safetensors"
        file = entry["files"]["model.safetensors"]
        assert Path(entry["folder"]).samefile(models / name)
        with closing(open_checkpoint(models / name, name)) as weights:
            assert entry["fingerprint"] == fingerprint(weights)
        assert (file["bytes"], file["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)
        assert file.get("blake3_64MiB") == (file_digest(path) if digest == "full" else None)


def test_the_same_recipe_gives_the_same_files(run):
    run("--method=dare_ties", "--save_path=one", "--workers=1", "--max_shard_size=100KB")
    run("--method=dare_ties", "--save_path=two", "--workers=3", "--max_shard_size=100KB")
    differ = [name for name in names("one") if Path("one", name).read_bytes() != Path("two", name).read_bytes()]
    assert differ == ["README.md", "merge_recipe.json"]
    first, second = recipe("one"), recipe("two")
    assert {key for key in first if first[key] != second[key]} == {
        "command",
        "side_files",
    }  # the card has the command too


# ------------------------------------------------------------------------------------------------------ what is printed

LAST_LINE = re.compile(
    r"out: read [\d.]+ [kMG]B, wrote [\d.]+ [kMG]B in [\d.]+ s \([\d.]+ GB/s\), peak memory [\d.]+ [MG]B"
)


def test_report(run):
    ended = run()
    lines = ended.out.splitlines()
    assert lines[0] == "Merge report (d = fine-tuned minus base b; a fixed sample of 1/16 of the blocks):"
    assert lines[1:3] == ["  d1: in/math", "  d2: in/code"]
    assert lines[3].split() == ["layer", "|d1|/|b|", "|d2|/|b|", "cos1,2", "conflicts", "|merge|/|b|"]
    assert [line.split()[0] for line in lines[4:-2]] == [
        "lm_head", "model.embed_tokens", "model.layers.*.input_layernorm", "model.layers.*.mlp.down_proj",
        "model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj", "model.layers.*.post_attention_layernorm",
        "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.v_proj", "model.norm", "all",
    ]  # fmt: skip
    assert LAST_LINE.fullmatch(lines[-1]), lines[-1]
    assert ended.err == ""  # no bar where there is no terminal
    stored = recipe()["report"]
    assert stored["sample"] == "1/16"
    assert f"{stored['all']['relative_norm']['in/math']:.4f}" == lines[-3].split()[1]
    assert f"{stored['all']['sign_conflicts']:.4f}" == lines[-3].split()[4]


def test_report_against_its_definition(run):
    run("--report=full")
    name = "model.layers.1.mlp.up_proj.weight"
    kind = "model.layers.*.mlp.up_proj.weight"
    files = ("in/base", "in/math", "in/code", "out")
    base, math, code, out = (
        torch.cat([weights(file)[name.replace("1", layer)].double().flatten() for layer in "01"]) for file in files
    )
    d1, d2 = math - base, code - base
    changed = (d1 != 0) | (d2 != 0)
    expected = {
        "relative_norm": {"in/math": d1.norm() / base.norm(), "in/code": d2.norm() / base.norm()},
        "cosine": {"in/math ~ in/code": d1 @ d2 / (d1.norm() * d2.norm())},
        "sign_conflicts": (d1 * d2 < 0).sum() / changed.sum(),
        "merged_relative_norm": (out - base).norm() / base.norm(),
    }
    entry = recipe()["report"]["layers"][kind]
    assert recipe()["report"]["sample"] == "full"
    assert entry.keys() == expected.keys()
    assert entry["relative_norm"] == pytest.approx(
        {k: float(v) for k, v in expected["relative_norm"].items()}, rel=1e-3
    )
    assert entry["cosine"] == pytest.approx({k: float(v) for k, v in expected["cosine"].items()}, abs=1e-5)
    assert entry["sign_conflicts"] == pytest.approx(float(expected["sign_conflicts"]), rel=1e-3)
    # the report sees the merge before its rounding to bfloat16
    assert entry["merged_relative_norm"] == pytest.approx(float(expected["merged_relative_norm"]), rel=2e-2)


def test_without_report(run):
    assert LAST_LINE.fullmatch(run("--report=none").out.strip())
    assert recipe()["report"] is None


def test_quiet(run):
    assert run("--quiet", "--models_to_merge=in/math,in/instruct_pad") == (0, "", "")
    assert recipe()["report"] is not None


def test_notes_and_warnings(run, models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "copy")
    ended = run("--models_to_merge=in/math,copy,in/instruct_pad")
    notes = [
        "the output's tokenizer is that of in/base and 1 added token: '[PAD]'.",
        "the vocabulary tables get 301 rows, those of in/base have 300.",
        "in/base: vocabulary rows are matched by token: 300 matched, 0 added, 1 filled with the owner's row, 0 dropped.",
        "in/math: vocabulary rows are matched by token: 300 matched, 0 added, 1 filled with the owner's row, 0 dropped.",
        "copy: vocabulary rows are matched by token: 300 matched, 0 added, 1 filled with the owner's row, 0 dropped.",
        "in/instruct_pad: vocabulary rows are matched by token: 300 matched, 1 added, 0 filled with the owner's row, 0 dropped.",
    ]
    warning = "copy equals the base: its task vector is zero throughout."
    assert ended.err == "".join(f"note: {note}\n" for note in notes) + f"warning: {warning}\n"
    assert (recipe()["notes"], recipe()["warnings"]) == (notes, [warning])
    ended = run("--quiet", "--overwrite", "--models_to_merge=in/math,copy,in/instruct_pad")
    assert ended == (0, "", f"warning: {warning}\n")


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_every_method_warns_of_a_model_that_equals_the_base(run, models, tmp_path, method):
    shutil.copytree(models / "base", tmp_path / "copy")
    models = fitting(method, ["copy", "in/math"])
    ended = run(f"--method={method}", f"--models_to_merge={','.join(models)}", "--report=none")
    all_equal = "warning: All models equal the base, and so does the output.\n" if models == ["copy"] else ""
    assert ended.err == "warning: copy equals the base: its task vector is zero throughout.\n" + all_equal


# -------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run(run, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    out = run(
        "--dry_run",
        "--density=0.3,0.4",
        "--weights=1,-2",
        "--exclude=norm",
        "--tokenizer_source=base",
        "--models_to_merge=in/math,in/instruct_pad",
    ).out
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert out == (
        "method ties, base in/base\n"
        "  lambda = 1.0\n"
        "  normalize = true\n"
        "models:\n"
        "  in/math: weight 1, density 0.3\n"
        "  in/instruct_pad: weight -2, density 0.4\n"
        "tensors:\n"
        "      1 x lm_head.weight: merge, 19,200 elements, bfloat16\n"
        "      1 x model.embed_tokens.weight: merge, 19,200 elements, bfloat16\n"
        "      2 x model.layers.*.input_layernorm.weight: copy from base (--exclude), 128 elements, bfloat16\n"
        "      2 x model.layers.*.mlp.down_proj.weight: merge, 16,384 elements, bfloat16\n"
        "      2 x model.layers.*.mlp.gate_proj.weight: merge, 16,384 elements, bfloat16\n"
        "      2 x model.layers.*.mlp.up_proj.weight: merge, 16,384 elements, bfloat16\n"
        "      2 x model.layers.*.post_attention_layernorm.weight: copy from base (--exclude), 128 elements, bfloat16\n"
        "      2 x model.layers.*.self_attn.k_proj.weight: merge, 4,096 elements, bfloat16\n"
        "      2 x model.layers.*.self_attn.o_proj.weight: merge, 8,192 elements, bfloat16\n"
        "      2 x model.layers.*.self_attn.q_proj.weight: merge, 8,192 elements, bfloat16\n"
        "      2 x model.layers.*.self_attn.v_proj.weight: merge, 4,096 elements, bfloat16\n"
        "      1 x model.norm.weight: copy from base (--exclude), 64 elements, bfloat16\n"
        "note: in/base: vocabulary rows are matched by token: 300 matched, 0 added, 0 filled with the owner's row, 0 dropped.\n"
        "note: in/math: vocabulary rows are matched by token: 300 matched, 0 added, 0 filled with the owner's row, 0 dropped.\n"
        "note: in/instruct_pad: vocabulary rows are matched by token: 300 matched, 0 added, 0 filled with the owner's row, 1 dropped.\n"
        f"reads {3 * 224_896 - 2 * 640:,} bytes; writes 227,056 bytes in 1 file(s). Nothing was written.\n"
    )


def test_dry_run_as_json(run):
    plan = json.loads(run("--method=task_arithmetic", "--dry_run", "--json", "--weights=1,-2", "--lambda=0.5").out)
    assert not Path("out").exists()
    assert plan["refusals"] == []
    assert plan["coefficients"] == [
        {"model": "in/math", "weight": 1.0, "coefficient": 0.5},
        {"model": "in/code", "weight": -2.0, "coefficient": -1.0},
    ]
    assert (plan["tensors"], plan["elements"]) == (TENSORS, 112_448)
    assert (plan["bytes_to_read"], plan["bytes_to_write"]) == (3 * 224_896, 227_056)
    assert plan["files"] == [{"name": "model.safetensors", "bytes": 227_056}]
    assert {group["action"] for group in plan["groups"]} == {"merge"}
    assert sum(group["count"] for group in plan["groups"]) == TENSORS
    assert sum(group["elements"] for group in plan["groups"]) == 112_448
    assert plan["recipe"]["merge_method"] == "task_arithmetic"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method=linear", "--weights=1,3"], [0.25, 0.75]),
        (["--method=linear", "--weights=1,3", "--no-normalize"], [1.0, 3.0]),
        (["--method=linear", "--weights=2"], [0.5, 0.5]),
        (["--method=task_arithmetic", "--weights=1,3"], [1.0, 3.0]),
        (["--method=task_arithmetic", "--weights=1,3", "--normalize", "--lambda=2"], [0.5, 1.5]),
        (["--method=dare_linear", "--weights", "-1,0.5"], [-1.0, 0.5]),
        (["--method=dare_linear", "--models_to_merge=in/math:0.5,in/code:-0.3"], [0.5, -0.3]),
        (["--method=ties", "--weights=1,3"], [None, None]),
        (["--method=widen"], [None, None]),
    ],
)
def test_effective_coefficients(run, flags, expected):
    plan = json.loads(run("--dry_run", "--json", *flags).out)
    assert [entry.get("coefficient") for entry in plan["coefficients"]] == expected


def test_dry_run_of_what_would_be_overwritten(run):
    run()
    before = {name: Path("out", name).read_bytes() for name in names("out")}
    run("--dry_run", "--overwrite", "--method=linear")
    assert {name: Path("out", name).read_bytes() for name in names("out")} == before


# ----------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--weights=0.5,0.3"], ["--weights", "0.5,0.3"]),
        (["--weights=-1,0.5"], ["--weights", "-1,0.5"]),
        (["--weights=-.5"], ["--weights", "-0.5,-0.5"]),
        (["--weights=0.5,0.3"], ["--models_to_merge=in/math:0.5,in/code:0.3"]),
        (["--weights=1e-1,5e-1"], ["--models_to_merge", "in/math:.1, in/code:0.5"]),
        (["--density=0.5"], []),
        (["--density=0.5", "--lambda=1", "--weights=1"], []),
        (["--lambda=-0.5"], ["--lambda", "-.5"]),
        (["--normalize"], []),
        (["--device=cpu"], []),
        (["--workers=1"], ["--workers", "4"]),
        (["--max_shard_size=5GB"], ["--max_shard_size", "1 GiB"]),
        (["--max_shard_size=500000"], ["--max_shard_size=500KB"]),
        (["--max_shard_size=500K"], ["--max_shard_size=0.5mb"]),
        (["--exclude=model.norm"], ["--exclude", r"^model\.norm\.weight$"]),
        (["--dtype=auto"], ["--dtype=bfloat16"]),
        (["--trust_remote_code"], []),
    ],
)
def test_two_ways_to_say_it(run, first, second):
    run("--save_path=one", *first)
    run("--save_path=two", *second)
    assert same_bytes("one", "two")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--weights=0.5,0.3"], ["--weights=0.3,0.5"]),
        (["--weights=1,2", "--normalize"], ["--weights=1,2", "--no-normalize"]),
        (["--density=0.5"], ["--density=1"]),
        (["--density=0.5,0.6"], ["--density=0.6,0.5"]),
        (["--lambda=1"], ["--lambda=0.5"]),
        (["--exclude=norm"], []),
        (["--method=dare_ties"], ["--method=dare_ties", "--seed=1"]),
        (["--method=dare_ties", "--seed=1"], ["--method=dare_ties", "--seed=-1"]),
        (["--method=dare_linear"], ["--method=dare_ties"]),
        (["--method=widen"], ["--method=widen", "--widen_ratio=2"]),
        (["--method=widen"], ["--method=widen", "--widen_calibration=0.5"]),
    ],
)
def test_what_makes_a_difference(run, first, second):
    run("--save_path=one", *first)
    run("--save_path=two", *second)
    assert not same_bytes("one", "two")


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_methods_in_any_case(run, method):
    for folder, spelling in (("lower", method), ("upper", method.upper()), ("title", method.title())):
        run(f"--save_path={folder}", f"--method={spelling}")
        assert recipe(folder)["merge_method"] == method
    assert same_bytes("lower", "upper")
    assert same_bytes("lower", "title")


def test_excluded_tensors_are_the_base(run):
    run("--exclude", r"norm|layers\.0\.")
    base, out, math = weights("in/base"), weights("out"), weights("in/math")
    kept = {name for name in base if torch.equal(base[name], out[name])}
    assert kept == {
        name for name in base if "norm" in name or "layers.0." in name or torch.equal(base[name], math[name])
    }
    assert len(kept) == 9 + 3


@pytest.mark.parametrize(("method", "flags"), [("linear", []), ("task_arithmetic", []), ("ties", ["--density=1"])])
def test_one_model_with_weight_1_is_that_model(run, method, flags):
    run(f"--method={method}", "--models_to_merge=in/math", *flags)
    out, math = weights("out"), weights("in/math")
    assert all(torch.equal(out[name], math[name]) for name in math)


def test_lambda_0_is_the_base(run):
    run("--lambda=0")
    out, base = weights("out"), weights("in/base")
    assert all(torch.equal(out[name], base[name]) for name in base)


# ----------------------------------------------------------------------------------------------------- kinds of input


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 3), ("bin", 1), ("bin", 3), ("old bin", 1)])
def test_however_the_inputs_are_stored(run, models, kind, shards):
    for name in ("base", "math", "code"):
        content = load_file(models / name / "model.safetensors")
        config = json.loads((models / name / "config.json").read_text())
        folder = write_checkpoint(
            Path("stored", name), content, config, shards, weights=kind.split()[-1], tokenizer=True
        )
        if kind == "old bin":  # before torch 1.6
            torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    run("--base_model=stored/base", "--models_to_merge=stored/math,stored/code")
    run("--save_path=expected")
    assert same_bytes("out", "expected")
    assert names("out") == PLAIN


def test_names_with_everything_in_them(run, models, tmp_path):
    odd = tmp_path / "my models" / "über: α@1 `x`"
    for name in ("base", "math", "code"):
        shutil.copytree(models / name, odd / f"{name}:2")
    run(
        "--base_model",
        f"{odd}/base:2",
        "--models_to_merge",
        f"{odd}/math:2:0.5, {odd}/code:2:0.3",
        "--save_path",
        "o ü:t",
    )
    run("--weights=0.5,0.3", "--save_path=expected")
    assert same_bytes("o ü:t", "expected")
    front, text = card("o ü:t")
    assert "base_model" not in front
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        f"- ``{odd}/{name}:2``" for name in ("math", "code")
    ]
    assert "# o ü:t\n" in text
    assert shlex.split(text.split("```sh\n")[1].split("\n```")[0])[-1] == "o ü:t"
    assert recipe("o ü:t")["models"][0] == {"model": f"{odd}/math:2", "parameters": {"weight": 0.5, "density": 0.5}}


def test_linked_inputs(run, models, tmp_path):
    """Folders that are links, and, as in the hub's cache, files that are links."""
    (tmp_path / "linked").symlink_to(models / "math")
    (tmp_path / "cache").mkdir()
    for file in (models / "code").iterdir():
        (tmp_path / "cache" / file.name).symlink_to(file)
    run("--models_to_merge=linked,cache")
    run("--save_path=expected")
    assert same_bytes("out", "expected")
    assert not any(path.is_symlink() for path in Path("out").iterdir())


def test_home_in_paths(run, models, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    run("--base_model=~/base", "--models_to_merge=~/math:1,~/code:1", "--save_path=~/merged")
    assert names(models / "merged") == PLAIN
    assert not Path("~").exists()
    shutil.rmtree(models / "merged")


def test_models_of_other_dtypes(run, models):
    """The output has the base's dtype; a model in float32 adds what it has."""
    config = json.loads((models / "math" / "config.json").read_text())
    single = {name: tensor.float() for name, tensor in load_file(models / "math" / "model.safetensors").items()}
    write_checkpoint(Path("single"), single, config, tokenizer=True)
    run("--models_to_merge=single,in/code")
    run("--save_path=expected")
    assert same_bytes("out", "expected")


def test_models_of_the_hub(run, models, monkeypatch, tmp_path):
    """A dry run fetches no weights, a merge does, and once they are there no network is needed."""
    names_of = ("base", "math", "code")
    flags = ("--base_model=org/base", "--models_to_merge=org/math@main:0.6, org/code:0.4")
    run("--weights=0.6,0.4", "--save_path=expected")
    with FakeHub({f"org/{name}": models / name for name in names_of}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        assert "2 file(s)" not in run(*flags, "--dry_run").out
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        run(*flags)
        assert same_bytes("out", "expected")
        assert card()[0]["base_model"] == ["org/base", "org/math", "org/code"]
        for entry, name in zip(recipe()["inputs"], names_of, strict=True):
            assert re.fullmatch("[0-9a-f]{40}", entry["revision"])
            content = (models / name / "model.safetensors").read_bytes()
            assert entry["files"]["model.safetensors"]["sha256"] == hashlib.sha256(content).hexdigest()
            assert "mtime_ns" not in entry["files"]["model.safetensors"]
        assert [entry["model"] for entry in recipe()["inputs"]] == ["org/base", "org/math@main", "org/code"]
    ended = run(*flags, "--overwrite")
    assert same_bytes("out", "expected")
    assert [line.split(": ")[1] for line in ended.err.splitlines()] == ["org/base", "org/math@main", "org/code"]
    assert all(line.startswith("note: ") and "from the cache is used" in line for line in ended.err.splitlines())


# ------------------------------------------------------------------------------------------------------- output folder


def test_parents_are_made(run):
    run("--save_path=a/b/c/out")
    assert names("a") == [f"b/c/out/{name}" for name in PLAIN]


def test_an_empty_folder_is_used(run):
    Path("out").mkdir()
    run("--save_path=out/")
    assert names("out") == PLAIN
    assert sorted(path.name for path in Path().iterdir()) == ["in", "out"]


def test_overwrite(run):
    run()
    Path("out/old.safetensors").touch()
    run("--overwrite", "--method=linear")
    assert names("out") == PLAIN
    assert recipe()["merge_method"] == "linear"
    assert sorted(path.name for path in Path().iterdir()) == ["in", "out"]


def test_overwrite_where_nothing_is(run):
    run("--overwrite")
    assert names("out") == PLAIN


def test_output_through_a_link(run):
    Path("disk").mkdir()
    Path("out").symlink_to("disk/merged")
    run()
    run("--overwrite")
    assert Path("out").is_symlink()
    assert names("disk") == [f"merged/{name}" for name in PLAIN]
    assert "# merged\n" in card()[1]


# ------------------------------------------------------------------------------------------------------------- the shell


def test_from_another_folder(models, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "merge.py", "--method", "TIES", "--base_model", "base", "--models_to_merge=math,code",
         "--save_path", tmp_path / "out"],
        cwd=models, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Merge report")
    assert names(tmp_path / "out") == PLAIN


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--method", "ties"]])
def test_no_torch_without_a_merge(flags):
    code = "import sys, merge\ntry: merge.main(sys.argv[1:])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    text = done.stdout + done.stderr
    assert f"merge.py {VERSION}\n" == text if flags == ["--version"] else "--models_to_merge" in text


def test_help_says_what_matters(capsys):
    with pytest.raises(SystemExit):
        merge.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        *METHODS,
        "default 0.5",
        "which means 1.0: no trimming and no dropping",
        "NAME@REVISION",
        "A:0.5,B:0.3",
    ):
        assert part in text


def test_output_that_nobody_reads(models, tmp_path):
    """`merge.py ... | head -0` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    flags = [
        "--method=ties",
        "--base_model=base",
        "--models_to_merge=math,code",
        "--dry_run",
        f"--save_path={tmp_path / 'x'}",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "merge.py", *flags],
        cwd=models, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_progress_on_a_terminal(models, tmp_path):
    """A bar with a rate on stderr, nothing but the result on stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))  # lines and columns
    flags = ["--method=ties", "--base_model=base", "--models_to_merge=math,code", f"--save_path={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, ROOT / "merge.py", *flags],
        cwd=models, stdout=subprocess.PIPE, stderr=theirs, text=True, check=False, timeout=120,
    )  # fmt: skip
    bar = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert done.stdout.startswith("Merge report")
    assert "merging: 100%" in bar
    assert "B/s" in bar
