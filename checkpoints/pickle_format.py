"""`pytorch_model.bin`: a pickle of tensors, read by torch's unpickler for plain tensors, which calls nothing that the file names.

Since torch 1.6 the file is a zip archive: the pickle says what tensors there are, and each storage is a record of its own,
which is mapped into memory. Mapped by `torch.load`, a record that is compressed, or shorter than the pickle says, gives
numbers that are none; so records are found, checked and mapped here.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage

from checkpoints.errors import InputError, first_line
from checkpoints.source import SAFETENSORS_NAMES

ADVICE = "Nothing in it was executed. Ask its author for safetensors."
LOCAL_HEADER = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
"""Of a record, without the name and the extra field behind it, whose lengths are its last two numbers of 16 bits."""


def load_pickle(path: Path, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, mapped into memory where it is an archive.

    Args:
        where: how messages name the file.

    Raises: InputError: anything but plain dense tensors by name, all of whose numbers are there; a damaged file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if zipfile.is_zipfile(path):
                state = _load_archive(path)
            else:  # from before torch 1.6: it cannot be mapped and is read whole
                state = torch.load(path, map_location="cpu", weights_only=True)
        return _plain_tensors(state, where)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # The error's own text advises to load the file with all it can execute; its context says what is wrong.
        raise InputError(
            f"{where}: expected a pickle of plain tensors, got something else: {first_line(error.__context__ or error)}. {ADVICE}"
        ) from None
    except Exception as error:  # a damaged pickle fails in every way there is
        raise InputError(
            f"{where}: cannot be read as a torch checkpoint: {first_line(error)}. Download it again."
        ) from None


def _load_archive(path: Path) -> Any:
    """What the pickle in an archive holds. Raises whatever the unpickler does; ValueError where a record does not fit."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(entries) < len(archive.infolist()) or len(pickles) != 1:
            raise ValueError("a zip archive without a data.pkl, or with two files of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("a compressed zip archive")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in entries and archive.read(folder + "byteorder") != b"little":
            raise ValueError("numbers in the byte order of another kind of processor")
        unpickler = Unpickler(io.BytesIO(archive.read(pickles[0])), encoding="utf-8")
        mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

        def find_storage(saved: Any) -> TypedStorage:
            """A storage from what the pickle says of it: ("storage", kind, key, device, number of elements)."""
            _, kind, key, _, count = saved
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            entry = entries[f"{folder}data/{key}"]
            if count * dtype.itemsize != entry.file_size:
                raise ValueError(f"{count} elements of {dtype} in a record of {entry.file_size} bytes")
            start = _start(file, entry)
            return TypedStorage(wrap_storage=mapped[start : start + entry.file_size], dtype=dtype, _internal=True)

        unpickler.persistent_load = find_storage  # type: ignore[method-assign]
        return unpickler.load()


def _start(file: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where in an archive a record's bytes begin. Raises ValueError where its own header is damaged."""
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if not header.startswith(LOCAL_HEADER):
        raise ValueError(f"no header of {entry.filename} where the archive's directory has it")
    lengths = int.from_bytes(header[-4:-2], "little"), int.from_bytes(header[-2:], "little")
    return entry.header_offset + LOCAL_HEADER_BYTES + sum(lengths)


def _plain_tensors(state: Any, where: str) -> dict[str, torch.Tensor]:
    """What was unpickled, without gradients. Raises InputError where it is anything but dense tensors of numbers by name."""
    if not isinstance(state, dict):
        raise InputError(f"{where}: expected tensors by name, got {type(state).__name__}. {ADVICE}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(f"{where}: expected tensors by name, got the name {name!r:.100}. {ADVICE}")
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise InputError(f"{where}: {name:.200}: expected a tensor, got {type(value).__name__}. {ADVICE}")
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_neg()
        if not dense or value.dtype not in SAFETENSORS_NAMES:
            kind = f"{value.layout}, {value.dtype}, {value.device}".replace("torch.", "")
            raise InputError(f"{where}: {name:.200}: expected a dense tensor of numbers, got {kind}. {ADVICE}")
        if value.nbytes > value.untyped_storage().nbytes():
            raise InputError(
                f"{where}: {name:.200}: expected {value.numel()} elements, got fewer, each of which stands for many. {ADVICE}"
            )
    return {name: value.detach() for name, value in state.items()}
