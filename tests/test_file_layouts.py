"""One model in files of several layouts: packed experts, a decoder inside another model, layers that nothing computes with.

The same merge comes out of each, in the base's layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from tests.aim_runs import write_texts
from tests.pico import copy_tokenizer, make_family
from tests.scene import Ended, call, names

Tensors = dict[str, Tensor]


def load(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[Tensors], Mapping[str, Tensor]]) -> Path:
    tensors = {name: one.contiguous().clone() for name, one in change(load(folder)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def attempt(base: Path, models: list[Path], out: Path, *flags: object, code: int = 0) -> Ended:
    """Add 0.6 of the task vectors of the models to the base."""
    weighted = names([f"{model}:0.6" for model in models])
    inputs = ("--base_model", base, "--models_to_merge", weighted)
    return call(merge, "--method=task_arithmetic", *inputs, "--save_path", out, *flags, code=code)


def add(base: Path, models: list[Path], out: Path, *flags: object) -> Tensors:
    """The same; the tensors."""
    attempt(base, models, out, *flags)
    return load(out)


def relax(base: Path, merged: Path, out: Path, *flags: object) -> Tensors:
    call(performAIM, "--pretrained_model_name", base, "--merged_model", merged, "--save_path", out, "--omega=0.2",
        "--calibration_data", write_texts(out.parent), "--n_samples=8", "--block_size=64", *flags)  # fmt: skip
    return load(out)


def notes(out: Path) -> str:
    return "\n".join(json.loads((out / "merge_recipe.json").read_bytes())["notes"])


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------------- experts


def packed(source: Path, target: Path) -> Path:
    """A model of experts saved as transformers holds it: one tensor for all experts of a layer."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, save_original_format=False)
    copy_tokenizer(target)
    assert any(name.endswith("experts.gate_up_proj") for name in load(target))
    return target


def by_expert(folder: Path, names: tuple[str, str, str], tensors: Tensors) -> Tensors:
    """What a packed file's tensors are, expert by expert: `w` [experts, 2 * out, in] is gate above up."""
    gate, up, down = names
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        for expert in range(len(tensor)) if leaf in ("gate_up_proj", "down_proj") else ():
            if leaf == "down_proj":
                found[f"{stem}.{expert}.{down}.weight"] = tensor[expert]
            else:
                half = tensor.shape[1] // 2
                found[f"{stem}.{expert}.{gate}.weight"] = tensor[expert, :half]
                found[f"{stem}.{expert}.{up}.weight"] = tensor[expert, half:]
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
    return found


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes, each in both layouts: `base`, `base_packed` and so on."""
    folder = tmp_path_factory.mktemp("experts")
    family = make_family(folder / "family", "mixtral")
    for name, source in zip(("base", "one", "two"), (family.base, *family.models), strict=False):
        shutil.copytree(source, folder / name)
        packed(folder / name, folder / f"{name}_packed")
    return folder


def test_experts_packed_and_by_themselves_give_one_merge(experts: Path, tmp_path: Path):
    plain = add(experts / "base", [experts / "one", experts / "two"], tmp_path / "plain")
    mixed = add(experts / "base", [experts / "one", experts / "two_packed"], tmp_path / "mixed")
    assert same(mixed, plain)
    said = notes(tmp_path / "mixed")
    assert f"{experts / 'two_packed'}: 24 tensors are stored in other pieces there, such as " in said
    whole = add(experts / "base_packed", [experts / "one", experts / "two_packed"], tmp_path / "packed")
    assert whole.keys() == load(experts / "base_packed").keys()
    assert same(by_expert(tmp_path, ("w1", "w3", "w2"), renamed(whole)), renamed(plain))
    assert not same(plain, load(experts / "base"))


def renamed(tensors: Tensors) -> Tensors:
    """Mixtral's files say `block_sparse_moe` where its class says `mlp`."""
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}


def test_ties_looks_at_whole_tensors_of_packed_experts_as_they_are(experts: Path, tmp_path: Path):
    """A method that measures reads the pieces in the same order, whatever they are cut from."""
    flags = ("--method=ties", "--density=0.4", "--base_model", experts / "base")
    for out, models in (("plain", ("one", "two")), ("mixed", ("one_packed", "two_packed"))):
        names = ",".join(str(experts / name) for name in models)
        call(merge, *flags, "--models_to_merge", names, "--save_path", tmp_path / out)
    assert same(load(tmp_path / "mixed"), load(tmp_path / "plain"))


def test_relaxing_with_experts_in_another_layout(experts: Path, tmp_path: Path):
    """Each expert by its own statistics, whichever of base and merge is packed; in the merge's layout."""
    plain = relax(experts / "base", experts / "one", tmp_path / "plain")
    assert same(relax(experts / "base_packed", experts / "one", tmp_path / "packed_base"), plain)
    whole = relax(experts / "base", experts / "one_packed", tmp_path / "packed_merge")
    assert same(by_expert(tmp_path, ("w1", "w3", "w2"), renamed(whole)), renamed(plain))
    expert = next(name for name in plain if ".experts.1." in name)
    assert not torch.equal(plain[expert], load(experts / "one")[expert])
    # What is said of it counts the output's tensors, not the base's.
    told = json.loads((tmp_path / "packed_merge" / "merge_recipe.json").read_bytes())["aim"]
    assert told["relaxed"] + sum(one["count"] for one in told["kept"]) == len(whole)


# ------------------------------------------------------------------------- a decoder inside a model that reads images

TEXT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
# A model that reads images; the config of its text part and of its vision part.
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", TEXT | {"model_type": "gemma3_text"}, VISION | {"model_type": "siglip_vision_model"}),
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", TEXT | {"model_type": "mistral", "tie_word_embeddings": False},
                                         VISION | {"model_type": "pixtral", "head_dim": 8}),
}  # fmt: skip


def make_seeing(folder: Path, name: str, *, tie: bool | None = None) -> tuple[Path, list[Path]]:
    """A base that reads images, and two fine-tunes of its decoder, saved as plain language models."""
    import transformers

    text_class, text, vision = SEEING[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    tied = text.get("tie_word_embeddings", True) if tie is None else tie
    config = model_class.config_class(
        text_config=text, vision_config=vision, image_token_index=299, tie_word_embeddings=tied
    )
    if name.startswith("Gemma3"):
        config.mm_tokens_per_image = 4
    base = model_class(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    copy_tokenizer(folder / "base")
    models = []
    for target in ("one", "two"):
        part = getattr(transformers, text_class)(config.text_config).to(torch.bfloat16)
        part.model.load_state_dict(base.model.language_model.state_dict())
        part.lm_head.load_state_dict(base.lm_head.state_dict())
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        part.tie_weights()
        part.save_pretrained(folder / target)
        copy_tokenizer(folder / target)
        models.append(folder / target)
    return folder / "base", models


@pytest.mark.parametrize("only", [(), ("--only", "language_model|lm_head")])
@pytest.mark.parametrize("name", SEEING)
def test_text_models_into_a_base_that_reads_images(tmp_path: Path, name: str, only: tuple[str, ...]):
    """The decoder and its head, tied or not, are merged; the rest is the base's, byte for byte."""
    import transformers

    base, models = make_seeing(tmp_path, name)
    merged = add(base, models, tmp_path / "out", *only)
    said = notes(tmp_path / "out")
    assert "tensors have other names there, such as " in said
    start, *others = (load(folder) for folder in (base, *models))
    assert merged.keys() == start.keys()
    seen = 0
    for key, tensor in start.items():
        own = key.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
        if own not in others[0]:
            assert torch.equal(merged[key], tensor), key
            continue
        seen += 1
        expected = tensor.float() + 0.6 * sum(other[own].float() - tensor.float() for other in others)
        assert torch.allclose(merged[key].float(), expected, rtol=2**-7, atol=2**-12), key
    assert seen == len(others[0])
    if not only:
        assert f"{models[0]}: not stored there, and kept as in {base}: multi_modal_projector." in said
    _, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report


def test_a_model_that_reads_images_into_a_text_base_is_refused_with_a_reason(tmp_path: Path):
    seeing, models = make_seeing(tmp_path, "Gemma3ForConditionalGeneration")
    said = attempt(models[0], [seeing], tmp_path / "out", code=1).err
    assert (
        f"{seeing}: expected a Gemma3ForCausalLM as {models[0]}, got a Gemma3ForConditionalGeneration, of which other parts have "
        "no place there: multi_modal_projector." in said
    )
    assert f"Make it the base, and {models[0]} one of the models." in said
    assert "Give models fine-tuned from this base" not in said
    assert "problems:" not in said
    argv = ["--pretrained_model_name", seeing, "--merged_model", models[0], "--save_path", tmp_path / "aim"]
    said = call(performAIM, *argv, "--calibration_data", write_texts(tmp_path), code=1).err
    assert "of which other parts have no place there: multi_modal_projector." in said
    assert "Name the base that the merged model was made from." in said
    assert "Make it the base" not in said


def test_a_head_beside_one_that_the_base_ties(tmp_path: Path):
    """Refused with what to do, under whatever name; and then merged with the embedding that the base has for a head."""
    base, models = make_seeing(tmp_path, "Mistral3ForConditionalGeneration", tie=True)
    said = attempt(base, models, tmp_path / "out", code=1).err
    tied_to = "expected equal to model.embed_tokens.weight, to which"
    assert f"{models[0]}: lm_head.weight: {tied_to} {base} ties it, got other numbers." in said
    assert "Use --tie_word_embeddings no, which gives the output a head of its own." in said
    merged = add(base, models, tmp_path / "out", "--tie_word_embeddings", "no")
    start = load(base)["language_model.model.embed_tokens.weight"].float()
    expected = start + 0.6 * sum(load(model)["lm_head.weight"].float() - start for model in models)
    assert torch.allclose(merged["language_model.lm_head.weight"].float(), expected, rtol=2**-7, atol=2**-12)


def test_a_decoder_that_lacks_a_layer_is_no_text_part(tmp_path: Path):
    base, models = make_seeing(tmp_path, "Mistral3ForConditionalGeneration")
    rewrite(models[0], lambda tensors: {name: one for name, one in tensors.items() if "layers.1." not in name})
    assert "language_model.model.layers.1." in attempt(base, models, tmp_path / "out", code=1).err


# --------------------------------------------------------------------------- tensors that nothing is computed with

DRAFT = {"mtp.fc.weight": torch.arange(32.0).view(4, 8), "mtp.norm.weight": torch.ones(4)}
LATE = {"model.layers.2.eh_proj.weight": torch.arange(32.0).view(4, 8), "model.layers.2.enorm.weight": torch.ones(4)}


def make_drafting(folder: Path) -> tuple[Path, list[Path]]:
    """A family whose class skips `mtp.*` on loading; without such tensors."""
    import transformers

    config = transformers.Qwen3_5TextConfig(
        **{**TEXT, "head_dim": 16}, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("base", "one", "two"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)
        copy_tokenizer(folder / name)
    return folder / "base", [folder / "one", folder / "two"]


@pytest.mark.parametrize("unused", [DRAFT, LATE], ids=["ignored on loading", "behind the last layer"])
def test_tensors_that_nothing_is_computed_with_come_from_the_base(tmp_path: Path, unused: Tensors):
    """In the base's files alone they are kept; in a model's alone they are left out; one note each, in both commands."""
    base, models = make_drafting(tmp_path)
    plain = add(base, models, tmp_path / "plain")
    with_draft = rewrite(shutil.copytree(base, tmp_path / "with_draft"), lambda tensors: tensors | unused)
    kept = add(with_draft, models, tmp_path / "kept")
    assert same({name: one for name, one in kept.items() if name not in unused}, plain)
    assert all(torch.equal(kept[name], one) for name, one in unused.items())
    said = notes(tmp_path / "kept")
    assert said.count(f"{models[0]}: not stored there, and kept as in {with_draft}: ") == 1
    call(merge, "--verify", tmp_path / "kept")
    drafting = rewrite(shutil.copytree(models[0], tmp_path / "drafting"), lambda tensors: tensors | unused)
    assert same(add(base, [drafting, models[1]], tmp_path / "left_out"), plain)
    said = notes(tmp_path / "left_out")
    assert said.count(f"{drafting}: left out, as the model computes nothing with them: ") == 1
    relaxed = relax(base, tmp_path / "kept", tmp_path / "aim")
    assert all(torch.equal(relaxed[name], one) for name, one in unused.items())
    assert same(relax(with_draft, tmp_path / "plain", tmp_path / "aim2"), {k: relaxed[k] for k in plain})


def test_a_tensor_of_nowhere_is_refused_as_before(tmp_path: Path):
    base, models = make_drafting(tmp_path)
    rewrite(models[0], lambda tensors: tensors | {"adapter.weight": torch.ones(4, 8)})
    assert (
        f"{models[0]}: adapter.weight: expected no such tensor, as {base} has none"
        in attempt(base, models, tmp_path / "out", code=1).err
    )


def test_another_family_is_called_so_first(tmp_path: Path):
    base = make_family(tmp_path / "llama", "llama", n_models=1).base
    other = make_family(tmp_path / "qwen2", "qwen3", n_models=1).base
    lines = attempt(base, [other], tmp_path / "out", code=1).err.splitlines()
    assert lines[0].endswith(" problems:")
    assert lines[1] == (
        f"- {other}: expected a LlamaForCausalLM as {base}, got a Qwen3ForCausalLM. Give models fine-tuned from this base."
    )
    assert len(lines) <= 12
