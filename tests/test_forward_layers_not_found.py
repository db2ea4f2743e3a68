"""A model whose layers nobody can find: it is run with what does not fit waiting on disk, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData, TokenBlocks
from checkpoints.model import open_model
from forward.layers import find_layers
from forward.skeleton import build_skeleton
from tests.aim_runs import random_tokens
from tests.pico import VOCABULARY, copy_tokenizer, write_checkpoint

CODE = f'''
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class LooseConfig(PretrainedConfig):
    model_type = "loose"

class LooseModel(PreTrainedModel):
    """Layers with names of their own, in no list."""
    config_class = LooseConfig
    _no_split_modules = []

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding({VOCABULARY}, 32)
        self.wide = nn.Linear(32, 64, bias=False)
        self.narrow = nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(32, bias=False)
        self.head = nn.Linear(32, {VOCABULARY}, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, use_cache=False, **keywords):
        x = self.table(input_ids)
        x = x + self.narrow(self.wide(x).relu())
        return CausalLMOutput(logits=self.head(self.norm(x)))
'''


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of that model, with its code beside it."""
    modules = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    torch.manual_seed(0)
    shapes = {"table": (VOCABULARY, 32), "wide": (64, 32), "narrow": (32, 64), "norm": (32,), "head": (VOCABULARY, 32)}
    where = tmp_path / "loose"
    write_checkpoint(where, {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()})
    (where / "loose.py").write_text(CODE)
    auto_map = {"AutoConfig": "loose.LooseConfig", "AutoModelForCausalLM": "loose.LooseModel"}
    config = {"model_type": "loose", "architectures": ["LooseModel"], "auto_map": auto_map, "vocab_size": VOCABULARY}
    (where / "config.json").write_text(json.dumps(config))
    copy_tokenizer(where)
    return where


def test_it_is_run_with_weights_on_disk_and_a_message(folder: Path) -> None:
    base = open_model(str(folder), trust_remote_code=True)
    assert find_layers(build_skeleton(base, torch.float32)) == []
    tokens = random_tokens(blocks=3, block_size=16)
    notes: list[str] = []

    def run(**options: Any) -> Any:
        blocks = TokenBlocks(tokens, len(tokens), 0, 0, 0)
        data = CalibrationData("given blocks", block_size=tokens.shape[1])
        return calibrate(base, data, CalibrationOptions(dtype="float32", **options), blocks=blocks, note=notes.append)

    whole = run(mode="whole", tolerance=0)
    assert notes == []
    for options in ({"mode": "layerwise"}, {"max_memory": 20_000}):  # some weights fit, not all: 92 kB in float32
        notes.clear()
        found = run(tolerance=0, **options)
        assert [note for note in notes if "layers" in note] == [
            "its layers cannot be told apart: weights that do not fit into memory wait on disk, which is slow"
        ]
        assert found.statistics.keys() == whole.statistics.keys() == {f"{name}.weight" for name in ("wide", "narrow", "norm", "head")}  # fmt: skip
        for name, one in whole.statistics.items():
            torch.testing.assert_close(found.statistics[name].mean_abs, one.mean_abs)
            assert torch.equal(found.statistics[name].tokens, one.tokens)
