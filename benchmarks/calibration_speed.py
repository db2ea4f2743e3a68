"""What watching costs: tokens a second of a bare forward pass and of one whose activations are watched.

    python benchmarks/calibration_speed.py
    python benchmarks/calibration_speed.py --device cuda --blocks 32 --dtypes bfloat16

A random Llama of 220 million parameters, blocks of 512 tokens, one block at a time. Bare and watched runs alternate, so
that what else the machine does falls on both; the table has the median of each. Where other programs want the same cores,
set OMP_WAIT_POLICY=passive or --threads 1: threads that wait by spinning make many small steps cost what few do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.activations import Target, Watcher

BLOCK = 512
VOCABULARY = 32000


def make_model(dtype: torch.dtype, device: torch.device) -> Any:
    """A random Llama: 12 layers of 1024 channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 2816, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def targets_of(model: Any) -> dict[str, Target]:
    """What AIM relaxes: every weight of a linear layer or a norm."""
    return {
        f"{name}.weight": Target(name, "weight", module.weight.shape[-1])
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and not isinstance(module, torch.nn.Embedding)
    }


def run(model: Any, tokens: torch.Tensor, watching: AbstractContextManager[None]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of a forward pass over each of the blocks `[blocks, BLOCK]`."""
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


def measure(dtype: torch.dtype, device: torch.device, blocks: int, repeats: int) -> str:
    """One row of the table."""
    model = make_model(dtype, device)
    tokens = torch.randint(VOCABULARY, (blocks, BLOCK), device=device)
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
    cells = [str(dtype).removeprefix("torch."), *(f"{rate:,.0f} tokens/s" for rate in rates)]
    return "| " + " | ".join([*cells, *(f"{100 * ratio:.1f} %" for ratio in ratios)]) + " |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the forward pass (float32,bfloat16)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a run (8)")
    parser.add_argument("--threads", type=int, help="of torch (default: one per core)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, {os.cpu_count()} cores, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print("| dtype | bare | watched | bare / watched seconds | processor seconds |\n" + "|---" * 5 + "|")
    for name in arguments.dtypes.split(","):
        print(measure(getattr(torch, name), device, arguments.blocks, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
