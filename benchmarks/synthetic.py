"""Checkpoints to measure on: a Llama of any shape with random weights, and fine-tunes of it, made in seconds.

Numbers are taken from a small pool of noise at positions that the tensor's name decides, so that making a checkpoint
costs little more than writing it and gives the same bytes every time. The weights have no skills.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

BLOCK_ELEMENTS = 1 << 18
POOL_ELEMENTS = 1 << 22
RUN_ELEMENTS = 1024
COMPLETE = "synthetic.json"
"""Written last into a checkpoint's folder: what it is, and that it is whole."""
WEIGHT_SCALE, NORM_SCALE = 0.02, 0.1
DELTA_SCALES = (0.01, 0.02, 0.04)
"""|task vector| / |base| of the fine-tunes, in turn: what instruction, mathematics and code models show, in order of size."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: hidden channels, layers, channels of the MLP, attention heads, key-value heads, tokens."""

    hidden: int = 2048
    layers: int = 22
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    def scaled(self, factor: float) -> Shape:
        """About `factor` times the parameters: wider, with as many layers and channels of a head, and the vocabulary."""
        width = math.sqrt(factor)
        heads = max(round(self.heads * width / self.kv_heads), 1) * self.kv_heads
        intermediate = max(round(self.intermediate * width / 64), 1) * 64
        same = factor == 1
        return self if same else replace(self, heads=heads, hidden=heads * self.head, intermediate=intermediate)

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def name(self) -> str:
        """A folder's name: all sizes."""
        return "-".join(f"{field.name[0]}{getattr(self, field.name)}" for field in fields(self))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (wide, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, wide),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        names: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, self.hidden)}
        names |= {f"model.layers.{i}.{part}": shape for i in range(self.layers) for part, shape in layer.items()}
        names |= {"model.norm": (self.hidden,), "lm_head": (self.vocabulary, self.hidden)}
        return {f"{name}.weight": shape for name, shape in names.items()}

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each size of a `Shape`, None by default."""
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, metavar="N", help=f"of the model ({field.default})")


def read_shape(arguments: argparse.Namespace, default: Shape) -> Shape:
    """The shape that the flags ask for. Raises ValueError where the sizes do not fit each other."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Shape)}
    shape = replace(default, **{name: value for name, value in given.items() if value is not None})
    if min(asdict(shape).values()) < 1 or shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.head % 2:
        raise ValueError(
            "sizes are whole numbers above 0; --hidden is an even multiple of --heads, --heads one of --kv_heads"
        )
    return shape


@dataclass(frozen=True)
class Checkpoints:
    """A base and fine-tunes of it, and what AIM needs beside them; see `make_checkpoints`."""

    folder: Path
    shape: Shape
    models: int

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.folder / "base"

    @property
    def fine_tunes(self) -> list[Path]:
        """The fine-tunes' folders."""
        return [self.folder / f"tuned{number}" for number in range(1, self.models + 1)]

    @property
    def texts(self) -> Path:
        """Calibration texts, one a line."""
        return self.folder / "texts.txt"

    @property
    def missing_bytes(self) -> int:
        """About how many bytes `make_checkpoints` still has to write."""
        return sum(2 * self.shape.parameters for one in (self.base, *self.fine_tunes) if not (one / COMPLETE).is_file())


def make_checkpoints(
    root: Path, shape: Shape, models: int, *, shards: int = 3, device: str = "cpu", say: Callable[[str], object] = print
) -> Checkpoints:
    """A base and `models` fine-tunes of it in bfloat16, with a tokenizer of one token a word, below `root`.

    What is there already and whole is kept; what an earlier run left half-made is made again. `device`: where numbers are made.
    """
    made = Checkpoints(root / shape.name, shape, models)
    noise = None
    for number, folder in enumerate((made.base, *made.fine_tunes)):
        if (folder / COMPLETE).is_file():
            continue
        say(f"making {folder}: {2 * shape.parameters / 1e9:.2f} GB")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        noise = _make_noise().to(device) if noise is None else noise
        _write_weights(folder, shape, number, shards, noise)
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
        _write_tokenizer(folder, shape.vocabulary)
        (folder / COMPLETE).write_text(json.dumps({**asdict(shape), "model": number}) + "\n")
    generator = random.Random(0)
    lines = (" ".join(f"w{generator.randrange(shape.vocabulary)}" for _ in range(64)) for _ in range(64))
    made.texts.write_text("\n".join(lines) + "\n")
    return made


def _make_noise() -> Any:
    """Normal noise whose runs differ in size as rows of trained weights do: `[POOL_ELEMENTS]` float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(POOL_ELEMENTS // RUN_ELEMENTS, RUN_ELEMENTS, generator=generator)
    sizes = torch.randn(POOL_ELEMENTS // RUN_ELEMENTS, 1, generator=generator).mul_(0.3).exp_()
    return noise.mul_(sizes).view(-1)


def _write_weights(folder: Path, shape: Shape, model: int, shards: int, noise: Any) -> None:
    """The weight files of model number `model`, 0 for the base: x = base + size * (other noise), rounded to bfloat16."""
    import torch

    from checkpoints.folder import Folder
    from checkpoints.source import TensorInfo
    from checkpoints.writer import CheckpointWriter, plan_shards

    infos = {name: TensorInfo(torch.bfloat16, size) for name, size in shape.tensors().items()}
    sizes = [info.nbytes for info in infos.values()]
    writer = CheckpointWriter(
        Folder.open(folder), plan_shards(infos, -(-sum(sizes) // shards) + max(sizes)), digest=None
    )

    def piece(seed: str, count: int) -> Any:
        start = random.Random(seed).randrange(POOL_ELEMENTS - count)
        return noise[start : start + count]

    def write(name: str) -> None:
        info = infos[name]
        is_norm = len(info.shape) == 1
        for start in range(0, info.numel, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, info.numel - start)
            scale = NORM_SCALE if is_norm else WEIGHT_SCALE
            values = piece(f"{name} {start}", count) * scale
            if model:
                delta = scale * DELTA_SCALES[(model - 1) % len(DELTA_SCALES)]
                values.add_(piece(f"{name} {start} {model}", count), alpha=delta)
            writer.write(name, start, values.add_(1.0 if is_norm else 0.0).to(torch.bfloat16).cpu())

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, infos))
        writer.close()
    finally:
        writer.release()


def _write_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}\n')


def make_statistics(base: Path, texts: Path, path: Path) -> None:
    """Take activation statistics of a base with a few tokens: what they are worth does not change how long they take to apply."""
    from aim.calibrate import CalibrationOptions, calibrate
    from aim.calibration_text import CalibrationData
    from checkpoints.model import open_model

    data = CalibrationData(str(texts), n_samples=2, block_size=64)
    calibrate(open_model(str(base)), data, CalibrationOptions()).save(path)


def weight_files(folders: Sequence[Path]) -> list[Path]:
    """The weight files of checkpoints."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
