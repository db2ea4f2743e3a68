"""`--weights loss`: LM-Cocktail's weights from each model's loss on examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
from merging.loss_weights import softmax_of_losses

MODELS = Path(__file__).resolve().parent.parent / "examples/family/models"
ROWS = [{"text": "Q: 3 + 4 = 7"}, {"text": "the sum of two numbers"}]


def test_by_hand() -> None:
    assert softmax_of_losses([1.0, 2.0]) == pytest.approx([0.549834, 0.450166], abs=1e-6)


def test_the_numbers_go_into_the_recipe(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    names = [str(MODELS / name) for name in ("math", "code")]
    command = ["--method", "linear", "--base_model", str(MODELS / "base"), "--models_to_merge", ",".join(names)]
    command += ["--weights", "loss", "--model_data", str(examples), "--save_path", str(tmp_path / "out"), "--quiet"]
    assert merge.main(command) == 0
    losses = []
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        own = []
        for row in ROWS:
            ids = torch.tensor([tokenizer.encode(row["text"])])
            with torch.no_grad():
                own.append(float(model(ids, labels=ids).loss))
        losses.append(sum(own) / len(own))
    found = json.loads((tmp_path / "out/merge_recipe.json").read_text())["models"]
    weights = [model["parameters"]["weight"] for model in found]
    assert weights == pytest.approx(softmax_of_losses(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "linear"], "--weights loss: expected one file of examples"),
        (["--method", "linear", "--model_data", "x.jsonl"], "no such file"),
        (["--method", "passthrough", "--model_data", "x.jsonl"], "--weights loss: passthrough has no weights"),
    ],
)
def test_what_is_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ",".join(str(MODELS / name) for name in ("math", "code"))
    command = [*flags, "--base_model", str(MODELS / "base"), "--models_to_merge", models, "--weights", "loss"]
    assert merge.main([*command, "--save_path", str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err
