"""LoRA adapters as inputs: equal to what peft makes of them, up to one rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from checkpoints.adapters import AdapterConfig
from checkpoints.errors import ArgumentError, InputError
from checkpoints.location import parse_model
from checkpoints.model import open_model
from checkpoints.reader import read_tensor
from checkpoints.source import READ_ELEMENTS
from tests.adapter_files import make_adapter, texts, without_prefix
from tests.fake_hub import FakeHub
from tests.in_memory import assert_rounds_to, patch_grid
from tests.pico import Family, make_family
from tests.scene import call

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """peft's own merge in float64, under the names on disk of the base; a tied head is in it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload()
    return dict(merged.state_dict())


def check_against_peft(base: Path, adapter: Path, names: Mapping[str, str] | None = None) -> int:
    """Every tensor of `base+adapter` is peft's, to what float32 makes of it; how many the adapter changes."""
    expected = merged_by_peft(base, adapter)
    model = open_model(f"{base}+{adapter}")
    plain = load_file(base / "model.safetensors")
    changed = 0
    for name, info in model.weights.tensors.items():
        if name.endswith(".attn.bias"):  # a mask, which loading ignores
            continue
        ours = read_tensor(model.weights, name)
        theirs = expected[(names or {}).get(name, name)]
        slack = theirs.abs() * 2**-22 + 2**-26
        assert_rounds_to(ours, theirs, slack, where=name)
        assert info.plain_dtype == plain[name].dtype or name not in plain
        changed += not torch.equal(ours.double(), plain[name].double())
    model.weights.close()
    return changed


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("adapters"), "llama", n_models=1)


@pytest.fixture(scope="module")
def conv_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("conv"), "gpt2", n_models=1)


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"r": 4, "lora_alpha": 6, "target_modules": LINEAR}, 14),
    "rank-stabilised": ({"r": 4, "use_rslora": True, "target_modules": ["q_proj"]}, 2),
    "patterns": (
        {
            "r": 4, "lora_alpha": 6, "target_modules": LINEAR, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 8},
            "alpha_pattern": {"^model.layers.1.mlp.*": 3, "o_proj": 5},
        },
        14,
    ),
    "one layer": ({"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]}, 1),
    "embedding and head": ({"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 4),
    "modules to save": ({"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, 9),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_peft_makes_of_it(family: Family, tmp_path: Path, kind: str):
    config, changed = KINDS[kind]
    assert check_against_peft(family.base, make_adapter(tmp_path / "lora", family.base, **config)) == changed


def test_weights_that_are_stored_input_first(conv_family: Family, tmp_path: Path):
    """GPT-2's Conv1D: the product is transposed; one of the matrices is square."""
    config = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "lora", conv_family.base, **config)
    assert check_against_peft(conv_family.base, adapter) == 8
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    # What is not square can only be meant so, and then the rest is.
    assert check_against_peft(conv_family.base, adapter) == 8


@pytest.mark.parametrize(("bias", "changed"), [("lora_only", 4), ("all", 15)])
def test_biases_that_were_trained(conv_family: Family, tmp_path: Path, bias: str, changed: int):
    config = {"r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": bias}
    adapter = make_adapter(tmp_path / "lora", conv_family.base, **config)
    assert check_against_peft(conv_family.base, adapter) == changed


def test_names_on_disk_that_differ_from_those_of_modules(conv_family: Family, tmp_path: Path):
    """As GPT-2 was published: without the prefix that its modules have."""
    adapter = make_adapter(tmp_path / "lora", conv_family.base, r=4, target_modules=["c_fc"], fan_in_fan_out=True)
    base = without_prefix(conv_family.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    assert "h.0.mlp.c_fc.weight" in tensors
    assert check_against_peft(base, adapter, {name: f"transformer.{name}" for name in tensors}) == 2


@pytest.fixture(scope="module")
def tied_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("tied"), "qwen2", dtype=torch.float32, n_models=1)


ONE_END: dict[str, dict[str, Any]] = {
    "the embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "each in its own way": {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
    "the embedding, whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", ONE_END)
def test_one_end_of_a_tie(tied_family: Family, tmp_path: Path, kind: str):
    """The output computes what base and adapter do, with a head of its own; without leave for one it is refused."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tied_family.base
    adapter = make_adapter(tmp_path / "lora", base, **ONE_END[kind])
    how = [
        "--method=task_arithmetic",
        "--base_model",
        base,
        "--models_to_merge",
        adapter,
        "--save_path",
        tmp_path / "out",
    ]
    ended = call(merge, *how, code=1)
    said = ended.err
    assert "lm_head.weight: expected equal to model.embed_tokens.weight, to which" in said
    assert "Use --tie_word_embeddings no, which gives the output a head of its own." in said
    call(merge, *how, "--tie_word_embeddings", "no")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits
        theirs = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - before).abs().max() > 1e-3


def test_an_adapter_that_keeps_the_tie(tied_family: Family, tmp_path: Path):
    """Trained with `ensure_weight_tying`: one change for both ends."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tied_family.base
    adapter = make_adapter(tmp_path / "lora", base, r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    call(merge, "--method=linear", "--base_model", base, "--models_to_merge", adapter, "--save_path", tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tables_beside_those_from_before_the_training(family: Family, tmp_path: Path):
    """As some versions of peft write new tokens: each table by its name, trained, and as it was."""
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = torch.randn(300, 32)
    for module in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{module}"
        tensors |= {f"{key}.weight": torch.zeros(300, 32), f"{key}.modules_to_save.weight": trained.clone()}
        tensors[f"{key}.original_module.weight"] = torch.zeros(300, 32)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    model = open_model(f"{family.base}+{adapter}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(read_tensor(model.weights, name), trained)
    assert model.weights.tensors.keys() == load_file(family.base / "model.safetensors").keys()
    model.weights.close()


def test_an_adapter_that_names_a_quantised_base(family: Family, tmp_path: Path):
    """Refused with what to write: the recipe's base where it is of that size, which then merges."""
    quantised = Path(shutil.copytree(family.base, tmp_path / "base_4bit"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors | {f"{name}.absmax": torch.zeros(24)}, quantised / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["up_proj"])
    stated = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": str(quantised)}))
    how = ["--method=linear", "--base_model", family.base, "--save_path", tmp_path / "out"]
    ended = call(merge, *how, "--models_to_merge", adapter, code=1)
    assert (
        f"merge.py: {adapter}: its base {quantised} is quantised (bitsandbytes), which cannot be merged. Put the adapter on the unquantised "
        f"model: write {family.base}+{adapter}." in ended.err
    )
    call(merge, *how, "--models_to_merge", f"{family.base}+{adapter}")
    other = make_family(tmp_path / "other", "qwen2", n_models=1).base
    ended = call(
        merge,
        "--method=linear",
        "--base_model",
        other,
        "--models_to_merge",
        adapter,
        "--save_path",
        tmp_path / "no",
        code=1,
    )
    assert f"write BASE+{adapter}." in ended.err


def test_no_block_changes_a_bit(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj", "embed_tokens"])
    patch_grid(monkeypatch, 256)  # eight rows of 32 in a tile
    model = open_model(f"{family.base}+{adapter}")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        whole = read_tensor(model.weights, name).flatten()
        for size in (1, 31, 100, 257, 700):
            buffer = torch.empty(8 * size, dtype=torch.uint8)
            pieces = [
                model.weights.read(name, start, min(start + size, len(whole)), buffer).clone()
                for start in range(0, len(whole), size)
            ]
            assert torch.equal(torch.cat(pieces), whole)
    assert READ_ELEMENTS == 1 << 17


# ---------------------------------------------------------------------------------------------------- the commands


def test_merging_adapters(family: Family, tmp_path: Path):
    """An adapter by itself, one with its base, and a whole model: as merging what peft makes of them."""
    base = family.base
    adapters = [make_adapter(tmp_path / f"lora_{seed}", base, seed=seed, r=4, target_modules=LINEAR) for seed in (0, 1)]
    whole = []
    for adapter in adapters:
        target = Path(shutil.copytree(base, tmp_path / f"whole_{adapter.name}"))
        theirs = {name: tensor.float() for name, tensor in merged_by_peft(base, adapter).items()}
        save_file(theirs, target / "model.safetensors", {"format": "pt"})
        whole.append(target)
    how = ["--method", "ties", "--density", "0.5", "--base_model", base, "--report", "none"]
    named = f"{adapters[0]},{base}+{adapters[1]},{family.models[0]}"
    call(merge, *how, "--models_to_merge", named, "--save_path", tmp_path / "out")
    call(
        merge,
        *how,
        "--models_to_merge",
        f"{whole[0]},{whole[1]},{family.models[0]}",
        "--save_path",
        tmp_path / "expected",
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] != tensor).double().mean() < 0.01, name  # float32 rounds elsewhere than float64
        torch.testing.assert_close(ours[name], tensor)
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    assert recipe["models"][1]["model"] == f"{base}+{adapters[1]}"
    entry = recipe["inputs"][2]
    assert (entry["folder"], [*entry["files"]]) == (str(base), ["model.safetensors"])
    assert [(one["folder"], [*one["files"]]) for one in entry["adapters"]] == [
        (str(adapters[1]), ["adapter_model.safetensors"])
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(str(folder) in card for folder in (base, *adapters, family.models[0]))
    assert "base_model:" not in card  # the hub takes no card that names folders


def test_an_adapter_as_the_base_gives_its_dtype(family: Family, tmp_path: Path):
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=LINEAR)
    how = ["--method", "task_arithmetic", "--lambda", "0", "--models_to_merge", family.models[0]]
    call(merge, *how, "--base_model", f"{family.base}+{adapter}", "--save_path", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged_by_peft(family.base, adapter).items():
        assert ours[name].dtype == torch.bfloat16
        assert_rounds_to(ours[name], tensor, tensor.abs() * 2**-22 + 2**-26)


def test_relaxing_an_adapter(family: Family, tmp_path: Path):
    """omega 1: what peft makes of it; an adapter as the base is what is run for the statistics."""
    base, adapter = family.base, make_adapter(tmp_path / "lora", family.base, r=4, target_modules=LINEAR)
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    save_file(
        {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()},
        whole / "model.safetensors",
        {"format": "pt"},
    )
    how = ["--calibration_data", texts(tmp_path), "--n_samples", "8", "--block_size", "32"]
    names = ["--merged_model", adapter, "--pretrained_model_name", base]
    call(performAIM, *names, *how, "--omega", "1", "--save_path", tmp_path / "relaxed")
    relaxed = load_file(tmp_path / "relaxed" / "model.safetensors")
    for name, tensor in merged_by_peft(base, adapter).items():
        assert_rounds_to(relaxed[name], tensor, tensor.abs() * 2**-22 + 2**-26)
    found = []
    for number, pretrained in enumerate((f"{base}+{adapter}", whole)):
        names = ["--merged_model", family.models[0], "--pretrained_model_name", pretrained]
        call(performAIM, *names, *how, "--omega", "0", "--save_path", tmp_path / f"to_{number}")
        found.append(load_file(tmp_path / f"to_{number}" / "model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=2**-7, atol=2**-10)


def test_adapters_on_adapters(family: Family, tmp_path: Path):
    adapters = [
        make_adapter(tmp_path / f"lora_{s}", family.base, seed=s, r=2, target_modules=["q_proj"]) for s in (0, 1)
    ]
    name = "model.layers.0.self_attn.q_proj.weight"
    start = load_file(family.base / "model.safetensors")[name].double()
    expected = sum((merged_by_peft(family.base, adapter)[name] - start for adapter in adapters), start)
    stacked = open_model(f"{family.base}+{adapters[0]}+{adapters[1]}")
    torch.testing.assert_close(read_tensor(stacked.weights, name).double(), expected, rtol=1e-6, atol=1e-7)
    assert len(stacked.folders) == 3


def test_an_adapter_with_more_tokens(family: Family, tmp_path: Path):
    """Its resized tables and its tokenizer: what the base gets is the union."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grown = tmp_path / "grown"
    model = AutoModelForCausalLM.from_pretrained(family.base)
    model.resize_token_embeddings(302, mean_resizing=False)
    model.save_pretrained(grown)
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    config = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    adapter = make_adapter(tmp_path / "lora", grown, **config)
    tokenizer.save_pretrained(adapter)
    how = ["--method", "task_arithmetic", "--base_model", family.base, "--models_to_merge", f"{family.base}+{adapter}"]
    call(merge, *how, "--save_path", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    torch.testing.assert_close(merged["lm_head.weight"], saved.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>") == 301

    call(merge, "--method=linear", "--base_model", f"{family.base}+{adapter}", "--models_to_merge", family.models[0],
        "--save_path", tmp_path / "grown_base")  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown_base").config.vocab_size == 302


def test_adapters_on_the_hub(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its base is fetched by the name in its config; the plan is made before the base's weights are there."""
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj"])
    how = ["--method", "linear", "--base_model", family.base, "--report", "none"]
    call(merge, *how, "--models_to_merge", adapter, "--save_path", tmp_path / "expected")
    spoil(adapter, base_model_name_or_path="org/base", revision="main")
    with FakeHub({"org/base": family.base, "org/lora": adapter}) as hub:
        hub.attach(monkeypatch, tmp_path / "cache")
        call(merge, *how, "--models_to_merge", "org/lora", "--save_path", tmp_path / "out", "--dry_run")
        found = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
        assert found == {"adapter_model.safetensors"}
        for name in ("org/lora", "org/base+org/lora@main"):
            call(merge, *how, "--models_to_merge", name, "--save_path", tmp_path / "out", "--overwrite")
            ours, theirs = (load_file(tmp_path / one / "model.safetensors") for one in ("out", "expected"))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert 'base_model:\n- "org/base"\n- "org/lora"\nlibrary_name' in (tmp_path / "out" / "README.md").read_text()
    (entry,) = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["inputs"][1:]
    assert entry["revision"] != entry["adapters"][0]["revision"]
    assert "sha256" in entry["adapters"][0]["files"]["adapter_model.safetensors"]


# -------------------------------------------------------------------------------------------------------- refusals


def spoil(adapter: Path, **entries: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"use_dora": True}, "expected a plain LoRA adapter, got DoRA"),
        ({"peft_type": "LOHA"}, "got LOHA"),
        ({"peft_type": "IA3"}, "got IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's weights too"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "got LoRA on fused parameters"),
        ({"lora_alpha": "x"}, "expected numbers as alphas"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./nowhere"}, "its base: ./nowhere: no such folder"),
    ],
)
def test_adapters_that_are_refused(family: Family, tmp_path: Path, entries: dict[str, Any], says: str):
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj"])
    spoil(adapter, **entries)
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        open_model(str(adapter))


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_model(f"{base}+{adapter}")
    return str(caught.value)


def test_an_adapter_of_another_base(family: Family, conv_family: Family, tmp_path: Path):
    other = make_family(tmp_path / "other", "mixtral", n_models=0)
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj", "up_proj"])
    said = refusal(other.base, adapter)
    assert f"adapts model.layers.0.mlp.up_proj.weight, which {other.base} does not store" in said
    assert "q_proj" not in said
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.ones(4, 7)}, adapter / "adapter_model.safetensors")
    assert "expected factors for shape [32, 32], got [4, 7], [32, 4]" in refusal(family.base, adapter)
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(rest, adapter / "adapter_model.safetensors")
    assert "expected lora_A and lora_B, got one of them" in refusal(family.base, adapter)
    save_file(
        {**tensors, "base_model.model.x.lora_magnitude_vector": torch.ones(4)}, adapter / "adapter_model.safetensors"
    )
    assert "x.lora_magnitude_vector: expected tensors of a plain LoRA adapter" in refusal(family.base, adapter)


def test_an_adapter_is_not_its_own_base(family: Family, tmp_path: Path):
    adapter = make_adapter(tmp_path / "lora", family.base, r=4, target_modules=["q_proj"])
    spoil(adapter, base_model_name_or_path=str(adapter))
    for name in (str(adapter), f"{adapter}+{adapter}"):
        with pytest.raises(InputError, match="is an adapter, and named as its own base"):
            open_model(name)


def test_a_whole_model_is_no_adapter(family: Family):
    assert "expected an adapter after the '+', got a whole model" in refusal(family.base, family.models[0])


def test_names_of_adapters(tmp_path: Path):
    name = parse_model("org/base@v1+org/lora@main")
    assert (name.path_or_id, name.revision, str(name.base)) == ("org/lora", "main", "org/base@v1")
    assert str(name) == "org/base@v1+org/lora@main"
    assert str(parse_model("a+b+c").base) == "a+b"
    (tmp_path / "c++").mkdir()
    assert parse_model(str(tmp_path / "c++")).base is None
    for text in ("+x", "x+"):
        with pytest.raises(ArgumentError, match=r"expected BASE\+ADAPTER"):
            parse_model(text)


@pytest.mark.parametrize(
    ("module", "expected"),
    [("model.layers.1.mlp.up_proj", 8.0), ("model.layers.1.q_proj", 4.0), ("model.layers.1.my_up_proj", 4.0)],
)
def test_patterns_fit_the_end_of_a_name(module: str, expected: float):
    config = AdapterConfig(None, None, 16.0, {"up_proj": 32.0}, rank_stabilised=False, transposed=False)
    assert config.scaling(module, 4) == expected
