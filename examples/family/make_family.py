"""Build the family: tokenizer, base model, and its three fine-tunes, as Hugging Face checkpoints. Goes on where it was stopped.

    PYTHONPATH=. python -m examples.family.make_family
    PYTHONPATH=. python -m examples.family.make_family --out /tmp/family --jobs 3

Nothing in the repository is overwritten: copy --out to examples/family/models to commit it. Training states lie in --work until the next build; the checkpoints and their digests in --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

STAGES = ("pretrain", "middle", "third", "base", "code", "math", "instruct")
"""The base model is trained in four phases, of which the first three leave float32 weights in the work folder."""
PHASES = STAGES[:3]
FINE_TUNES = STAGES[4:]
HERE = Path(__file__).resolve().parent
MAX_RELATIVE_NORM = 0.1
"""Larger task vectors were found not to merge at all."""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Without these, glibc gives memory back and asks for it again at each step, which slows training several times."""


def build_stage(stage: str, out: Path, work: Path) -> None:
    """Train one stage and save it, in this process."""
    import torch

    from examples.family.tokenizer import train_tokenizer
    from examples.family.train import RECIPES, relative_norm, train

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    first = work / "tokenizer"
    target = (work if stage in PHASES else out) / stage
    if (target / "model.safetensors").exists():
        return
    if stage == "pretrain" and not first.exists():
        train_tokenizer(first)
    start = {"pretrain": first, "middle": work / "pretrain", "third": work / "middle", "base": work / "third"}.get(
        stage, out / "base"
    )
    recipe = RECIPES[stage]
    model = train(stage, start, work, recipe, max(0, STAGES.index(stage) - 4))
    report = {"stage": stage, "parameters": sum(p.numel() for p in model.parameters()), "recipe": asdict(recipe)}
    if stage in FINE_TUNES:
        from transformers import LlamaForCausalLM

        norm = relative_norm(LlamaForCausalLM.from_pretrained(start), model)
        assert norm < MAX_RELATIVE_NORM, f"{stage}: the task vector's relative norm is {norm:.3f}, too large to merge"
        report["relative_norm"] = round(norm, 5)
    partial = target.with_name(f"{stage}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(first, partial)
    model.to(torch.float32 if stage in PHASES else torch.bfloat16).save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.replace(target)
    log = [json.dumps(report), *(work / f"{stage}.jsonl").read_text().splitlines()]
    (out / f"{stage}_log.jsonl").write_text("\n".join(log) + "\n")


def run_stages(stages: Sequence[str], out: Path, work: Path, jobs: int) -> None:
    """Train stages in processes of their own, at most `jobs` at a time. Raises RuntimeError where one fails."""
    command = [sys.executable, "-m", "examples.family.make_family", "--out", str(out), "--work", str(work), "--stage"]
    waiting, running = list(stages), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(subprocess.Popen([*command, waiting.pop(0)], env=os.environ | ALLOCATOR))
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    raise RuntimeError("training failed. The message is above; run again to go on.")
    finally:
        for process in running:
            process.kill()


def write_digests(out: Path) -> None:
    """Write SHA256SUMS: every file of the four checkpoints and the logs."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}" for path in files]
    (out / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def compare_with_committed(out: Path) -> str:
    """Which weights are, to the bit, those in the repository."""
    same = {}
    for model in ("base", *FINE_TUNES):
        name = Path(model) / "model.safetensors"
        committed = HERE / "models" / name
        same[model] = committed.exists() and (out / name).read_bytes() == committed.read_bytes()
    return ", ".join(f"{model}: {'the committed bytes' if equal else 'other bytes'}" for model, equal in same.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the tiny model family.")
    parser.add_argument("--out", type=Path, default=Path("build/family/models"), help="folder of the checkpoints")
    parser.add_argument("--work", type=Path, default=Path("build/family/work"), help="folder of the training states")
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunes trained at a time, one core each")
    parser.add_argument("--stage", choices=STAGES, help="train only this one, in this process")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        build_stage(arguments.stage, arguments.out, arguments.work)
        return 0
    run_stages([*PHASES, "base"], arguments.out, arguments.work, 1)
    run_stages(FINE_TUNES, arguments.out, arguments.work, arguments.jobs)
    write_digests(arguments.out)
    print(f"{arguments.out}: {compare_with_committed(arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
