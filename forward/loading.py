"""Load a model whole, ready to run on tokens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError, first_line
from checkpoints.model import Model
from checkpoints.reader import Checkpoint, read_tensor
from checkpoints.settings import setting
from checkpoints.source import FLOAT_DTYPES


class CannotRun(InputError):
    """A model's own code fails on the tokens that it is run on."""


def load(
    base: Model,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    exact_caps: bool = True,
    offload: Path | None = None,
    max_memory: int | None = None,
) -> Any:
    """A model as transformers loads it, ready to run. Raises InputError where it cannot be loaded.

    Args:
        dtype: of the forward pass: `auto` (the checkpoint's) or a key of FLOAT_DTYPES.
        device: where; None for the GPU or GPUs where there are any, spilling over to the CPU, else the CPU.
        exact_caps: compute attention with a cap on its logits as the model has it; else as sdpa attention does, which leaves
            the cap out without a word.
        offload: a folder for weights that fit into no memory.
        max_memory: bytes of it, where less is to be used than is free.
    """
    keywords: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else FLOAT_DTYPES[dtype],
        "attn_implementation": "sdpa",
    }
    if device is not None and device.type == "cuda":
        keywords["device_map"] = {"": device}
    elif device is None and torch.cuda.is_available():
        keywords["device_map"] = "auto"
    if offload is not None:
        keywords |= {"device_map": "auto", "offload_folder": str(offload)}
        keywords |= {"max_memory": {"cpu": max_memory}} if max_memory else {}
    with out_of_memory(f"{base.label}: loading it", f"Use {setting('calibration.dtype', 'bfloat16')}"):
        try:
            model = _from_pretrained(base, keywords)
        except Exception as error:  # a model class's own code fails in every way there is
            if isinstance(error, MemoryError) or is_out_of_memory(error):
                raise
            raise InputError(
                f"{base.label}: cannot be loaded as a {base.architecture.model_class}: {first_line(error)}. Use a base that transformers can load."
            ) from error
    if has_caps(model) and exact_caps:
        model.set_attn_implementation("eager")
    return model


def has_caps(model: Any) -> bool:
    """Whether a model caps its attention logits, which only eager attention does."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _from_pretrained(base: Model, keywords: dict[str, Any]) -> Any:
    """Load it; models without sdpa attention take what they have."""
    build: Any = class_of(base)
    if isinstance(base.weights, Checkpoint):
        where: Any = base.folder
        keywords = {"local_files_only": True, "trust_remote_code": base.trust_remote_code, **keywords}
    else:  # what no file holds as it is: a base with an adapter, dequantised weights
        where, keywords = None, {**keywords, **_in_memory(base, keywords)}
    try:
        model = build.from_pretrained(where, **keywords)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        rest = {key: value for key, value in keywords.items() if key != "attn_implementation"}
        model = build.from_pretrained(where, **rest)
    return model.eval()


def class_of(base: Model) -> Any:
    """The class that a model is loaded with, which is the one that its tensors were matched with."""
    import transformers

    from checkpoints.meta_model import build_meta_model

    known = getattr(transformers, base.architecture.model_class, None)
    if known is not None:
        return known
    if isinstance(base.weights, Checkpoint):
        return transformers.AutoModelForCausalLM  # of code beside the checkpoint
    return type(build_meta_model(base.folder, label=base.label, trust_remote_code=base.trust_remote_code))


def config_of(base: Model) -> Any:
    """The config that transformers makes of config.json."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=base.trust_remote_code)


def _in_memory(base: Model, keywords: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` takes in place of a folder: the config, and every tensor in the dtype to run in."""
    config = config_of(base)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of weights that are plain numbers by now
    state = {name: read_tensor(base.weights, name).to(info.plain_dtype) for name, info in base.weights.tensors.items()}
    return {
        "config": config,
        "state_dict": state,
        "dtype": stored_dtype(base) if keywords["dtype"] == "auto" else keywords["dtype"],
    }


def auto_dtype(base: Model) -> torch.dtype:
    """What `dtype="auto"` means to transformers: what config.json says, else what is stored."""
    named = base.config.get("dtype") or base.config.get("torch_dtype")
    if isinstance(base.weights, Checkpoint) and named in FLOAT_DTYPES:
        return FLOAT_DTYPES[named]
    return stored_dtype(base)


def stored_dtype(base: Model) -> torch.dtype:
    """The widest dtype that a model's weights are stored in."""
    floats = {info.plain_dtype for info in base.weights.tensors.values() if info.plain_dtype.is_floating_point}
    return functools.reduce(torch.promote_types, floats)


@contextmanager
def out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into one message that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise InputError(
                f"{what}: the GPU has too little memory. {advice}, or use {setting('device', 'cpu')}."
            ) from error
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise InputError(f"{what}: this machine has too little memory. {advice}.") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's for an allocation that failed, on a GPU or on the CPU, where it has no class of its own."""
    words = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars, which speak of training and generation, off the terminal."""
    from transformers.utils import logging as library

    logger = library.get_logger("transformers")
    level = logger.level
    bars = library.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
