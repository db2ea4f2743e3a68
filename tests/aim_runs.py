"""What the tests of AIM share: pico families, calibration text and its tokens, statistics and the command run on them.

What is right comes from tests/reference/aim.py, never from here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

import performAIM
from aim.activations import Activations
from aim.calibrate import CalibrationOptions, calibrate
from aim.calibration_text import CalibrationData, TokenBlocks
from checkpoints.location import parse_name
from checkpoints.model import Model, open_model
from tests import pico
from tests.reference import aim as reference
from tests.scene import Ended, call

# All experts of a layer in one tensor, stored input first; a router with a bias.
FUSED = ("gpt_oss", pico.WITH_HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64})
ARCHITECTURES = (*pico.ARCHITECTURES, "gpt_oss")
BLOCK_SIZE = 96  # longer than the pico models' sliding windows
SAMPLES = 9
SEED = 7


def make_family(folder: Path, architecture: str, **keywords: object) -> pico.Family:
    """`tests.pico.make_family`, for `gpt_oss` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pico.ARCHITECTURES, "gpt_oss", FUSED)
        return pico.make_family(folder, architecture, **keywords)  # type: ignore[arg-type]


def random_tokens(blocks: int = 4, block_size: int = BLOCK_SIZE, seed: int = 0) -> Tensor:
    """`[blocks, block_size]` ids of the pico models, special ones left out."""
    return torch.randint(3, pico.VOCABULARY, (blocks, block_size), generator=torch.Generator().manual_seed(seed))


def random_texts(count: int = 40, seed: int = 0) -> list[str]:
    """Lines of words; about one in eight is longer than `BLOCK_SIZE` tokens."""
    draw = random.Random(seed)
    words = ["channel", "weights", "merge", "of", "the", "activation", "42", "é", "norm", "to"]
    return [" ".join(draw.choices(words, k=draw.randint(5, 22))) for _ in range(count)]


@cache
def encoder() -> Tokenizer:
    """The pico models' tokenizer, without transformers."""
    return Tokenizer.from_file(str(pico.TOKENIZER / "tokenizer.json"))


def write_texts(folder: Path) -> Path:
    """Calibration text for the command, one a line."""
    path = folder / "texts.txt"
    path.write_text("\n".join(random_texts()) + "\n")
    return path


def text_blocks() -> Tensor:
    """The blocks that `perform` calibrates on, made by the reference."""
    texts = random_texts()
    encode = lambda text: encoder().encode(text).ids  # noqa: E731
    return reference.pick_blocks(texts, encode, n_samples=SAMPLES, block_size=BLOCK_SIZE, seed=SEED)


def open_folder(folder: Path) -> Model:
    """Open a checkpoint's folder."""
    return open_model(parse_name(str(folder)))


def calibrate_on(folder: Path, tokens: Tensor, **options: object) -> Activations:
    """Statistics of a base on given blocks, with a float32 forward unless told otherwise."""
    data = CalibrationData("given blocks", block_size=tokens.shape[1])
    chosen = CalibrationOptions(**({"dtype": "float32"} | options))  # type: ignore[arg-type]
    return calibrate(open_folder(folder), data, chosen, blocks=TokenBlocks(tokens, len(tokens), 0, 0, 0))


def attempt(
    base: Path,
    merged: Path,
    out: Path,
    *flags: object,
    texts: Path | None = None,
    dtype: str | None = "float32",
    code: int = 0,
) -> Ended:
    """performAIM.py, which must end with `code`.

    Args:
        out: the save path; flags: further flags.
        texts: from `write_texts`; without, the flags say where statistics come from.
        dtype: of the forward pass, where there are texts; None leaves the flag out.
    """
    command = ["--merged_model", merged, "--pretrained_model_name", base, "--save_path", out, "--quiet", *flags]
    if texts:
        command += ["--calibration_data", texts, "--n_samples", SAMPLES, "--block_size", BLOCK_SIZE]
        command += ["--calibration_seed", SEED, *(["--calibration_dtype", dtype] if dtype else [])]
    return call(performAIM, *command, code=code)


def perform(base: Path, merged: Path, out: Path, *flags: object, **keywords: Any) -> dict[str, Tensor]:
    """performAIM.py, which must succeed; the tensors it wrote (none for a sweep). Arguments as `attempt`."""
    attempt(base, merged, out, *flags, **keywords)
    return load(out) if (out / "model.safetensors").exists() else {}


def load(folder: Path) -> dict[str, Tensor]:
    """A one-file checkpoint's tensors, read by the safetensors library."""
    return load_file(folder / "model.safetensors")


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """Weight files and index of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def shares_of(
    folder: Path, tokens: Tensor, omega: float | Mapping[str, float], scaling: str = "identity"
) -> dict[str, tuple[Tensor, int]]:
    """What the reference lets every relaxed tensor of a base keep, `[in]` or `[experts, in]`, and its input dimension.

    Args:
        omega: one, or one for each tensor.
    """
    stored = load(folder)
    shares = {}
    for name, seen in reference.watch_inputs(folder, tokens).items():
        if name not in embeddings(stored):
            mean_abs, _, _ = seen.statistics(stored[name].shape)
            own = omega if isinstance(omega, float) else omega[name]
            shares[name] = (reference.keep(reference.importance(mean_abs, scaling), own), seen.input_dim)
    return shares


def embeddings(names: Mapping[str, object]) -> list[str]:
    """The pico models' embeddings, by name."""
    tables = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight", "word_embeddings.weight")
    return [name for name in names if name.endswith(tables)]
