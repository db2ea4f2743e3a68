"""Make the LoRA adapters of `make real-quick` from trained experts: the best product of rank 5 of each layer's task vector.

    PYTHONPATH=. python -m examples.real.extract --base real/base --experts real/seed_1/experts --activations real/activations.safetensors

What is kept is what matters for a layer's output: columns are scaled by the root mean square of the base's inputs
before the singular value decomposition, and back after it. The adapters are stored in bfloat16, 3 MB each, with the digest of every file in
SHA256SUMS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.errors import ArgumentError
from examples.miniature import guarded
from examples.real.train import LOG

if TYPE_CHECKING:
    from torch import Tensor

RANK = 5
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What adapter_config.json says of the base. Quantised to 4 bits and back, so name the folder: real/base+examples/real/adapters/sql."""
OUT = Path(__file__).resolve().parent / "adapters"
SUMS = "SHA256SUMS"


def factors(delta: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is near a task vector, in the norm that `scale` gives to its columns.

    Args:
        delta: `[out, in]` float32.
        scale: `[in]` float32, >= 0, root mean square input of each column.
        rank: columns of the first factor.

    Returns: B `[out, rank]` and A `[rank, in]`, float32, of equal size.
    """
    import torch

    weights = scale.clamp(min=1e-3 * float(scale.mean())) + torch.finfo(torch.float32).tiny
    left, values, right = torch.linalg.svd(delta * weights, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank] / weights


def extract(base: Path, expert: Path, activations: Path, out: Path) -> None:
    """Write the adapter of an expert."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    modules = set()
    old = load_file(base / "model.safetensors")
    with safe_open(expert / "model.safetensors", "pt") as new, safe_open(activations, "pt") as statistics:
        known = set(statistics.keys())
        for name in sorted(new.keys()):
            delta = new.get_tensor(name).float() - old[name].float()
            if delta.ndim != 2 or f"{name}.mean_sq" not in known or not bool(delta.any()):
                continue
            product = factors(delta, statistics.get_tensor(f"{name}.mean_sq").float().sqrt(), RANK)
            module = name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            for factor, letter in zip(product, "BA", strict=True):
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.to(torch.bfloat16).contiguous()
    config = {
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": RANK,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / LOG).write_text(json.dumps(json.loads((expert / LOG).read_text())) + "\n")


def sums(folder: Path) -> str:
    """sha256 of every file below a folder but the sums themselves, as `sha256sum -c` reads them."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SUMS
    ]
    return "".join(lines)


def run(base: Path, experts: Path, activations: Path, out: Path) -> None:
    """Extract the adapters of all experts in a folder. Raises: ArgumentError: there are none."""
    found = sorted(path.parent for path in experts.glob("*/model.safetensors"))
    if not found:
        raise ArgumentError(f"--experts {experts}: expected folders of experts, got none. Run make real.")
    for expert in found:
        extract(base, expert, activations, out / expert.name)
        print(f"{out / expert.name}: written")
    (out / SUMS).write_text(sums(out))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base's checkpoint")
    parser.add_argument("--experts", type=Path, required=True, help="folder of experts, one folder each")
    parser.add_argument("--activations", type=Path, required=True, help="the base's statistics, which make real keeps")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the adapters (default: {OUT.name} beside this file)")  # fmt: skip
    arguments = parser.parse_args(argv)
    return guarded("extract.py", lambda: run(arguments.base, arguments.experts, arguments.activations, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
