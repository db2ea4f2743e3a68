"""checkpoints/architecture.py against transformers itself: pico models are saved, described, loaded and compared."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import architecture, conversions, meta_model, module_kinds
from checkpoints.architecture import Architecture, Placement, describe
from checkpoints.conversions import Group, place_group, source_dim
from checkpoints.errors import InputError
from checkpoints.meta_model import build_meta_model
from checkpoints.module_kinds import classify

DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRANSPOSED = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ALIBI = {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {**DECODER, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
SEQ2SEQ = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
HEADS = {**DECODER, "head_dim": 8}
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """A pico model, and what is expected of its checkpoint."""

    model_class: str
    config: dict[str, Any]
    embedding: str = EMBED
    head: str | None = LM_HEAD
    tied: tuple[str, ...] = ()
    """What shares the embedding's values."""
    prefix: str = ""
    """Taken off the names on disk, as old checkpoints on the hub have them."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", DECODER),
    "llama, tied": Family("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, tied=(LM_HEAD,)),
    "mistral": Family("MistralForCausalLM", DECODER),
    "qwen2": Family("Qwen2ForCausalLM", DECODER),
    "qwen3": Family("Qwen3ForCausalLM", {**HEADS, "tie_word_embeddings": True}, tied=(LM_HEAD,)),
    "gemma2": Family("Gemma2ForCausalLM", HEADS, tied=(LM_HEAD,)),
    "gemma3": Family("Gemma3ForCausalLM", HEADS, tied=(LM_HEAD,)),
    "phi3": Family("Phi3ForCausalLM", DECODER),
    "gpt2": Family("GPT2LMHeadModel", TRANSPOSED, "transformer.wte.weight", tied=(LM_HEAD,)),
    "gpt2, no prefix": Family("GPT2LMHeadModel", TRANSPOSED, "wte.weight", tied=(LM_HEAD,), prefix="transformer."),
    "gpt_neox": Family("GPTNeoXForCausalLM", DECODER, "gpt_neox.embed_in.weight", "embed_out.weight"),
    "olmo2": Family("Olmo2ForCausalLM", DECODER),
    "falcon": Family("FalconForCausalLM", DECODER, "transformer.word_embeddings.weight", tied=(LM_HEAD,)),
    "bloom": Family("BloomForCausalLM", ALIBI, "transformer.word_embeddings.weight", tied=(LM_HEAD,)),
    "mixtral": Family("MixtralForCausalLM", EXPERTS),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", EXPERTS),
    "gpt_oss": Family("GptOssForCausalLM", HEADS | EXPERTS | {"head_dim": 8}),
    "granitemoe": Family("GraniteMoeForCausalLM", EXPERTS),
    "bert": Family(
        "BertForMaskedLM",
        DECODER,
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        ("cls.predictions.decoder.weight",),
    ),
    "bert, no head": Family("BertModel", DECODER, "embeddings.word_embeddings.weight", None),
    "t5": Family(
        "T5ForConditionalGeneration",
        SEQ2SEQ,
        "shared.weight",
        tied=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", LM_HEAD),
    ),
}


def save(folder: Path, family: Family) -> dict[str, torch.Tensor]:
    """Save a pico model with random values in every parameter, and return its tensors as they are on disk."""
    model_class = getattr(transformers, family.model_class)
    model = model_class(model_class.config_class(**family.config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    model.save_pretrained(folder)
    tensors = {name.removeprefix(family.prefix): tensor for name, tensor in weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Every family's folder and tensors. Read only."""
    found = {}
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp("pico")
        found[name] = (folder, save(folder, family))
    return found


@pytest.fixture(scope="module")
def described(checkpoints: dict[str, tuple[Path, dict[str, torch.Tensor]]]) -> dict[str, Architecture]:
    return {name: describe(folder, shapes(tensors)) for name, (folder, tensors) in checkpoints.items()}


@pytest.fixture
def pico(tmp_path: Path) -> Path:
    """A small checkpoint to spoil."""
    save(tmp_path, FAMILIES["llama"])
    return tmp_path


# Every family: nothing left over, and every tensor where transformers puts it.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_placed(name: str, checkpoints: Any, described: dict[str, Architecture]) -> None:
    found = described[name]
    assert (found.unplaced, found.missing, found.mismatched, found.buffers, found.ignored) == ((), (), {}, (), ())
    assert found.placements.keys() == checkpoints[name][1].keys()
    assert found.model_class == FAMILIES[name].model_class


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_head_and_ties(name: str, described: dict[str, Architecture]) -> None:
    found, family = described[name], FAMILIES[name]
    assert (found.input_embedding, found.output_head) == (family.embedding, family.head)
    assert found.placements[family.embedding].kind == "embedding"
    assert {key for key, value in found.tied.items() if value == family.embedding} == set(family.tied)
    if family.head is not None:
        assert found.stored_name(family.head) in found.placements


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_where_transformers_loads_them(
    name: str, checkpoints: Any, described: dict[str, Architecture]
) -> None:
    """Load the checkpoint; each tensor on disk is its parameter, or its expert's part of it, input along input_dim."""
    folder, tensors = checkpoints[name]
    model = getattr(transformers, FAMILIES[name].model_class).from_pretrained(folder)
    for tensor_name, placement in described[name].placements.items():
        on_disk, loaded = tensors[tensor_name], model.get_parameter(placement.parameter)
        module = model.get_submodule(placement.module)
        if placement.kind in ("linear", "experts"):
            # [..., out, in] on both sides.
            loaded = loaded.mT if getattr(module, "is_transposed", False) else loaded
            on_disk = on_disk.movedim(placement.input_dim, -1)
        if placement.expert is None:
            assert torch.equal(on_disk, loaded), tensor_name
        else:
            rows = loaded[placement.expert]  # gate above up, or one matrix
            assert any(torch.equal(on_disk, part) for part in (rows, *rows.chunk(2))), tensor_name


@pytest.mark.parametrize("name", FAMILIES)
def test_kind_agrees_with_the_module(name: str, checkpoints: Any, described: dict[str, Architecture]) -> None:
    """Every nn.Linear, nn.Embedding, Conv1D and norm of the model is said to be what it is."""
    model = build_meta_model(checkpoints[name][0])
    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", transformers.pytorch_utils.Conv1D: "conv1d"}
    for placement in described[name].placements.values():
        module = model.get_submodule(placement.module)
        expected = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)
        expected = "norm" if "norm" in type(module).__name__.lower() else expected
        if placement.parameter.endswith("bias"):
            assert placement.kind == "bias"
        elif expected is not None:
            assert placement.kind == expected, placement


# Single tensors, by hand.

LAYER = "model.layers.0."
EXACT = [
    ("llama", LAYER + "self_attn.q_proj.weight", "linear", 1),
    ("llama", LAYER + "input_layernorm.weight", "norm", 0),
    ("llama", LM_HEAD, "linear", 1),
    ("llama", EMBED, "embedding", None),
    ("qwen2", LAYER + "self_attn.q_proj.bias", "bias", None),
    ("qwen3", LAYER + "self_attn.q_norm.weight", "norm", 0),
    ("phi3", LAYER + "self_attn.qkv_proj.weight", "linear", 1),
    ("phi3", LAYER + "mlp.gate_up_proj.weight", "linear", 1),
    ("gpt2", "transformer.h.0.attn.c_attn.weight", "conv1d", 0),
    ("gpt2", "transformer.h.0.ln_1.bias", "bias", None),
    ("gpt2", "transformer.wpe.weight", "embedding", None),
    ("gpt_neox", "embed_out.weight", "linear", 1),
    ("mixtral", LAYER + "block_sparse_moe.gate.weight", "linear", 1),
    ("gpt_oss", LAYER + "mlp.router.weight", "linear", 1),
    ("gpt_oss", LAYER + "self_attn.sinks", "other", None),
    ("gpt_oss", LAYER + "mlp.experts.gate_up_proj_bias", "bias", None),
    ("bert", "bert.embeddings.LayerNorm.weight", "norm", 0),
    ("bert", "bert.embeddings.token_type_embeddings.weight", "embedding", None),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding", None),
    ("t5", "encoder.block.0.layer.0.layer_norm.weight", "norm", 0),
]


@pytest.mark.parametrize(("name", "tensor", "kind", "input_dim"), EXACT)
def test_kind_and_input_dim(
    name: str, tensor: str, kind: str, input_dim: int | None, described: dict[str, Architecture]
) -> None:
    placement = described[name].placements[tensor]
    assert (placement.kind, placement.input_dim) == (kind, input_dim)
    assert (placement.expert, placement.others) == (None, ())


def test_experts_stored_one_by_one(described: dict[str, Architecture]) -> None:
    placements, moe = described["mixtral"].placements, LAYER + "mlp.experts"
    for expert in range(4):
        disk = f"{LAYER}block_sparse_moe.experts.{expert}."
        gate_up = Placement(moe + ".gate_up_proj", "experts", 1, expert)
        assert placements[disk + "w1.weight"] == placements[disk + "w3.weight"] == gate_up
        assert placements[disk + "w2.weight"] == Placement(moe + ".down_proj", "experts", 1, expert)
    assert gate_up.module == moe


def test_the_tenth_expert_comes_after_the_second(tmp_path: Path) -> None:
    config = {**EXPERTS, "num_experts": 12, "num_local_experts": 12, "intermediate_size": 16}
    tensors = save(tmp_path, Family("OlmoeForCausalLM", config))
    placements = describe(tmp_path, shapes(tensors)).placements
    experts = {name: placement for name, placement in placements.items() if ".experts." in name}
    assert len(experts) == 2 * 12 * 3
    for name, placement in experts.items():
        assert placement.expert == int(re.findall(r"experts\.(\d+)\.", name)[0])
        assert placement.input_dim == 1  # gate and up together are square here, so sizes would not tell


@pytest.mark.parametrize(
    ("name", "tensor", "input_dim"),
    [
        ("gpt_oss", LAYER + "mlp.experts.gate_up_proj", 1),  # [experts, in, out]
        ("gpt_oss", LAYER + "mlp.experts.down_proj", 1),
        ("granitemoe", LAYER + "block_sparse_moe.input_linear.weight", 2),  # [experts, out, in], renamed
        ("granitemoe", LAYER + "block_sparse_moe.output_linear.weight", 2),
    ],
)
def test_experts_stored_fused(name: str, tensor: str, input_dim: int, described: dict[str, Architecture]) -> None:
    placement = described[name].placements[tensor]
    assert (placement.kind, placement.input_dim, placement.expert) == ("experts", input_dim, None)


@pytest.mark.parametrize("intermediate_size", [16, 24])
@pytest.mark.parametrize("is_transposed_on_disk", [False, True])
def test_conversion_that_transposes_what_does_not_fit(intermediate_size: int, is_transposed_on_disk: bool) -> None:
    """The input dimension on disk follows transformers' decision; a square matrix it takes for fitting."""
    from transformers.core_model_loading import Transpose, WeightConverter

    shape = (4, 32, intermediate_size)  # of the parameter, [experts, out, in]
    on_disk = (4, intermediate_size, 32) if is_transposed_on_disk else shape
    group = Group("down_proj", WeightConverter("down", "down_proj", [Transpose(1, 2, check_dims=True)]))
    group.sources.append(("down", "down"))
    assert source_dim(group, {"down": on_disk}, shape, 2, None) == (1 if is_transposed_on_disk else 2)
    square = (4, 32, 32)
    assert source_dim(group, {"down": square}, square, 2, None) == 2


def test_tensors_joined_along_the_input_have_no_input_dim() -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter

    group = Group("ab.weight", WeightConverter(["a", "b"], "ab", [Concatenate(dim=1)]))
    group.sources += [("a.weight", "a"), ("b.weight", "b")]
    assert source_dim(group, {"a.weight": (6, 4), "b.weight": (6, 8)}, (6, 12), 1, None) is None
    assert source_dim(group, {"a.weight": (6, 4), "b.weight": (6, 8)}, (6, 12), 0, None) == 0


def test_a_tensor_cut_into_several_parameters(tmp_path: Path) -> None:
    """A projection that is fused on disk, and three modules with one input in the model."""
    tensors = save(tmp_path, Family("NomicBertModel", DECODER))
    found = describe(tmp_path, shapes(tensors))
    assert (found.unplaced, found.missing, found.mismatched) == ((), (), {})
    fused = "encoder.layers.0.attn.Wqkv.weight"
    query, key, value = (f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert found.placements[fused] == Placement(query, "linear", 1, None, (key, value))
    model = transformers.NomicBertModel.from_pretrained(tmp_path)
    assert torch.equal(tensors[fused], torch.cat([model.get_parameter(name) for name in (query, key, value)]))


class FusedExperts(nn.Module):
    """Two experts, marked as transformers marks them."""

    is_transposed = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, 2 * width, 8, device="meta"))


def test_one_list_of_experts_that_becomes_two_parameters() -> None:
    """Two of four experts each, and those of one half are of another width: 4 and 6."""
    from transformers.core_model_loading import ErnieFuseAndSplitTextVisionExperts, WeightConverter

    sources, targets = ["e.*.gate", "e.*.up"], ["text.gate_up", "image.gate_up"]
    group = Group(targets[0], WeightConverter(sources, targets, [ErnieFuseAndSplitTextVisionExperts()]))
    sizes = {f"e.{i}.{leaf}": (4 if i < 2 else 6, 8) for i in range(4) for leaf in ("gate", "up")}
    group.sources += [(name, f"e.*.{name.split('.')[-1]}") for name in sizes]
    model = nn.ModuleDict({"text": FusedExperts(4), "image": FusedExperts(6)})
    model.config = None  # type: ignore[assignment]
    placements, complaint = place_group(group, model, shapes(model.state_dict()), sizes)
    assert complaint == ""
    assert placements == {name: Placement(targets[int(name[2]) // 2], "experts", 1, int(name[2]) % 2) for name in sizes}


def test_a_checkpoint_with_the_names_of_the_model(tmp_path: Path) -> None:
    """Here transformers' renaming would take a name that is right already for an old one."""
    config = transformers.LagunaConfig(**{**EXPERTS, "architectures": ["LagunaForCausalLM"]})
    config.save_pretrained(tmp_path)
    sizes = shapes(build_meta_model(tmp_path).state_dict())
    found = describe(tmp_path, sizes)
    assert any("shared_experts" in name for name in sizes)
    assert (found.unplaced, found.missing) == ((), ())


# Modules, by hand.


class Multiplies(nn.Module):
    """A router: a weight of its own, and what it does with its input first and last."""

    def __init__(self, before: Any = None, after: Any = None, child: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 8))
        self.before, self.after, self.child = before, after, child

    def forward(self, hidden: torch.Tensor) -> Any:
        hidden = self.before(hidden) if self.before else hidden
        logits = nn.functional.linear(hidden.reshape(-1, 8).float(), self.weight.float())
        return self.after(logits) if self.after else logits


class Holds(nn.Module):
    """A parameter, and no way to run."""

    def __init__(self, leaf: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(leaf, nn.Parameter(torch.empty(shape)))


@pytest.mark.parametrize(
    ("module", "leaf", "expected"),
    [
        (nn.Linear(8, 4), "weight", ("linear", 1)),
        (nn.Linear(8, 4), "bias", ("bias", None)),
        (nn.Embedding(8, 4), "weight", ("embedding", None)),
        (nn.LayerNorm(8), "weight", ("norm", 0)),
        (nn.LayerNorm(8), "bias", ("bias", None)),
        (nn.RMSNorm(8), "weight", ("norm", 0)),
        (nn.BatchNorm1d(8), "weight", ("other", None)),
        (nn.GroupNorm(2, 8), "weight", ("other", None)),
        (nn.PReLU(8), "weight", ("other", None)),
        (nn.Conv1d(8, 4, 3), "weight", ("convolution", None)),
        (Holds("weight", 8), "weight", ("norm", 0)),
        (Holds("scale", 8), "scale", ("other", None)),
        (Holds("weight", 4, 8), "weight", ("other", None)),
        (Holds("weight", 2, 4, 8), "weight", ("other", None)),
        (Multiplies(), "weight", ("linear", 1)),
        (Multiplies(after=lambda logits: logits.tolist()), "weight", ("linear", 1)),  # not on meta, but late enough
        (Multiplies(child=nn.ReLU()), "weight", ("linear", 1)),
        (Multiplies(before=lambda hidden: 2 * hidden), "weight", ("other", None)),  # its input is not the matrix's
    ],
    ids=str,
)
def test_what_a_module_is(module: nn.Module, leaf: str, expected: tuple[str, int | None]) -> None:
    assert classify(nn.ModuleDict({"module": module.to("meta")}), f"module.{leaf}") == expected


# What does not fit.


def test_leftovers_are_told_apart(pico: Path) -> None:
    sizes = shapes(weights(pico))
    sizes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.rotary_emb.inv_freq": (4,), "extra": (2, 2)}
    del sizes[LAYER + "mlp.up_proj.weight"]
    found = describe(pico, sizes)
    assert found.unplaced == ("extra",)
    assert found.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    assert found.missing == (LAYER + "mlp.up_proj.weight",)


def test_mask_of_old_checkpoints_is_ignored(checkpoints: Any) -> None:
    folder, tensors = checkpoints["gpt2, no prefix"]
    found = describe(folder, shapes(tensors) | {"h.0.attn.bias": (1, 1, 64, 64)})
    assert (found.ignored, found.unplaced) == (("h.0.attn.bias",), ())


def test_a_buffer_that_is_computed_is_ignored(checkpoints: Any) -> None:
    folder, tensors = checkpoints["gemma2"]
    found = describe(folder, shapes(tensors) | {"model.embed_tokens.embed_scale": ()})
    assert (found.ignored, found.unplaced) == (("model.embed_tokens.embed_scale",), ())


def test_a_buffer_that_is_loaded_is_neither_placed_nor_ignored(tmp_path: Path) -> None:
    config = {"vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    tensors = save(tmp_path, Family("BartForConditionalGeneration", config | heads))
    assert describe(tmp_path, shapes(tensors)).buffers == ("final_logits_bias",)


def test_another_vocabulary_than_the_config_says(pico: Path) -> None:
    found = describe(pico, shapes(weights(pico)) | {EMBED: (41, 32)})
    assert found.mismatched == {EMBED: f"{EMBED} is [40, 32] by config.json, and [41, 32] on disk"}
    assert found.placements[EMBED].kind == "embedding"


def test_experts_that_cannot_be_stacked(checkpoints: Any) -> None:
    folder, tensors = checkpoints["mixtral"]
    gate = LAYER + "block_sparse_moe.experts.1.w1.weight"
    found = describe(folder, shapes(tensors) | {gate: (47, 32)})
    assert len(found.mismatched) == 8  # gate and up of four experts
    assert found.placements[gate].kind == "other"
    sizes = shapes(tensors)
    del sizes[gate], sizes[gate.replace("w1", "w3")]
    parameter = LAYER + "mlp.experts.gate_up_proj"
    clause = f"{parameter} is [4, 96, 32] by config.json, and [3, 96, 32] on disk"
    assert set(describe(folder, sizes).mismatched.values()) == {clause}


def test_second_name_of_a_parameter_is_unplaced(checkpoints: Any) -> None:
    folder, tensors = checkpoints["gpt2"]
    found = describe(folder, shapes(tensors) | {"wte.weight": (40, 32)})
    assert (found.unplaced, found.input_embedding) == (("wte.weight",), "transformer.wte.weight")


# Ties.


def test_head_stored_beside_the_embedding_it_is_tied_to(checkpoints: Any) -> None:
    folder, tensors = checkpoints["llama, tied"]
    found = describe(folder, shapes(tensors) | {LM_HEAD: (40, 32)})
    assert found.tied == {LM_HEAD: EMBED}
    assert found.placements[LM_HEAD].kind == "linear"
    assert found.placements[EMBED].kind == "embedding"


def test_only_the_head_of_a_tie_is_stored(checkpoints: Any) -> None:
    folder, tensors = checkpoints["llama, tied"]
    sizes = shapes(tensors)
    sizes[LM_HEAD] = sizes.pop(EMBED)
    found = describe(folder, sizes)
    assert (found.tied, found.missing) == ({EMBED: LM_HEAD}, ())
    assert found.placements[LM_HEAD] == Placement(LM_HEAD, "embedding")
    assert (found.input_embedding, found.stored_name(EMBED)) == (EMBED, LM_HEAD)


def test_nothing_of_a_tie_is_stored(checkpoints: Any) -> None:
    folder, tensors = checkpoints["llama, tied"]
    sizes = shapes(tensors)
    del sizes[EMBED]
    assert describe(folder, sizes).missing == (LM_HEAD, EMBED)


def test_head_that_is_not_stored_has_the_name_on_disk(checkpoints: Any) -> None:
    folder, tensors = checkpoints["gpt_neox"]
    found = describe(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items() if "embed_out" not in name})
    assert (found.output_head, found.missing) == ("embed_out.weight", ("lm_head.weight",))


# Which class, and refusals.


@pytest.mark.parametrize("architectures", [None, [], ["SomethingElseForCausalLM"], ["T5ForConditionalGeneration"]])
def test_class_is_guessed_where_config_does_not_help(pico: Path, architectures: list[str] | None) -> None:
    edit_config(pico, architectures=architectures)
    assert type(build_meta_model(pico)).__name__ == "LlamaForCausalLM"


def test_base_class_where_there_is_no_language_model(tmp_path: Path) -> None:
    save(tmp_path, Family("CLIPTextModel", {**DECODER, "projection_dim": 8}))
    edit_config(tmp_path, architectures=None)
    assert type(build_meta_model(tmp_path)).__name__ == "CLIPTextModel"


def test_a_model_without_words_has_no_embedding(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    tensors = save(tmp_path, Family("CLIPVisionModel", {**sizes, "image_size": 16, "patch_size": 8}))
    found = describe(tmp_path, shapes(tensors))
    assert (found.input_embedding, found.output_head, found.tied, found.unplaced) == (None, None, {}, ())


def test_model_is_on_meta_and_settings_are_left_alone(pico: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.INFO)
    edit_config(pico, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    model = build_meta_model(pico)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert transformers.logging.get_verbosity() == logging.INFO
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_broken_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"^base: .*config\.json"):
        describe(tmp_path, {}, label="base")


@pytest.mark.parametrize("model_type", [None, "llamma", 7, ["llama"]])
def test_unknown_model_type_is_refused(pico: Path, model_type: Any) -> None:
    edit_config(pico, model_type=model_type)
    with pytest.raises(InputError, match=r"expected a model_type that transformers .* install a newer one\.$"):
        describe(pico, {})


def test_config_that_no_model_can_be_built_from_is_refused(pico: Path) -> None:
    edit_config(pico, hidden_size="wide")
    with pytest.raises(InputError, match=r"config\.json: expected what transformers .* can build a model from"):
        describe(pico, {})


REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("was_run").touch()
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_type"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_only_if_trusted(pico: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    modules = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    mark = modules / "was_run"
    (pico / "own.py").write_text(REMOTE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(pico, model_type="own_type", architectures=["OwnModel"], auto_map=auto_map)
    sizes = shapes(weights(pico))
    with pytest.raises(InputError, match=r"pass trust_remote_code to run its own code, if you trust it\.$"):
        describe(pico, sizes)
    assert not mark.exists()
    found = describe(pico, sizes, trust_remote_code=True)
    assert mark.exists()
    assert (found.model_class, found.unplaced, found.missing) == ("OwnModel", (), ())


def test_known_type_does_not_run_the_code_beside_it(pico: Path) -> None:
    (pico / "own.py").write_text("raise SystemExit('ran')")
    edit_config(pico, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    assert describe(pico, shapes(weights(pico))).model_class == "LlamaForCausalLM"


# The module itself.


def test_a_model_of_seven_billion_is_described_without_its_weights(tmp_path: Path) -> None:
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # the 7B is its default
    sizes = shapes(build_meta_model(tmp_path).state_dict())
    found = describe(tmp_path, sizes)
    assert (len(found.placements), found.unplaced) == (291, ())


def test_no_architecture_is_named() -> None:
    files = [Path(module.__file__) for module in (architecture, conversions, meta_model, module_kinds)]
    names = ("llama", "mistral", "qwen", "gemma", "phi", "gpt", "falcon", "bloom", "mixtral", "olmo", "deepseek")
    assert [(file.name, name) for file in files for name in names if name in file.read_text().lower()] == []


SCIKIT_LEARN = """
import importlib.util, sys
from pathlib import Path
from checkpoints.meta_model import build_meta_model
from checkpoints.process import own_process
if sys.argv[2] == "imported before":
    import sklearn
with own_process():
    build_meta_model(Path(sys.argv[1]))
print("sklearn" in sys.modules, importlib.util.find_spec("sklearn") is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "loaded"), [("untouched", False), ("imported before", True)])
def test_scikit_learn_is_not_imported_and_stays_importable(case, loaded):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", SCIKIT_LEARN, str(root / "tests/goldens/inputs/base"), case]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{loaded} True\n"
