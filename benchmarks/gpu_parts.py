"""What `benchmarks/gpu.py` measures, part by part; each part gives rows of plain numbers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration_speed import DEFAULT, calibrated
from benchmarks.floor import available_cores
from benchmarks.measured import CommandFailed, Run
from benchmarks.measured import run as run_command
from benchmarks.merge_speed import OFFLINE, read_end_line
from benchmarks.synthetic import Checkpoints, Shape, make_checkpoints, make_statistics, weight_files
from merging.methods import METHODS, get_method

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        middle, large: of the models that are merged and calibrated; the larger with two fine-tunes, the other with three.
        equal: of the models on which the card is compared with the CPU.
        blocks: of 512 tokens, of a calibration; limit: items of a benchmark.
    """

    middle: Shape
    large: Shape
    equal: Shape
    blocks: int
    limit: int


SIZES = Sizes(
    Shape(),
    Shape(hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32),
    Shape(hidden=256, layers=2, intermediate=704, heads=4, kv_heads=4, vocabulary=4096),
    64,
    64,
)
SMALL = Sizes(
    Shape(hidden=256, layers=4, intermediate=704, heads=4, kv_heads=2, vocabulary=4096),
    DEFAULT.scaled(0.1),
    Shape(hidden=64, layers=2, intermediate=128, heads=4, kv_heads=2, vocabulary=320),
    2,
    2,
)
MERGED = ("linear", "task_arithmetic", "ties", "dare_ties", "widen")
LARGE = ("task_arithmetic", "ties", "dare_ties")
BATCH = 8
"""Blocks of a forward pass of a calibration on the card; 1 on a CPU."""
BLOCK_SIZE = 512


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure.

    Attributes:
        folder: for models and merges.
        device: cuda or cpu.
        deadline: on the monotonic clock, after which nothing goes on.
    """

    folder: Path
    device: str
    deadline: float
    sizes: Sizes

    @property
    def left_s(self) -> float:
        """Seconds until the deadline. Raises CommandFailed: there are none."""
        left = self.deadline - time.monotonic()
        if left < 5:
            raise CommandFailed("the minutes are over")
        return left

    def models(self, shape: Shape, count: int) -> Checkpoints:
        """A base and fine-tunes of it, made where they are not there yet. Raises CommandFailed: no room, or no time."""
        made = Checkpoints(self.folder / "models" / shape.name, shape, count)
        needed, free = made.missing_bytes + 2 * shape.parameters, shutil.disk_usage(self.folder).free
        if needed > free:
            raise CommandFailed(f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")
        if self.left_s:
            make_checkpoints(self.folder / "models", shape, count, device=self.device, say=lambda line: None)
        for path in weight_files([made.base, *made.fine_tunes]):  # into the page cache
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
        return made

    def command(self, flags: Sequence[str], device: str) -> Row:
        """Run one of the commands on a device: its time, bytes, and memory of the machine and of the card."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        watched = [sys.executable, str(ROOT / "benchmarks/observed.py"), "gpu_memory", "0", *flags]
        given = ["--save_path", str(out), "--digest", "none", "--device", device]
        try:
            done = run_command([*watched, *given], env=OFFLINE, seconds_at_most=self.left_s)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        lines = done.stdout.splitlines()
        said = read_end_line(Run(done.seconds, done.cpu_seconds, done.peak_bytes, "\n".join(lines[:-1])))
        return {
            "device": device,
            "seconds": round(done.seconds, 2),
            **said,
            "peak_bytes": done.peak_bytes,
            **json.loads(lines[-1]),
        }


def tests(bench: Bench) -> Iterator[Row]:
    """The tests marked `gpu`, on the device."""
    if importlib.util.find_spec("pytest") is None:
        yield {"not_measured": "pytest is not installed"}
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_gpu.py",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        ]
        env = {"TEST_DEVICE": bench.device, "PYTHONPATH": str(ROOT)}
        done = run_command(command, env=env, accept=(0, 1), seconds_at_most=bench.left_s)
        suite = ElementTree.parse(report).getroot()[0]
        failed = [
            {"test": case.get("name"), "message": str(outcome.get("message"))[:300]}
            for case in suite.iter("testcase")
            for outcome in case
            if outcome.tag in ("failure", "error")
        ]
        counts = {key: int(suite.get(key) or 0) for key in ("tests", "failures", "errors", "skipped")}
        yield {**counts, "seconds": round(done.seconds, 1), "failed": failed}


def equality(bench: Bench) -> Iterator[Row]:
    """Merges of every method that needs no text on the device, against the same on the CPU, number by number."""
    from safetensors.torch import load_file

    from merging import RunOptions, make_recipe
    from merging import merge as merge_models
    from streaming.stream import StreamOptions

    made = bench.models(bench.sizes.equal, 3)
    for name in sorted(METHODS):
        method = get_method(name)
        if method.needs_data:
            continue
        count = min(3, method.max_models or 3)
        recipe = make_recipe(
            name, str(made.base), ",".join(map(str, made.fine_tunes[:count])), parameters=REQUIRED_VALUES.get(name, {})
        )
        merged = []
        for device in ("cpu", bench.device):
            out = bench.folder / "equal"
            shutil.rmtree(out, ignore_errors=True)
            merge_models(recipe, out, RunOptions(stream=StreamOptions(torch.device(device)), quiet=True))
            merged.append({key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()})
            shutil.rmtree(out)
        on_cpu, on_device = (torch.cat([tensors[key].view(-1) for key in sorted(tensors)]) for tensors in merged)
        steps = (on_cpu.view(torch.int16).int() - on_device.view(torch.int16).int()).abs()
        yield {
            "method": name,
            "numbers": steps.numel(),
            "differ": int((steps > 0).sum()),
            "by_more_than_one_step": int((steps > 1).sum()),
        }


REQUIRED_VALUES: dict[str, dict[str, Any]] = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.001}}
"""Of parameters that have no default."""


def _merge_flags(made: Checkpoints, method: str) -> list[str]:
    models = made.fine_tunes[: get_method(method).max_models or None]
    return [
        "merge.py",
        "--method",
        method,
        "--base_model",
        str(made.base),
        "--models_to_merge",
        ",".join(map(str, models)),
    ]


def _merges(bench: Bench, made: Checkpoints, methods: Sequence[str]) -> Iterator[Row]:
    size = {"parameters": made.shape.parameters}
    for method in methods:
        for device in dict.fromkeys((bench.device, "cpu")):
            yield {**size, "command": "merge.py", "method": method, **bench.command(_merge_flags(made, method), device)}
    statistics = made.folder / "statistics.safetensors"
    if not statistics.exists():
        make_statistics(made.base, made.texts, statistics)
    merged = ["--merged_model", str(made.fine_tunes[-1]), "--pretrained_model_name", str(made.base)]
    flags = ["performAIM.py", *merged, "--activations", str(statistics)]
    for device in dict.fromkeys((bench.device, "cpu")):
        yield {**size, "command": "performAIM.py", **bench.command(flags, device)}


def merge(bench: Bench) -> Iterator[Row]:
    """Merging and relaxing at 1.1 billion parameters, on the card and on the CPU."""
    yield from _merges(bench, bench.models(bench.sizes.middle, 3), MERGED)


def cores(bench: Bench) -> Iterator[Row]:
    """Merging on the CPU with 1, 2, 4, ... threads."""
    made = bench.models(bench.sizes.middle, 3)
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= available_cores()]
    for method in ("linear", "ties"):
        for count in counts:
            flags = [*_merge_flags(made, method), "--workers", str(count)]
            yield {"method": method, "workers": count, **bench.command(flags, "cpu")}


def calibration(bench: Bench) -> Iterator[Row]:
    """Calibration at 1.1 billion parameters, as a whole and layer by layer."""
    yield from _calibrations(bench, bench.models(bench.sizes.middle, 3))


def large(bench: Bench) -> Iterator[Row]:
    """The same merges and calibrations at 7 billion parameters."""
    made = bench.models(bench.sizes.large, 2)
    yield from _calibrations(bench, made)
    yield from _merges(bench, made, LARGE)


def _calibrations(bench: Bench, made: Checkpoints) -> Iterator[Row]:
    """Tokens a second of the bare body and of both modes, and the memory of the card beside that of one layer."""
    batch = BATCH if bench.device == "cuda" else 1
    size = {"parameters": made.shape.parameters, "device": bench.device, "batch_size": batch}
    yield {**size, "mode": "bare body", **_bare(bench, made.base, batch)}
    for mode in ("whole", "layerwise"):
        row = calibrated(
            made.base, mode, "bfloat16", bench.sizes.blocks, BLOCK_SIZE,
            device=bench.device, batch=batch, seconds_at_most=bench.left_s,
        )  # fmt: skip
        yield {**size, **{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}}


BARE = """
import json, sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, batch, blocks, block_size, device = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0
config = AutoConfig.from_pretrained(folder)
many, config.num_hidden_layers = config.num_hidden_layers, 1
table, config.vocab_size = config.vocab_size, 8
one = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
tokens = torch.randint(8, (batch, block_size), device=device)
with torch.no_grad():
    one.base_model(input_ids=tokens, use_cache=False)
layer_peak = peak()
del one
if device == "cuda":
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
tokens = torch.randint(table, (blocks, block_size), device=device)
def run():
    with torch.no_grad():
        for part in tokens.split(batch):
            model.base_model(input_ids=part, use_cache=False)
    wait()
run()
started = time.perf_counter(); run(); seconds = time.perf_counter() - started
print(json.dumps({"tokens_s": tokens.numel() / seconds, "gpu_peak_bytes": peak(), "one_layer_gpu_peak_bytes": layer_peak}))
"""


def _bare(bench: Bench, base: Path, batch: int) -> Row:
    """The body of the model alone; and the card's peak with a single layer and one batch."""
    given = [str(base), str(batch), str(bench.sizes.blocks), str(BLOCK_SIZE), bench.device]
    done = run_command([sys.executable, "-c", BARE, *given], env=OFFLINE, seconds_at_most=bench.left_s)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {**found, "tokens_s": round(found["tokens_s"], 1)}


def generation(bench: Bench) -> Iterator[Row]:
    """The tiny family's GSM8K items through each backend of evaluate_model.py."""
    family = ROOT / "examples" / "family"
    for backend in ("hf", "vllm"):
        if backend == "vllm" and importlib.util.find_spec("vllm") is None:
            yield {"backend": backend, "not_measured": "vllm is not installed"}
            continue
        if importlib.util.find_spec("lm_eval") is None:
            yield {"backend": backend, "not_measured": "lm_eval, which grades, is not installed"}
            continue
        out = bench.folder / f"{backend}.json"
        flags = [
            "--model",
            str(family / "models" / "math"),
            "--benchmarks",
            "gsm8k",
            "--data_dir",
            str(family / "data" / "test_0"),
        ]
        flags += [
            "--backend",
            backend,
            "--limit",
            str(bench.sizes.limit),
            "--math_max_tokens",
            "128",
            "--save_path",
            str(out),
        ]
        flags += ["--n_gpu", "1" if bench.device == "cuda" else "0"]
        done = run_command(
            [sys.executable, str(ROOT / "evaluate_model.py"), *flags], env=OFFLINE, seconds_at_most=bench.left_s
        )
        yield {"backend": backend, "items": bench.sizes.limit, "seconds": round(done.seconds, 1)}


def mergekit(bench: Bench) -> Iterator[Row]:
    """mergekit on the same files, on the card, where it is installed."""
    program = shutil.which("mergekit-yaml")
    if program is None:
        yield {"not_measured": "mergekit is not installed"}
        return
    made = bench.models(bench.sizes.middle, 3)
    for method in ("linear", "task_arithmetic", "ties", "dare_ties"):
        recipe: Row = {"merge_method": method, "base_model": str(made.base), "dtype": "bfloat16"}
        recipe["models"] = [
            {"model": str(path), "parameters": {"weight": 1.0, "density": 0.5}} for path in made.fine_tunes
        ]
        config, out = bench.folder / "recipe.yml", bench.folder / "out"
        config.write_text(json.dumps(recipe))
        command = [program, str(config), str(out), *(["--cuda"] if bench.device == "cuda" else [])]
        try:
            done = run_command(command, env=OFFLINE, seconds_at_most=bench.left_s)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        yield {"method": method, "seconds": round(done.seconds, 2), "peak_bytes": done.peak_bytes}
