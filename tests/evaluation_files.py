"""What the tests of evaluation share: a pico model that can be asked, files of responses, the command in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import evaluate_model
from tests.pico import VOCABULARY, copy_tokenizer

DATA = Path(__file__).parent / "data" / "benchmarks"
REFERENCE = {"humaneval": "canonical_solution", "mbpp": "code", "gsm8k": "answer", "math": "solution"}


def rows_of(name: str) -> list[dict[str, Any]]:
    """The sample rows of a benchmark, as they are in its file."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().split("\n") if line]


def make_model(
    folder: Path, *, generation_config: Mapping[str, Any] | None = None, seed: int = 0, **config: Any
) -> Path:
    """Save a random float32 Llama of two layers whose texts are varied and mostly end by themselves within some 100 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(settings | config)), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.weight[2] *= 2.5
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(dict(generation_config)))
    return folder


def write_responses(path: Path, responses: Iterable[tuple[str, int, str]]) -> Path:
    """A file of given responses: (benchmark, index, text)."""
    lines = [json.dumps({"benchmark": name, "index": index, "response": text}) for name, index, text in responses]
    path.write_text("\n".join(lines) + "\n")
    return path


def references(*names: str) -> list[tuple[str, int, str]]:
    """The published solutions of the sample rows as responses."""
    return [(name, index, row[REFERENCE[name]]) for name in names for index, row in enumerate(rows_of(name))]


def score(
    tmp_path: Path, responses: Iterable[tuple[str, int, str]], *flags: str, data_dir: Path = DATA
) -> dict[str, Any]:
    """Grade responses through the command; its results."""
    number = len(list(tmp_path.glob("scored*.json")))
    file = write_responses(tmp_path / f"given{number}.jsonl", responses)
    save_path = tmp_path / f"scored{number}.json"
    arguments = [
        "--stage",
        "score",
        "--responses",
        str(file),
        "--data_dir",
        str(data_dir),
        "--save_path",
        str(save_path),
    ]
    assert evaluate_model.main([*arguments, *flags]) == 0
    return json.loads(save_path.read_text())


def samples(save_path: Path) -> list[dict[str, Any]]:
    """The graded samples beside a results file."""
    text = save_path.with_name(save_path.stem + ".samples.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]
