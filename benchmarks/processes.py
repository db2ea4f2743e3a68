"""Time and memory of one merge over several processes, against one process with as many threads and with one, on the same bytes.

    python benchmarks/processes.py --models /tmp/merge_speed/models/h2048-l22-i5632-h32-k4-v32000 --methods dare_ties,ties
    python benchmarks/processes.py --models /tmp/models --methods regmean --rounds 1 --json points.json

`--models` is a folder with `base` and `tuned1` to `tuned3`, as `benchmarks/merge_speed.py` makes it. Each run is a process of its own, or
torchrun with its own, as a user starts it. "Streaming" is what the command prints: from opening the output to its last flush. The weight
files of every run are compared by the digests that merge_recipe.json has of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measured
from benchmarks.floor import available_cores
from benchmarks.merge_speed import OFFLINE, read_end_line

ROOT = Path(__file__).resolve().parent.parent


def command(models: Path, method: str, out: Path, processes: int, threads: int, text: Path | None) -> list[str]:
    """How a user starts a merge of all models with so many processes of so many threads."""
    tuned = sorted(models.glob("tuned*"))
    flags = ["--method", method, "--base_model", str(models / "base"), "--models_to_merge", ",".join(map(str, tuned))]
    flags += ["--model_data", ",".join([str(text)] * len(tuned)), "--data_tokens", "512"] if text else []
    flags += ["--save_path", str(out), "--workers", str(threads), "--device", "cpu", "--report", "none"]
    run = [
        sys.executable,
        *(["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []),
    ]
    return [*run, str(ROOT / "merge.py"), *flags]


def digests(out: Path) -> Mapping[str, Any]:
    """Of the weight files, as the run took them."""
    outputs: Mapping[str, Any] = json.loads((out / "merge_recipe.json").read_text())["outputs"]
    return outputs


def measure(
    models: Path, method: str, kinds: Sequence[tuple[int, int]], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Run a method in every kind, round after round. Raises RuntimeError: two runs wrote other bytes.

    What a model's forward pass gives depends on how many threads torch has, which are as many as the kind says: methods that run models
    are held to the bytes of runs with as many threads.
    """
    text = models / "texts.txt" if method == "regmean" else None
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    expected: dict[int, Mapping[str, Any]] = {}
    for _ in range(rounds):
        for processes, threads in kinds:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            env = OFFLINE | {"OMP_NUM_THREADS": str(threads)}
            run = measured.run(command(models, method, out, processes, threads, text), env=env)
            written = digests(out)
            if written != expected.setdefault(threads if text else 0, written):
                raise RuntimeError(f"{method}: {processes} processes wrote other bytes")
            runs[processes, threads].append(
                {"seconds": run.seconds, "cpu_s": run.cpu_seconds, "peak_bytes": run.peak_bytes, **read_end_line(run)}
            )
            shutil.rmtree(out)
    return [
        {"method": method, "processes": processes, "threads": threads}
        | {key: statistics.median(run[key] for run in found) for key in found[0] if found[0][key] is not None}
        for (processes, threads), found in runs.items()
    ]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with base and tuned1 to tuned3")
    parser.add_argument("--methods", default="dare_ties,ties", help="separated by commas")
    parser.add_argument("--processes", default="2", help="numbers of processes of one thread each, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/processes"), help="for what is written, removed after each run"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, for benchmarks/scale_model.py")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kinds = [(1, 1), (1, available_cores()), *((int(count), 1) for count in arguments.processes.split(","))]
    rows = []
    print(
        "| method | processes | threads | whole, s | processor, s | streaming, s | against one thread | memory of all, GB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in arguments.methods.split(","):
        found = measure(arguments.models, method, list(dict.fromkeys(kinds)), arguments.rounds, arguments.folder)
        for row in found:
            times = found[0]["stream_s"] / row["stream_s"]
            print(
                f"| {method} | {row['processes']} | {row['threads']} | {row['seconds']:.1f} | {row['cpu_s']:.1f} | {row['stream_s']:.2f} | {times:.2f} x | {row.get('peak_bytes', 0) / 1e9:.2f} |",
                flush=True,
            )
        rows += found
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
