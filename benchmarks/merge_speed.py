"""Time and memory of merge.py for each method, on random models of 220 million parameters made for it (1.8 GB in all).

    python benchmarks/merge_speed.py --folder /tmp/merge_speed

Each merge is a process of its own, as a user starts it. The models were just written or read, so that they lie in the
page cache: a slow disk adds to these times what it takes to read and write the bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "widen")
MODELS = ("math", "code", "instruct")
END_LINE = re.compile(r"read (?P<read>.+), wrote (?P<wrote>.+) in .+ s \((?P<rate>.+)/s\), peak memory (?P<peak>.+)")


def make_models(folder: Path) -> None:
    """Save a random base and three random fine-tunes of it, 12 Llama layers in bfloat16, unless they are there."""
    if all((folder / name / "model.safetensors").exists() for name in ("base", *MODELS)):
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=12, intermediate_size=2816, num_attention_heads=16, vocab_size=32000
    )
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(folder / "base")
    for name in MODELS:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(base[key] + 0.002 * torch.randn(parameter.shape, dtype=torch.bfloat16))
        model.save_pretrained(folder / name)


def measure(folder: Path, method: str, repeats: int) -> str:
    """Merge `repeats` times and give a row of a Markdown table: least time, least processor time, rate of the fastest."""
    out = folder / "merged"
    command = [sys.executable, str(ROOT / "merge.py"), "--method", method, "--base_model", str(folder / "base")]
    command += ["--models_to_merge", ",".join(str(folder / name) for name in MODELS), "--save_path", str(out)]
    runs = []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        started, cpu_before = time.monotonic(), _cpu_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append((time.monotonic() - started, _cpu_seconds() - cpu_before, done.stdout.splitlines()[-1]))
    shutil.rmtree(out)
    seconds, _, line = min(runs)
    cpu_seconds = min(run[1] for run in runs)
    found = END_LINE.search(line)
    assert found, f"the last line of merge.py is not what it was: {line}"
    cells = [method, found["read"], found["wrote"], f"{seconds:.1f} s", f"{cpu_seconds:.1f} s", f"{found['rate']}/s"]
    return f"| {' | '.join([*cells, found['peak']])} |"


def _cpu_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Make the models, merge them with every method, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the models (1.8 GB) and one merge at a time")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method, of which the fastest counts (3)")
    arguments = parser.parse_args()
    # In a process of its own: Linux hands the peak memory of a process down to the programs it starts.
    maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(arguments.folder,))
    maker.start()
    maker.join()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(
        "| method | reads | writes | time, with start-up | processor time | rate | peak memory |\n" + "|---" * 7 + "|"
    )
    for method in METHODS:
        print(measure(arguments.folder, method, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
