"""Models of strange classes: one whose layers nobody can find runs with weights on disk, and says so; one whose layers are called
in another order for each text is refused layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData, TokenBlocks
from checkpoints.errors import InputError
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

    def __init__(self, listed=0, **keywords):
        super().__init__(**keywords)
        self.listed = listed

class LooseModel(PreTrainedModel):
    """Layers with names of their own, in no list, unless the config says so; then the text decides which are used."""
    config_class = LooseConfig
    _no_split_modules = []

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding({VOCABULARY}, 32)
        self.wide = nn.Linear(32, 64, bias=False)
        self.narrow = nn.Linear(64, 32, bias=False)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3 * config.listed))
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
        for index, layer in enumerate(self.layers):
            if index % 2 or input_ids[0, 0] % 2:
                x = x + layer(x)
        return CausalLMOutput(logits=self.head(self.norm(x)))
'''


@pytest.fixture
def folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkpoint of that model, with its code beside it."""
    modules = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "table": (VOCABULARY, 32),
        "wide": (64, 32),
        "narrow": (32, 64),
        "norm": (32,),
        "head": (VOCABULARY, 32),
    }
    if listed := int(getattr(request, "param", 0)):
        shapes |= {f"layers.{index}": (32, 32) for index in range(3 * listed)}
    where = tmp_path / "loose"
    write_checkpoint(where, {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()})
    (where / "loose.py").write_text(CODE)
    auto_map = {"AutoConfig": "loose.LooseConfig", "AutoModelForCausalLM": "loose.LooseModel"}
    config = {"model_type": "loose", "architectures": ["LooseModel"], "auto_map": auto_map, "vocab_size": VOCABULARY, "listed": listed}  # fmt: skip
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


@pytest.mark.parametrize("folder", [2], indirect=True)
def test_layers_that_are_called_in_another_order_for_each_text(folder: Path) -> None:
    base = open_model(str(folder), trust_remote_code=True)
    assert len(find_layers(build_skeleton(base, torch.float32))) == 6
    tokens = random_tokens(blocks=2, block_size=16)
    tokens[:, 0] = torch.tensor([10, 11])
    data, blocks = CalibrationData("given blocks", block_size=16), TokenBlocks(tokens, 2, 0, 0, 0)
    with pytest.raises(InputError, match=r"loose: expected its layers to be called in the same order for every text, .* Use .*whole"):  # fmt: skip
        calibrate(base, data, CalibrationOptions(dtype="float32", batch_size=1, mode="layerwise"), blocks=blocks)
    assert calibrate(base, data, CalibrationOptions(dtype="float32", mode="whole"), blocks=blocks).statistics


def test_any_error_of_a_class_is_one_message_that_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> Any:
        raise ZeroDivisionError("division by zero\nin a constructor")

    monkeypatch.setattr("aim.passes.build_skeleton", fail)
    base = open_model(str(folder), trust_remote_code=True)
    tokens = random_tokens(blocks=3, block_size=16)
    data, blocks = CalibrationData("given blocks", block_size=16), TokenBlocks(tokens, 3, 0, 0, 0)
    with pytest.raises(InputError) as error:
        calibrate(base, data, CalibrationOptions(dtype="float32", mode="layerwise"), blocks=blocks)
    assert str(error.value) == (
        f"{folder}: a LooseModel cannot be run on plain text: ZeroDivisionError: division by zero. Merge without AIM, or use "
        "statistics that were taken elsewhere."
    )
