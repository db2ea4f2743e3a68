"""Everything that a machine with one NVIDIA card can tell, in one command and without network; the result is one JSON.

    python benchmarks/gpu.py --minutes 9 --folder /tmp/gpu --out gpu.json
    python benchmarks/gpu.py --dry --folder /tmp/gpu --out gpu.json     # the same code, small, on a CPU: a minute or two
    python benchmarks/gpu.py --minutes 9 --parts tests,calibration --out gpu.json

Parts, in this order (`benchmarks/gpu_parts.py`): the tests marked `gpu`; equality of merges with the CPU, method by method;
merging and relaxing at 1.1 and 7 billion parameters on the card and on the CPU; how merging grows with the cores; calibration of
both models as a whole and layer by layer, with the memory of the card; generation with transformers and vLLM; mergekit on the same
files. Models are made on the card. What cannot be measured has a row that says why: something is not installed, the disk is too
small, or the minutes are over. The JSON is written anew after each row, so that whatever ends the run leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Bench
from benchmarks.measured import CommandFailed

PARTS = {
    "tests": gpu_parts.tests,
    "equality": gpu_parts.equality,
    "merge": gpu_parts.merge,
    "calibration": gpu_parts.calibration,
    "cores": gpu_parts.cores,
    "generation": gpu_parts.generation,
    "mergekit": gpu_parts.mergekit,
    "large": gpu_parts.large,
}
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numba", "vllm", "mergekit")


def machine(device: str) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    card = {"name": "none"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": str(torch.version.cuda)}
    return {
        "card": card,
        "cores": gpu_parts.available_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def run(bench: Bench, parts: Sequence[str], out: Path, device: str, *, dry: bool) -> dict[str, Any]:
    """Measure part after part; what fails is a row that says so. Returns: what is in the JSON."""
    found: dict[str, Any] = {"machine": machine(device), "dry": dry, "rows": []}
    started = time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        found["seconds"] = round(time.monotonic() - started, 1)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{found['seconds']:6.0f} s  {json.dumps(row)}", flush=True)

    for part in parts:
        try:
            for row in PARTS[part](bench):
                keep({"part": part, **row})
        except CommandFailed as error:
            keep({"part": part, "not_measured": str(error)})
    keep({"part": "end"})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing is begun or goes on (9)")
    parser.add_argument("--folder", type=Path, default=Path("build/gpu"), help="for models and merges; what it makes there is kept (build/gpu)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the result (gpu.json)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)} (all)")
    parser.add_argument("--dry", action="store_true", help="the same code on the CPU, with small sizes")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: expected any of {', '.join(PARTS)}, got {unknown[0]!r}")
    device = "cpu" if arguments.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that torch can use is here; --dry runs the same code on the CPU")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    sizes = gpu_parts.SMALL if arguments.dry else gpu_parts.SIZES
    run(Bench(arguments.folder, device, deadline, sizes), parts, arguments.out, device, dry=arguments.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
