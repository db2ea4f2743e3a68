"""Adapters made of fine-tunes: the best of their rank, exact where the change has that rank, read by peft and by the toolkit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters
import extract_lora
import merge
from adapters import LoraChoice, extraction
from checkpoints.errors import InputError
from checkpoints.model import open_model
from checkpoints.reader import read_tensor
from tests.adapter_files import make_adapter
from tests.pico import Family, copy_tokenizer, make_family
from tests.scene import Scene, call

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama", torch.float32, n_models=1)


@pytest.fixture(scope="module")
def conv_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("gpt2"), "gpt2", torch.float32, n_models=1)


def adapted(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every tensor of `base+adapter`, as the toolkit reads it."""
    model = open_model(f"{base}+{adapter}")
    try:
        return {name: read_tensor(model.weights, name) for name in model.weights.tensors}
    finally:
        model.weights.close()


def by_peft(base: Path, adapter: Path) -> Any:
    """The base with the adapter merged into it by peft, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def with_adapter(base: Path, adapter: Path, folder: Path) -> Path:
    """A whole checkpoint of base and adapter, summed in float64 and rounded once to float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload().float().save_pretrained(folder)  # fmt: skip
    copy_tokenizer(folder)
    return folder


def test_a_change_of_exact_rank_comes_back_to_float32_rounding(family: Family, tmp_path: Path):
    """Ranks by tensor are found, though more directions were allowed; what no adapter touched is left out."""
    config: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "rank_pattern": {"up_proj": 7, "layers.0.self_attn.q_proj": 2}}  # fmt: skip
    config["exclude_modules"] = ["model.layers.1.self_attn.v_proj"]
    tuned = with_adapter(family.base, make_adapter(tmp_path / "lora", family.base, **config), tmp_path / "tuned")
    out = tmp_path / "out"
    said = call(extract_lora, "--model", tuned, "--base_model", family.base, "--rank=16", "--save_path", out)
    assert said.err == ""
    # Ranks.
    tensors = load_file(out / "adapter_model.safetensors")
    ranks = {name.split(".", 2)[2]: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    assert len(ranks) == 13
    for name, rank in ranks.items():
        assert rank == (7 if "up_proj" in name else 2 if "layers.0.self_attn.q_proj" in name else 4), name
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], len(saved["rank_pattern"])) == (4, 4, 3)
    assert saved["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "model.layers.0.self_attn.v_proj", "o_proj", "q_proj", "up_proj",
    ]  # fmt: skip
    # The toolkit and peft read the fine-tune, to the rounding of float32: of the weight, and of a product of 7 terms.
    wanted = load_file(tuned / "model.safetensors")
    theirs = by_peft(family.base, out).state_dict()
    for name, tensor in adapted(family.base, out).items():
        slack = wanted[name].abs().double() * 2**-23 + 2**-24
        for got in (tensor, theirs[name]):
            assert bool(((got.double() - wanted[name].double()).abs() <= slack).all()), name
    assert max(one["error_of_weights"] for one in report(out)) < 2**-23


def report(folder: Path) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = json.loads((folder / "merge_recipe.json").read_text())["report"]["kinds"]
    return kinds


@pytest.mark.parametrize("choice", [LoraChoice(rank=3), LoraChoice(energy=0.8), LoraChoice(rank=9, energy=0.8)])
def test_no_adapter_of_its_rank_is_nearer(family: Family, tmp_path: Path, choice: LoraChoice):
    """The rank is what was asked for, and the error that of the truncated SVD, by numpy's own decomposition."""
    extracted = adapters.extract_lora(str(family.base), str(family.models[0]), tmp_path / "out", choice)
    assert not extracted.was_complete
    base, tuned = (load_file(folder / "model.safetensors") for folder in (family.base, family.models[0]))
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, a in factors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        change = (tuned[name] - base[name]).double()
        values = torch.linalg.svdvals(change)
        shares = (values**2).cumsum(0) / (values**2).sum()
        wanted = choice.rank or len(values)
        if choice.energy is not None:
            wanted = min(wanted, int((shares < choice.energy).sum()) + 1)
        assert len(a) == wanted, name
        product = factors[key.replace("lora_A", "lora_B")].double() @ a.double()
        error = float((change - product).norm())
        assert error == pytest.approx(float(values[wanted:].norm()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("saved", ["all", "bias,ln_1,ln_2,ln_f,wte,wpe"])
def test_everything_can_be_kept(conv_family: Family, tmp_path: Path, saved: str):
    """Matrices stored input first, one of them square, biases, norms and tied tables: the toolkit and peft make the fine-tune of it."""
    base, tuned = conv_family.base, conv_family.models[0]
    out = tmp_path / "out"
    ended = call(extract_lora, "--model", tuned, "--base_model", base, "--energy=1", "--modules_to_save", saved, "--save_path", out)  # fmt: skip
    assert ended.err == ""
    wanted = load_file(tuned / "model.safetensors")
    got = adapted(base, out)
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, rtol=1e-6, atol=1e-7), name
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = by_peft(base, out).eval()(tokens).logits
        expected = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()(tokens).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_said_with_how_to_keep_it(family: Family, tmp_path: Path):
    ended = call(extract_lora, "--model", family.models[0], "--base_model", family.base, "--save_path", tmp_path / "out")  # fmt: skip
    assert "warning: changed, and not in the adapter: model.embed_tokens.weight (" in ended.err
    assert "--modules_to_save all stores them whole." in ended.err
    lost = {one["kind"]: one for one in report(tmp_path / "out") if one["stored_as"] == "lost"}
    assert lost["model.norm.weight"]["error_of_change"] == 1.0
    assert re.search(r"^model.norm.weight +not stored +1/1 ", ended.out, re.MULTILINE)


def test_a_table_that_stays_tied(tmp_path: Path):
    """The embedding stored whole is the head as well, as in the fine-tune; norms of some layers alone are named whole."""
    tied = make_family(tmp_path / "tied", "qwen3", torch.float32, n_models=1)
    tensors = load_file(tied.models[0] / "model.safetensors")
    base = load_file(tied.base / "model.safetensors")
    kept = "model.layers.1.input_layernorm.weight"
    tensors |= {name: base[name] for name in tensors if "norm" in name and name != kept}
    save_file(tensors, tied.models[0] / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    call(extract_lora, "--model", tied.models[0], "--base_model", tied.base, "--energy=1", "--modules_to_save=all", "--save_path", out)  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head", "model.layers.1.input_layernorm"]
    assert config["ensure_weight_tying"]
    merged = by_peft(tied.base, out)
    assert torch.equal(merged.lm_head.weight, tensors["model.embed_tokens.weight"])
    # A merge of the adapted model has the tie, too.
    call(merge, "--method=linear", "--base_model", tied.base, "--models_to_merge", f"{tied.base}+{out}", "--save_path", tmp_path / "merged")  # fmt: skip
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.allclose(written[name], tensors[name], rtol=1e-6, atol=1e-7) for name in written)


def test_experts_of_one_parameter_are_lost_and_said_so(tmp_path: Path):
    sparse = make_family(tmp_path / "moe", "mixtral", torch.float32, n_models=1)
    ended = call(extract_lora, "--model", sparse.models[0], "--base_model", sparse.base, "--modules_to_save=all", "--save_path", tmp_path / "out")  # fmt: skip
    assert "experts.*.w1.weight (" in ended.err
    assert "They cannot be kept, as no plain adapter changes them." in ended.err
    assert adapted(sparse.base, tmp_path / "out")


def test_an_interrupted_run_goes_on_to_the_same_bytes(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = ["--model", family.models[0], "--base_model", family.base, "--energy=0.9", "--save_path"]
    call(extract_lora, *flags, tmp_path / "whole")
    factorise, calls = extraction.factorise, []

    def cut_off(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return factorise(*arguments)

    monkeypatch.setattr(extraction, "factorise", cut_off)
    ended = call(extract_lora, *flags, tmp_path / "out", code=130)
    assert "Run the same command again to go on" in ended.err
    # One file of factors is damaged meanwhile: it is made again, the others are believed.
    state = tmp_path / "out.partial" / ".merge-in-progress"
    (state / "factors-0.safetensors").write_bytes(b"damaged")
    ended = call(extract_lora, *flags, tmp_path / "out")
    assert "going on: 3 of 15 matrices are there" in ended.err
    assert len(calls) == 5 + 12
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "is complete already" in call(extract_lora, *flags, tmp_path / "out").out
    assert not list(tmp_path.glob("*.partial"))


def test_factors_in_sixteen_bits_and_a_verified_folder(family: Family, tmp_path: Path):
    out = tmp_path / "out"
    call(extract_lora, "--model", family.models[0], "--base_model", family.base, "--dtype=bfloat16", "--modules_to_save=norm", "--save_path", out)  # fmt: skip
    dtypes = {("lora" in name): tensor.dtype for name, tensor in load_file(out / "adapter_model.safetensors").items()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}
    assert "as written" in call(merge, "--verify", out).out
    assert "library_name: peft" in (out / "README.md").read_text()


def test_the_fine_tune_s_tokenizer_and_template_come_along(family: Family, tmp_path: Path):
    """Where the base has rows for its tokens; else neither comes, which is said."""
    tuned = shutil.copytree(family.models[0], tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    flags = ["--model", tuned, "--base_model", family.base, "--modules_to_save=all", "--save_path"]
    assert call(extract_lora, *flags, tmp_path / "out").err == ""
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 300, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = call(extract_lora, *flags, tmp_path / "other")
    assert "has tokens that" in ended.err
    assert not (tmp_path / "other" / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------------------ merge.py --as_lora


@pytest.fixture(scope="module")
def two_adapters(family: Family, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Models of one base: an adapter of rank 4, and one of rank 2 with a norm that it has whole."""
    folder = tmp_path_factory.mktemp("two")
    one = make_adapter(folder / "one", family.base, seed=1, r=4, target_modules=["q_proj", "up_proj"])
    two = make_adapter(folder / "two", family.base, seed=2, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    return f"{family.base}+{one},{family.base}+{two}"


def test_a_sum_of_adapters_is_an_adapter(family: Family, two_adapters: str, tmp_path: Path):
    """Of the sum of their ranks; it is what merge.py writes as a checkpoint, here and in peft."""
    flags = ["--method=task_arithmetic", "--base_model", family.base, "--models_to_merge", two_adapters, "--lambda=0.5"]
    ended = call(merge, *flags, "--as_lora", "--save_path", tmp_path / "lora", "--log_file", tmp_path / "run.jsonl")
    assert "It goes on the base as" in ended.out
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "plan", "end"]
    assert events[1]["lora"]["energy"] == 1.0
    ranks = {
        name.split("base_model.model.")[1]: len(tensor)
        for name, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()
        if ".lora_A." in name
    }
    assert ranks == {
        f"model.layers.{layer}.{module}.lora_A.weight": rank
        for layer in range(2)
        for module, rank in (("self_attn.q_proj", 6), ("mlp.up_proj", 4))
    }
    call(merge, *flags, "--save_path", tmp_path / "whole")
    wanted, theirs = load_file(tmp_path / "whole" / "model.safetensors"), by_peft(family.base, tmp_path / "lora").state_dict()  # fmt: skip
    for name, tensor in adapted(family.base, tmp_path / "lora").items():
        for got in (tensor, theirs[name]):
            assert torch.allclose(got, wanted[name], rtol=1e-6, atol=1e-6), name
    assert not torch.equal(wanted["model.norm.weight"], load_file(family.base / "model.safetensors")["model.norm.weight"])  # fmt: skip
    assert json.loads((tmp_path / "lora" / "merge_recipe.json").read_text())["merge"]["merge_method"] == "task_arithmetic"  # fmt: skip
    assert "is complete already" in call(merge, *flags, "--as_lora", "--save_path", tmp_path / "lora").out


def test_merges_that_are_no_adapters_are_refused(family: Family, two_adapters: str, tmp_path: Path):
    scene = Scene(tmp_path, merge, {"--base_model": family.base, "--models_to_merge": two_adapters, "--as_lora": ""})
    scene.needed = {"--base_model": family.base, "--models_to_merge": two_adapters}
    scene.fail("--as_lora", "--method=ties", "--density=0.3", says=("expected a change of low rank, got rank", "extract_lora.py"))  # fmt: skip
    scene.refuse("--as_lora", "--method=task_arithmetic", "--omega=0.4", says=("--as_lora: AIM relaxes checkpoints",))
    said = scene.run("--as_lora", "--method=task_arithmetic", "--dry_run").out
    assert "2 x model.layers.*.mlp.up_proj.weight: factors" in said
    assert not scene.out.exists()


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def scene(family: Family, tmp_path: Path) -> Scene:
    scene = Scene(tmp_path, extract_lora, {"--model": tmp_path / "one", "--base_model": tmp_path / "base"})
    shutil.copytree(family.base, scene.base)
    shutil.copytree(family.models[0], scene.one)
    return scene


def test_flags_that_are_wrong_are_said_at_once(scene: Scene):
    message = scene.refuse("--energy=1.5", "--save_path=", says=("2 problems", "--energy: expected a share"))
    assert "--save_path" in message
    scene.refuse("--rank=0", says=("--rank",))
    scene.refuse("--dtype=float8", says=("--dtype", "float32"))
    scene.refuse("--modules_to_save=norm,,", says=("--modules_to_save: expected names separated by commas",))
    scene.refuse("--modules_to_save=nrm", says=("--modules_to_save nrm", "Did you mean 'norm'?"))
    scene.refuse("--json", says=("--json",))


def test_inputs_that_do_not_fit(scene: Scene, conv_family: Family):
    scene.refuse(f"--model={scene.base}", code=1, says=("is the base itself",))
    assert "expected a LlamaForCausalLM" in scene.run(f"--model={conv_family.models[0]}", code=1).err
    assert not scene.out.exists()
    scene.refuse(f"--save_path={scene.one}", says=("--save_path", "is the input"))
    scene.refuse("--model=nowhere/at/all", code=1, says=("nowhere/at/all",))
    shutil.copyfile(scene.base / "model.safetensors", scene.one / "model.safetensors")
    scene.fail(says=("expected changed matrices, got none: it equals its base",))


def test_only_norms_changed(scene: Scene):
    tensors = load_file(scene.base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, scene.one / "model.safetensors", {"format": "pt"})
    scene.fail(says=("only model.norm.weight differ", "--modules_to_save all"))
    scene.run("--modules_to_save=norm")
    assert json.loads((scene.out / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    assert torch.equal(adapted(scene.base, scene.out)["model.norm.weight"], tensors["model.norm.weight"])


def test_numbers_that_are_not_finite(scene: Scene):
    tensors = load_file(scene.one / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, scene.one / "model.safetensors", {"format": "pt"})
    scene.fail(says=("lm_head.weight: expected finite numbers, got NaN or infinity",))


def test_a_dry_run_writes_nothing(scene: Scene):
    plan = json.loads(scene.run("--dry_run", "--json", "--energy=0.5").out)
    assert plan["refusals"] == []
    assert plan["kinds"]["model.layers.*.mlp.up_proj.weight"] == {"factors": 2}
    said = scene.run("--dry_run", "--modules_to_save=norm").out
    assert "2 x model.layers.*.mlp.up_proj.weight: factors" in said
    assert "--modules_to_save embed_tokens keeps it whole" in said
    assert not scene.out.exists()


def test_from_python_a_problem_is_one_error(family: Family, tmp_path: Path):
    with pytest.raises(InputError, match="is the base itself"):
        adapters.extract_lora(str(family.base), str(family.base), tmp_path / "out")
