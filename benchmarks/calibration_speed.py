"""What calibration costs: watching a forward pass, against the bare body of the model; and a pass layer by layer, against the whole model.

    python benchmarks/calibration_speed.py
    python benchmarks/calibration_speed.py --device cuda --blocks 32 --dtypes bfloat16
    python benchmarks/calibration_speed.py --hidden 2048 --layers 22 --intermediate 5632 --heads 32 --kv_heads 4 --json
    python benchmarks/calibration_speed.py --model FOLDER
    python benchmarks/calibration_speed.py --modes whole,layerwise --model FOLDER --blocks 8
    python benchmarks/calibration_speed.py --modes layerwise --make FOLDER --hidden 4096 --layers 32 --intermediate 14336 \\
        --heads 32 --kv_heads 8 --vocabulary 128256 --blocks 8

Without --modes: a random Llama, of 220 million parameters where no sizes are given, or the checkpoint of --model, blocks of 512
tokens, one or --batch_size at a time. The bare body, without the output head whose logits nobody needs, and the watched model alternate, so that
what else the machine does falls on both; the table has the median of each.

With --modes: whole calibrations of a checkpoint (--make writes a random one into files) on random tokens, each in a process of
its own, with its peak of anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.watcher import Target, Watcher
from benchmarks.measured import run as run_command
from benchmarks.synthetic import Shape, add_shape_flags, make_checkpoints, read_shape
from streaming.twins import compile_all

DEFAULT = Shape(hidden=1024, layers=12, intermediate=2816, heads=16, kv_heads=16)
CALIBRATE = """
import json, sys, time
import torch
from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import TokenBlocks, CalibrationData
from checkpoints.model import open_model
from checkpoints.process import own_process

model, mode, blocks, block_size, dtype, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6]
base = open_model(model)
generator = torch.Generator().manual_seed(0)
rows = base.weights.tensors[base.architecture.stored_name(base.architecture.input_embedding)].shape[0]
tokens = torch.randint(rows, (blocks, block_size), generator=generator)
started = []
options = CalibrationOptions(device=torch.device(device), dtype=dtype, batch_size=int(sys.argv[7]), tolerance=0, mode=mode)
with own_process():  # as the commands have it
    found = calibrate(base, CalibrationData("random tokens", block_size=block_size), options, blocks=TokenBlocks(tokens, blocks, 0, 0, 0),
                      progress=lambda count: started.append(time.perf_counter()) if not count else None)
seconds = time.perf_counter() - started[0]
gpu = torch.cuda.max_memory_allocated() if device != "cpu" else 0
print(json.dumps({"tokens_s": tokens.numel() / seconds, "tensors": len(found.statistics), "silent": len(found.silent), "gpu_peak_bytes": gpu}))
"""


@dataclass(frozen=True)
class Comparison:
    """One dtype of the forward pass: tokens a second, and bare over watched by the clock and in processor time (medians)."""

    dtype: str
    bare_tokens_s: float
    watched_tokens_s: float
    share: float
    cpu_share: float


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device, folder: str | None) -> Any:
    """A random Llama, or the model of a folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in shape.config().items() if key != "torch_dtype"})
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def targets_of(model: Any) -> dict[str, Target]:
    """What AIM relaxes: every weight of a linear layer or a norm, but for a head that is tied to the embedding."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    return {
        name: Target(name, tuple(range(one.ndim)), tuple(one.shape))
        for name, one in model.named_parameters()
        if id(one) not in tables and name.endswith("weight")
    }


def run(
    call: Callable[[torch.Tensor], object], tokens: torch.Tensor, watching: AbstractContextManager[None], batch: int = 1
) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of forward passes over the blocks `[blocks, block size]`, `batch` at a time."""
    with watching, torch.no_grad():
        _wait(tokens.device)
        started, started_cpu = time.perf_counter(), time.process_time()
        for block in tokens.split(batch):
            call(block)
        _wait(tokens.device)
        return time.perf_counter() - started, time.process_time() - started_cpu


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    shape: Shape,
    dtype: str,
    device: torch.device,
    blocks: int,
    block_size: int,
    repeats: int,
    folder: str | None = None,
    batch: int = 1,
) -> Comparison:
    """Run bare and watched in turn."""
    model = make_model(shape, getattr(torch, dtype), device, folder)
    tokens = torch.randint(model.config.vocab_size, (blocks, block_size), device=device)
    watcher = Watcher(model, targets_of(model), head=model.get_output_embeddings().weight, compiled=True)

    def watch(block: torch.Tensor) -> None:
        watcher.block = (block.shape[0], block.shape[1])
        model(input_ids=block, use_cache=False)

    def body(block: torch.Tensor) -> None:
        model.base_model(input_ids=block, use_cache=False)

    run(watch, tokens[:1], watcher.watching())  # what is slow only once
    bare, watched = [], []
    for _ in range(repeats):
        bare.append(run(body, tokens, nullcontext(), batch))
        watched.append(run(watch, tokens, watcher.watching(), batch))
    rates = [tokens.numel() / statistics.median(seconds for seconds, _ in runs) for runs in (bare, watched)]
    ratios = [
        statistics.median(one[kind] / other[kind] for one, other in zip(bare, watched, strict=True)) for kind in (0, 1)
    ]
    return Comparison(dtype, *rates, *ratios)


def as_row(one: Comparison) -> str:
    """A row of the table."""
    rates = [f"{rate:,.0f} tokens/s" for rate in (one.bare_tokens_s, one.watched_tokens_s)]
    return f"| {one.dtype} | {' | '.join(rates)} | {100 * one.share:.1f} % | {100 * one.cpu_share:.1f} % |"


def calibrated(
    folder: Path,
    mode: str,
    dtype: str,
    blocks: int,
    block_size: int,
    *,
    device: str = "cpu",
    batch: int = 1,
    seconds_at_most: float | None = None,
) -> dict[str, Any]:
    """One calibration in a process of its own: tokens a second once it runs, seconds in all, peak anonymous memory.

    Raises: CommandFailed: it fails, or takes too long.
    """
    sizes = [str(blocks), str(block_size), dtype, device, str(batch)]
    command = [sys.executable, "-c", CALIBRATE, str(folder), mode, *sizes]
    done = run_command(
        command, env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}, seconds_at_most=seconds_at_most
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    peak = None if done.peak_bytes is None else done.peak_bytes / 1e9
    return {
        "mode": mode,
        "dtype": dtype,
        **found,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_gb": peak,
    }


def compare_modes(arguments: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """Calibrations of one checkpoint, in turn."""
    if arguments.make:
        folder = make_checkpoints(Path(arguments.make), shape, 0, say=lambda line: print(line, file=sys.stderr)).base
    else:
        folder = Path(arguments.model)
    found = []
    for dtype in arguments.dtypes.split(","):
        for _ in range(arguments.repeats):
            for mode in arguments.modes.split(","):
                found.append(
                    calibrated(
                        folder,
                        mode,
                        dtype,
                        arguments.blocks,
                        arguments.block_size,
                        device=arguments.device,
                        batch=arguments.batch_size,
                    )
                )
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the forward pass (float32,bfloat16)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a run (8)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens of a block (512)")
    parser.add_argument("--batch_size", type=int, default=1, help="blocks of a forward pass (1)")
    parser.add_argument("--threads", type=int, help="of torch (default: one per core)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--model", help="a checkpoint in place of a random model")
    parser.add_argument("--modes", help="whole, layerwise or both with a comma: calibrations of --model or --make")
    parser.add_argument("--make", help="a folder for a random checkpoint of the given sizes")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    add_shape_flags(parser)
    arguments = parser.parse_args()
    try:
        shape = read_shape(arguments, DEFAULT)
    except ValueError as error:
        parser.error(str(error))
    if arguments.modes and not (arguments.model or arguments.make):
        parser.error("--modes: wants a checkpoint, --model or --make")
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{where}, {os.cpu_count()} cores, torch {torch.__version__}, Python {sys.version.split()[0]}"
    if arguments.modes:
        rows = compare_modes(arguments, shape)
        if arguments.json:
            print(json.dumps(rows))
            return
        print(
            f"{machine}\n| mode | dtype | tokens/s | seconds in all | processor seconds | peak GB |\n"
            + "|---" * 6
            + "|"
        )
        for row in rows:
            print(f"| {row['mode']} | {row['dtype']} | {row['tokens_s']:,.0f} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_gb']:.2f} |")  # fmt: skip
        return
    sizes = (arguments.blocks, arguments.block_size, arguments.repeats)
    found = (
        measure(shape, dtype, device, *sizes, arguments.model, arguments.batch_size)
        for dtype in arguments.dtypes.split(",")
    )
    compile_all()
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    print(machine)
    print("| dtype | bare body | watched | bare / watched seconds | processor seconds |\n" + "|---" * 5 + "|")
    for one in found:
        print(as_row(one), flush=True)


if __name__ == "__main__":
    main()
