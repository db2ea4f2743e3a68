"""A source: a mapping from tensor name to tensor, read lazily, a run of elements at a time.

A plain checkpoint is a source (`reader.py`); so is a checkpoint whose vocabulary rows are put into another
checkpoint's order (`vocabulary.py`). A source can be wrapped around another, so no reader of tensors needs
to know how many layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

# The names that safetensors uses; every stored dtype that can be read at all.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MXFP4_BLOCKS = "_blocks"
"""How the name of a tensor of MXFP4 numbers ends."""

# What can be merged and written: plain floating point.
FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

READ_ELEMENTS = 1 << 17
"""Elements read at a time where tensors are compared or summed before the merge."""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`: the way config files and users write it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the metadata says of one tensor, before a byte of it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    saved_as: torch.dtype | None = None
    """The dtype to save it in by default, where reading gives more digits than that."""

    @property
    def plain_dtype(self) -> torch.dtype:
        """The dtype to save it in by default."""
        return self.saved_as or self.dtype

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 where a dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.numel * self.dtype.itemsize


class Source(Protocol):
    """Tensors by name. Implementations are safe to read from several threads at once."""

    label: str
    """How messages name it: the model as the user wrote it."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Read the elements `start` to `stop` of the flattened tensor `name`.

        Args:
            name: a key of `tensors`.
            start, stop: element range, 0 <= start < stop <= numel.
            buffer: `[>= 8 * (stop - start)]` uint8 on the CPU, the caller's to lend (pinned for a GPU).

        Returns:
            `[stop - start]` on the CPU, in the dtype `tensors[name].dtype`; usually a view of `buffer`, valid until it is
            lent again, never to be written to.

        Raises:
            InputError: the file is shorter than its header says, or cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where an input of the merge comes from: a source and the name there."""

    source: Source
    name: str

    @property
    def info(self) -> TensorInfo:
        """Shape and stored dtype."""
        return self.source.tensors[self.name]

    def read(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """`Source.read` of this tensor."""
        return self.source.read(self.name, start, stop, buffer)

    def place_in_file(self) -> tuple[int, int] | None:
        """Descriptor of the file, and the byte at which the tensor begins there, where its elements lie in one file as `read` gives them."""
        find: Callable[[str], tuple[int, int] | None] | None = getattr(self.source, "place_in_file", None)
        return None if find is None else find(self.name)


def is_mxfp4(name: str, info: TensorInfo) -> bool:
    """Whether a stored tensor is the numbers of an MXFP4 one; see `checkpoints.mxfp4`."""
    return name.endswith(MXFP4_BLOCKS) and info.dtype == torch.uint8


def holds_mxfp4(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether one of some stored tensors is."""
    return any(is_mxfp4(name, info) for name, info in tensors.items())
