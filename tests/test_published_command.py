"""README's first commands, word for word, on stand-ins of the models that they name.

The stand-ins are small; what their config.json says, how their weights are stored and which token they add is as on the hub: a
base saved by transformers 4.37 and three fine-tunes saved by versions between 4.29 and 4.33.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import performAIM
from tests.aim_runs import write_texts
from tests.fake_hub import FakeHub
from tests.token_models import write_json, write_sentence_piece

README = (Path(__file__).parent.parent / "README.md").read_text()
BASE = "unsloth/llama-2-13b"
INSTRUCT = "WizardLMTeam/WizardLM-13B-V1.2"
MATH = "vanillaOVO/WizardMath-13B-V1.0"
CODE = "layoric/llama-2-13b-code-alpaca"

WIDTH, LAYERS, ROWS = 32, 2, 60
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": WIDTH,
    "initializer_range": 0.02, "intermediate_size": 48, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
# What else each one's config.json says, in the words of the version that wrote it.
CONFIGS: dict[str, dict[str, Any]] = {
    BASE: {
        "_name_or_path": "unsloth/llama-2-13b", "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096,
        "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "unsloth_version": "2024.9", "vocab_size": ROWS,
    },
    INSTRUCT: {
        "_name_or_path": "/trained_models/13Bv2_497_2048_default_shuffle", "max_position_embeddings": 4096, "pad_token_id": 0,
        "torch_dtype": "float16", "transformers_version": "4.29.2", "vocab_size": ROWS + 1,
    },
    MATH: {
        "_name_or_path": "/trained_models/gsm8k-math_13b", "max_position_embeddings": 2048, "max_sequence_length": 4096, "pad_token_id": 0,
        "torch_dtype": "float16", "transformers_version": "4.29.2", "vocab_size": ROWS + 1,
    },
    CODE: {
        "_name_or_path": "NousResearch/Llama-2-13b-hf", "max_position_embeddings": 4096, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rope_scaling": None, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "vocab_size": ROWS,
    },
}  # fmt: skip
ADDED = {INSTRUCT: ["[PAD]"], MATH: ["[PAD]"]}


def command(start: str) -> list[str]:
    """The words of a command in README behind its program, from how it begins."""
    found = re.search(re.escape(start) + r"(?:.*\\\n)*.*", README)
    assert found is not None
    return shlex.split(found[0].replace("\\\n", " "))[2:]


def make_tensors(seed: int, rows: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors: random, or a fine-tune of `start`."""
    torch.manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{one}_proj.weight": (WIDTH, WIDTH) for one in "qkvo"}
        shapes |= {f"{name}.mlp.{one}_proj.weight": (48, WIDTH) for one in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (WIDTH, 48)
        shapes |= {f"{name}.{one}_layernorm.weight": (WIDTH,) for one in ("input", "post_attention")}
    shapes["model.norm.weight"] = (WIDTH,)
    made = {}
    for name, shape in shapes.items():
        values = 0.02 * torch.randn(shape) if start else 0.2 * torch.randn(shape)
        if name in start:
            values[: len(start[name])] += start[name].float()
        made[name] = values
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    folders = {name: tmp_path / "hub" / name for name in CONFIGS}
    start: dict[str, Tensor] = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        folder = folders[name]
        folder.mkdir(parents=True)
        write_sentence_piece(folder, ADDED.get(name, []))
        write_json(folder / "config.json", SHAPE | config)
        write_json(
            folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
        )
        tensors = make_tensors(seed, config["vocab_size"], start)
        if name == BASE:
            start = {key: tensor.bfloat16() for key, tensor in tensors.items()}
            save_file(start, folder / "model.safetensors", {"format": "pt"})
            continue
        # As transformers 4.29 wrote it: pickles in shards, with the rotary buffers that loading recomputes.
        halves = {key: tensor.half() for key, tensor in tensors.items()}
        rotary = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)}
        files = {"pytorch_model-00001-of-00002.bin": halves, "pytorch_model-00002-of-00002.bin": rotary}
        for file, content in files.items():
            torch.save(content, folder / file)
        index = {key: file for file, content in files.items() for key in content}
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    shutil.copy(folders[MATH] / "tokenizer.model", folders[CODE] / "tokenizer.model")
    made = FakeHub(folders)
    made.attach(monkeypatch, tmp_path / "cache")
    return made


def test_the_first_command_of_the_readme(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    argv = command(f"python merge.py --method dare_ties --base_model {BASE}")
    assert set(",".join(argv).split(",")) >= CONFIGS.keys()
    with hub:
        assert merge.main(argv) == 0, capsys.readouterr().err
        said = capsys.readouterr().err
        assert [line for line in said.splitlines() if line.startswith("warning")] == []
        assert f"note: {MATH}: config.json has max_position_embeddings 2048 (4096 in {BASE})" in said
        assert f"note: the output's tokenizer is that of {BASE} and 1 added token: '[PAD]'." in said
        out = tmp_path / argv[argv.index("--save_path") + 1]
        _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(report.values())
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("[PAD]") == ROWS
        assert load_file(out / "model.safetensors")["lm_head.weight"].shape == (ROWS + 1, WIDTH)
        assert merge.main(["--verify", str(out)]) == 0
        assert json.loads((out / "merge_recipe.json").read_text())["inputs"][0]["revision"]
        # And the command that relaxes it, on a text of our own.
        argv = command("python performAIM.py --merged_model ./DARE_TIES")
        texts = ["--calibration_data", str(write_texts(tmp_path)), "--n_samples=4", "--block_size=64"]
        assert performAIM.main([*argv, *texts]) == 0, capsys.readouterr().err
        assert merge.main(["--verify", argv[argv.index("--save_path") + 1]]) == 0
