"""Build the model that a checkpoint's config.json names on torch's meta device: no weights, nothing allocated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.errors import InputError, UnknownClass, first_line
from checkpoints.process import quick_start
from checkpoints.settings import setting
from checkpoints.sidecars import read_config


@quick_start()
def build_meta_model(folder: Path, *, label: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's model on the meta device: float32, no weights, nothing allocated. `type()` of it loads it.

    Its class is the config's first architecture where transformers has it, else what AutoModelForCausalLM, else what
    AutoModel makes of the config. Code from the checkpoint runs only if `trust_remote_code`.

    Raises:
        InputError: config.json is missing or broken, its model type is unknown, or no model can be built from it.
    """
    from transformers import initialization

    label = label or str(folder)
    raw = read_config(folder, label)
    code = raw.get("auto_map") or {}
    with _building(label):
        config = load_config(folder, label=label, trust_remote_code=trust_remote_code)
        build = _choose_class(config, raw.get("architectures"), code if trust_remote_code else {})
        safe_ops, no_weights = initialization.meta_device_safe_creation_ops(), initialization.no_init_weights()
        with torch.device("meta"), safe_ops, no_weights:
            # eager: the attention kernel that the config asks for need not be installed to look at names.
            return build(dtype=torch.float32, attn_implementation="eager").eval()


@quick_start()
def load_config(folder: Path, *, label: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config as transformers has it, what config.json leaves out filled in. Raises InputError as `build_meta_model`."""
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    label = label or str(folder)
    raw = read_config(folder, label)
    code = raw.get("auto_map") or {}
    model_type = str(raw.get("model_type") or "")
    # AutoConfig would guess a missing model_type from the name of the folder, so ask here.
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "AutoConfig" in code):
        advice = (
            f"pass {setting('trust_remote_code')} to run its own code, if you trust it"
            if code
            else "install a newer one"
        )
        raise UnknownClass(
            f"{label}: config.json: expected a model_type that transformers {__version__} knows, "
            f"got '{model_type}'. Mend it, or {advice}."
        )
    with _building(label):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextmanager
def _building(label: str) -> Iterator[None]:
    """Say in one message what transformers cannot make of a config: its validators and constructors raise anything."""
    from transformers import __version__

    with quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{label}: config.json: expected what transformers {__version__} can build a model from, got "
                f"{type(error).__name__}: {first_line(error)}. Mend it, or install the version it was written for."
            ) from error


def _choose_class(config: Any, architectures: Any, code: Mapping[str, str]) -> Callable[..., nn.Module]:
    """What builds the model, given dtype and attn_implementation. `code`: auto class -> trusted class beside it."""
    import transformers

    architecture = architectures[0] if architectures else ""
    model_class: Any = getattr(transformers, architecture, None) if architecture else None
    if isinstance(config, getattr(model_class, "config_class", None) or ()):
        return lambda **options: model_class._from_config(config, **options)
    own = [auto for auto, path in code.items() if isinstance(path, str) and path.split(".")[-1] == architecture]
    for name in (*own, "AutoModelForCausalLM", "AutoModel"):
        auto = getattr(transformers, name)
        if name in code or type(config) in auto._model_mapping:
            return lambda **options: auto.from_config(config, trust_remote_code=bool(code), **options)
    raise ValueError(f"no model class for {type(config).__name__}")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from transformers: what matters of a checkpoint's fit is in what `describe` returns."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
