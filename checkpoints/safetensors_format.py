"""The safetensors file layout: 8 bytes of header length, a JSON header, the tensors' bytes without a gap.

Read and written here rather than by the safetensors library because the merge needs offsets: it reads with
`pread` into buffers that it reuses and writes with `pwrite` into files whose size is known beforehand.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import InputError, WriteError
from checkpoints.files import parse_json
from checkpoints.folder import Folder
from checkpoints.source import SAFETENSORS_DTYPES, SAFETENSORS_NAMES, TensorInfo

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMENSIONS = 64  # more than numpy and models have
METADATA = {"format": "pt"}  # what transformers asks of a checkpoint it loads


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place in a file."""

    info: TensorInfo
    offset: int
    """Bytes from the start of the file to the tensor's first byte."""


def read_header(path: Path, label: str, name: str = "") -> dict[str, StoredTensor]:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.
        label: the model it belongs to, for messages.
        name: of the file there, its last name where none is given.

    Returns: every tensor in it and where its bytes lie.

    Raises:
        InputError: not a safetensors file; truncated; an unknown dtype; tensors that overlap, leave a gap or do not
            fill their range; a header that claims more than the file holds, or that other readers would read otherwise.
    """
    where = f"{label}: {name or path.name}"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        length = min(MAX_HEADER_BYTES, size, int.from_bytes(prefix, "little"))
        raw = _header_of(prefix + file.read(length), size, where)
    return parse_header(raw, size, where)


def parse_header(raw: bytes, file_size: int, where: str) -> dict[str, StoredTensor]:
    """Parse the JSON header `raw` of a file of `file_size` bytes; `where` names the file. Raises as `read_header`."""
    try:
        header = parse_json(raw, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole)
        if not isinstance(header, dict):
            raise ValueError(f"a JSON {type(header).__name__}")
        metadata = header.get("__metadata__")
        is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        if metadata is not None and not is_text:
            raise ValueError("metadata that are no text by name")
    except ValueError as error:
        raise InputError(
            f"{where}: expected a JSON header, got {error}. The file is damaged; download it again."
        ) from None
    start = LENGTH_BYTES + len(raw)
    entries = {name: _entry(entry, f"{where}: {name}") for name, entry in header.items() if name != "__metadata__"}
    position = 0
    for name, (info, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != position or end - begin != info.nbytes:
            raise InputError(
                f"{where}: {name}: expected {info.nbytes} bytes at {position}, got the range {begin} to {end}. "
                "The header is damaged; download the file again."
            )
        position = end
    if start + position != file_size:
        raise InputError(
            f"{where}: expected {start + position} bytes, got {file_size}. "
            "The file is truncated or has bytes to spare; download it again."
        )
    return {name: StoredTensor(info, start + begin) for name, (info, begin, _) in entries.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two entries with one name, readers choose differently."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        count = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {count.most_common(1)[0][0]!r:.100} twice")
    return entries


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text}, which is no JSON")


def _whole(text: str) -> int | float:
    """A whole number; the format's own reader takes -0 for none."""
    return -0.0 if text == "-0" else int(text)


def _entry(entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    """One tensor of the header as (info, first byte, byte after the last), relative to the header's end."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise TypeError
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{where}: expected dtype, shape and data_offsets, got {entry!r:.200}. The header is damaged."
        ) from None
    sizes = [size for size in numbers[:-2] if size != 0]  # so that a 0 among them hides no overflow
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or math.prod(sizes) >= 1 << 60:
        raise InputError(f"{where}: expected whole numbers, got {entry!r:.200}. The header is damaged.")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise InputError(
            f"{where}: the dtype {dtype!r} is not supported. Known: {', '.join(SAFETENSORS_DTYPES)}. Use the unquantised model."
        )
    return TensorInfo(SAFETENSORS_DTYPES[dtype], tuple(shape)), begin, end


def build_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] = METADATA
) -> tuple[bytes, dict[str, int]]:
    """Lay tensors out in the order given; the same tensors give the same bytes.

    Args:
        tensors: in the order in which their bytes shall lie. Larger dtypes must come first, so that every tensor is aligned.
        metadata: what else the header says, text by name.

    Returns: the file's first bytes (length, keys sorted, padded to 8 bytes) and each tensor's offset in the file.
    """
    relative: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in tensors.items():
        relative[name] = position
        end = position + info.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = LENGTH_BYTES + len(text)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, {
        name: start + offset for name, offset in relative.items()
    }


def pack_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A small file, in pieces. The same tensors give the same bytes."""
    ordered = {
        name: tensors[name].contiguous().cpu()
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    }
    header, _ = build_header(
        {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}, metadata
    )
    return [header, *(tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in ordered.values())]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small file whole or not at all; folders above it are made. Raises WriteError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(path.parent) as folder:
            folder.replace(path.name, pack_tensors(tensors, metadata))
    except OSError as error:
        raise WriteError(path, error) from error


def read_metadata(path: Path, label: str) -> dict[str, str]:
    """What a file's header says besides its tensors. Raises InputError as `read_header`, OSError where it cannot be read."""
    read_header(path, label)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        return _metadata(file.read(length))


def _metadata(raw: bytes) -> dict[str, str]:
    """What a header that was checked says besides its tensors."""
    metadata = json.loads(raw).get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def load_tensors(path: Path, label: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a small file whole: its tensors and its metadata.

    Raises: InputError: no such file, or as `read_header`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} {path}: cannot be read: {error.strerror}. Check the path.") from None
    return unpack_tensors(content, f"{label}: {path.name}")


def unpack_tensors(content: bytes, where: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A small file's tensors and metadata. Raises InputError as `read_header`, naming `where`."""
    raw = _header_of(content[: LENGTH_BYTES + MAX_HEADER_BYTES], len(content), where)
    tensors = {}
    for name, place in parse_header(raw, len(content), where).items():
        values = (
            torch.frombuffer(bytearray(content[place.offset : place.offset + place.info.nbytes]), dtype=torch.uint8)
            if place.info.nbytes
            else torch.empty(0, dtype=torch.uint8)
        )
        tensors[name] = values.view(place.info.dtype).view(place.info.shape)
    return tensors, _metadata(raw)


def _header_of(begin: bytes, size: int, where: str) -> bytes:
    """The JSON header in the first bytes of a file of `size` bytes. Raises InputError: there is none."""
    length = int.from_bytes(begin[:LENGTH_BYTES], "little")
    if len(begin) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise InputError(
            f"{where}: expected a safetensors header, got a file of {size} bytes whose header claims {length}. "
            "The file is truncated or no safetensors file; download it again."
        )
    return begin[LENGTH_BYTES : LENGTH_BYTES + length]


def pread_exactly(descriptor: int, view: memoryview, offset: int, where: str) -> None:
    """Fill `view` from the file at `offset` bytes. Raises InputError where the file ends before."""
    done = 0
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise InputError(f"{where}: the file ended while it was read. Was it changed? Run the command again.")
            done += count
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}.") from error
