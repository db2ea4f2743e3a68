"""Which files of a checkpoint's folder are copied: all that are neither weights, nor left behind by a training, nor ours.

By their names alone, so that the files of a folder and those of a repo on the hub are chosen alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from checkpoints.files import is_plain_name

CHAT_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenization_*.py",
    *CHAT_TEMPLATE_FILES,
)
KNOWN_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that loading or using a model asks for; what else lies there is copied unless it is one of the following."""
OURS = ("readme.md", "merge_recipe.json")
"""In small letters: what every output has of its own."""
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz", "*.npy", "*.pkl", "*.pickle"),
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.mlpackage", "*.nemo", "*.pdparams", "*.distcp"),
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.7z", "*.data-*-of-*"),
)  # fmt: skip
"""Weights in any format, and archives. A folder that holds some is a model of its own."""
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What the weights of a module behind a model are called, in the order in which they are looked for."""
MODEL_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""What the model's own weights are called; whoever reads others knows their names."""
TRAINING = (
    "*.index.json",
    "trainer_state.json",
    "training_args*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "events.out.*",
    "*.log",
    "*.bak",
    "*.tmp",
    "adapter_*",
)
FOLDERS = (
    "original",
    "onnx",
    "openvino*",
    "coreml",
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "logs",
    "__pycache__",
)
"""Folders of other formats of the weights, and of what a training leaves behind."""

LARGEST = 64 << 20
"""Bytes of the largest file that is copied; the largest tokenizers take half of it."""
MOST_OTHERS = 200
"""Files of no known name that are copied; where there are more, the folder holds something else besides the model."""


@dataclass(frozen=True)
class SideNames:
    """Files of a checkpoint by their relative names, sorted.

    Attributes:
        copied: go into the output.
        left_out: neither these nor weights of the model, and nothing that everybody expects to stay.
    """

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_module(folder: str) -> bool:
    """Whether a folder is called as one of the modules that follow a model in a pipeline: `1_Pooling`, `2_Dense`."""
    return re.fullmatch(r"\d{1,3}_[A-Za-z]\w{0,60}", folder) is not None


def module_weights(names: Iterable[str]) -> list[str]:
    """The files with the weights of modules behind a model, one for each folder: safetensors before a pickle, never both.

    Args:
        names: relative names of a checkpoint's files.
    """
    chosen: dict[str, str] = {}
    for wanted in MODULE_WEIGHTS:
        for name in sorted(names):
            folder, _, last = name.rpartition("/")
            if last == wanted and is_module(name.split("/")[0]):
                chosen.setdefault(folder, name)
    return sorted(chosen.values())


def choose_side_files(sizes: Mapping[str, int]) -> SideNames:
    """Choose among the files of a checkpoint.

    Args:
        sizes: relative name, parts joined by `/`, -> bytes; hidden files may be left out.
    """
    plain = [name for name in sorted(sizes) if all(is_plain_name(part) and part[0] != "." for part in name.split("/"))]
    with_weights = {
        top for name in plain if "/" in name and matches(name, WEIGHTS) and not is_module(top := name.split("/")[0])
    }
    known, others, left_out = [], [], []
    for name in plain:
        top = name.split("/")[0] if "/" in name else ""
        last = name.rpartition("/")[2]
        if name.lower() in OURS or matches(name, MODEL_WEIGHTS) or (is_module(top) and last in MODULE_WEIGHTS):
            continue
        if (
            sizes[name] > LARGEST
            or ((not top or is_module(top)) and matches(name, WEIGHTS))
            or matches(name, TRAINING)
            or top in with_weights
            or (top and matches(top, FOLDERS))
        ):
            left_out.append(name)
        elif matches(name, KNOWN_FILES):
            known.append(name)
        else:
            others.append(name)
    if len(others) > MOST_OTHERS:
        others, left_out = [], [*left_out, *others]
    return SideNames(tuple(sorted([*known, *others])), tuple(sorted(left_out)))
