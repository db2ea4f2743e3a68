"""A GGUF file as a model: transformers turns it into a checkpoint in the user's cache, which is opened like any other.

The checkpoint lies below `$XDG_CACHE_HOME/merge_aim/gguf` (`~/.cache/merge_aim/gguf`), under a name made of the file's path, size and time. A
later run finds it there; it can be deleted whenever no run is reading it. Its files carry the GGUF file's time, so that one that is
made again is, for a run that goes on, the same input.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints.errors import InputError, first_line
from checkpoints.location import Location, ModelName

_PLAIN = {"F32": "float32", "F16": "float16"}
"""What a file stores as plain numbers -> the dtype of its checkpoint; all others are quantised or bfloat16, and become bfloat16."""


def convert_gguf(name: ModelName, *, quiet: bool = False) -> Location:
    """The checkpoint of a GGUF file, made where it is not there yet; reads the whole model into memory.

    Args:
        quiet: no progress bars of transformers.

    Raises: InputError: the package gguf is not installed; transformers cannot read the file; the cache cannot be written to.
    """
    file = name.path.resolve()
    target = _folder_of(file, str(name))
    if not target.is_dir():
        if find_spec("gguf") is None:
            raise InputError(
                f"{name}: expected the package gguf, which reads it, got none. Run: pip install 'gguf==0.19.0'."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        except OSError as error:
            raise InputError(
                f"{name}: expected a folder for its checkpoint, got {error}. Point XDG_CACHE_HOME to one."
            ) from error
        try:
            with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # one of the bars knows no other way
                _convert(file, partial)
            time = file.stat().st_mtime_ns
            for path in partial.iterdir():
                os.utime(path, ns=(time, time))
            partial.rename(target)
        except OSError as error:
            if not target.is_dir():  # else another run has made it meanwhile
                raise _cannot(name, error) from error
        except Exception as error:  # of a file from anywhere, in another library
            raise _cannot(name, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Location(name, target)


def gguf_note(location: Location) -> str:
    """What a plan says of it."""
    return (
        f"{location.name}: read by transformers, into the checkpoint {location.folder}, which can be deleted afterwards. Its tokenizer is what "
        "the file tells of it."
    )


def _cannot(name: ModelName, error: Exception) -> InputError:
    return InputError(
        f"{name}: expected a GGUF file of a language model that transformers reads, got {type(error).__name__}: {first_line(error)}. Give the "
        "model as it was before it was converted."
    )


def _folder_of(file: Path, label: str) -> Path:
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        raise InputError(f"{label}: expected a folder for its checkpoint, got no home. Set XDG_CACHE_HOME.") from None
    status = file.stat()
    facts = [str(file), str(status.st_size), str(status.st_mtime_ns), version("transformers")]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    return (home / "merge_aim" / "gguf" / digest[:32]).absolute()


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file into a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    dtype, has_tokenizer = _look_into(file)
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        model: Any
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in report[key])
        if lacking:
            raise ValueError(f"no tensor for {', '.join(lacking[:3])}{' and more' * (len(lacking) > 3)}")
        # What says that the weights are quantised: they are not any more, and transformers would refuse to save them.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(folder)
        if has_tokenizer:
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.save_pretrained(folder)
    finally:
        logging.set_verbosity(level)


def _look_into(file: Path) -> tuple[str, bool]:
    """The dtype that most of a file's numbers ask for, and whether it holds a tokenizer."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(file)
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0] if sizes else ""
    return _PLAIN.get(kind, "bfloat16"), "tokenizer.ggml.model" in reader.fields
