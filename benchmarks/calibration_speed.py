"""What watching costs: tokens a second of a bare forward pass and of one whose activations are watched.

    python benchmarks/calibration_speed.py
    python benchmarks/calibration_speed.py --device cuda --blocks 32 --dtypes bfloat16
    python benchmarks/calibration_speed.py --hidden 2048 --layers 22 --intermediate 5632 --heads 32 --kv_heads 4 --json

A random Llama, of 220 million parameters where no sizes are given, blocks of 512 tokens, one block at a time. Bare and
watched runs alternate, so that what else the machine does falls on both; the table has the median of each. Where other
programs want the same cores, set OMP_WAIT_POLICY=passive or --threads 1: threads that wait by spinning make many small
steps cost what few do not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.activations import Target, Watcher
from benchmarks.synthetic import Shape, add_shape_flags, read_shape

DEFAULT = Shape(hidden=1024, layers=12, intermediate=2816, heads=16, kv_heads=16)


@dataclass(frozen=True)
class Comparison:
    """One dtype of the forward pass: tokens a second, and bare over watched by the clock and in processor time (medians)."""

    dtype: str
    bare_tokens_s: float
    watched_tokens_s: float
    share: float
    cpu_share: float


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in shape.config().items() if key != "torch_dtype"})
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def targets_of(model: Any) -> dict[str, Target]:
    """What AIM relaxes: every weight of a linear layer or a norm."""
    return {
        f"{name}.weight": Target(name, "weight", module.weight.shape[-1])
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and not isinstance(module, torch.nn.Embedding)
    }


def run(model: Any, tokens: torch.Tensor, watching: AbstractContextManager[None]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of a forward pass over each of the blocks `[blocks, block size]`."""
    with watching, torch.no_grad():
        _wait(tokens.device)
        started, started_cpu = time.perf_counter(), time.process_time()
        for block in tokens.split(1):
            model(input_ids=block, use_cache=False)
        _wait(tokens.device)
        return time.perf_counter() - started, time.process_time() - started_cpu


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shape: Shape, dtype: str, device: torch.device, blocks: int, block_size: int, repeats: int) -> Comparison:
    """Run bare and watched in turn."""
    model = make_model(shape, getattr(torch, dtype), device)
    tokens = torch.randint(shape.vocabulary, (blocks, block_size), device=device)
    watcher = Watcher(model, targets_of(model))
    run(model, tokens[:1], watcher.watching())  # what is slow only once
    bare, watched = [], []
    for _ in range(repeats):
        bare.append(run(model, tokens, nullcontext()))
        watched.append(run(model, tokens, watcher.watching()))
    rates = [tokens.numel() / statistics.median(seconds for seconds, _ in runs) for runs in (bare, watched)]
    ratios = [
        statistics.median(one[kind] / other[kind] for one, other in zip(bare, watched, strict=True)) for kind in (0, 1)
    ]
    return Comparison(dtype, *rates, *ratios)


def as_row(one: Comparison) -> str:
    """A row of the table."""
    rates = [f"{rate:,.0f} tokens/s" for rate in (one.bare_tokens_s, one.watched_tokens_s)]
    return f"| {one.dtype} | {' | '.join(rates)} | {100 * one.share:.1f} % | {100 * one.cpu_share:.1f} % |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the forward pass (float32,bfloat16)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a run (8)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens of a block (512)")
    parser.add_argument("--threads", type=int, help="of torch (default: one per core)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    add_shape_flags(parser)
    arguments = parser.parse_args()
    try:
        shape = read_shape(arguments, DEFAULT)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = (arguments.blocks, arguments.block_size, arguments.repeats)
    found = (measure(shape, dtype, device, *sizes) for dtype in arguments.dtypes.split(","))
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, {os.cpu_count()} cores, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print("| dtype | bare | watched | bare / watched seconds | processor seconds |\n" + "|---" * 5 + "|")
    for one in found:
        print(as_row(one), flush=True)


if __name__ == "__main__":
    main()
