"""Write a checkpoint whose tensors' shapes are known beforehand: pre-sized shards, filled in any order by `pwrite`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.errors import InputError
from checkpoints.safetensors_format import build_header
from checkpoints.source import TensorInfo

CHUNK_BYTES = 64 << 20
READ_BACK_BYTES = 1 << 20


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, first bytes, and where each tensor goes."""

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    """Bytes of the whole file."""


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Share tensors out among files, in natural order of their names, as transformers names the files.

    Args:
        tensors: every tensor of the checkpoint.
        max_shard_bytes: a file's tensors add up to no more, unless a single one does.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name in sorted(tensors, key=natural_key):
        info = tensors[name]
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        file_name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Larger dtypes first: a float32 tensor behind an odd number of bfloat16 elements could not be mapped.
        ordered = dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize))
        header, offsets = build_header(ordered)
        shards.append(Shard(file_name, header, offsets, len(header) + sum(info.nbytes for info in group.values())))
    return shards


class CheckpointWriter:
    """Fills the shards of one checkpoint. `write` may be called from several threads, in any order, once an element.

    Args:
        folder: exists; the shards are created in it.
        shards: from `plan_shards`.
        digest: take the digest of every 64 MiB chunk as soon as it is complete, while the page cache still holds it.
    """

    def __init__(self, folder: Path, shards: list[Shard], *, digest: bool):
        self.folder = folder
        self.shards = shards
        self._files = [_OpenShard(folder / shard.file_name, shard, digest) for shard in shards]
        self._owner = {name: file for file in self._files for name in file.shard.offsets}

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write `values`, `[n]` contiguous on the CPU in the tensor's dtype, at the elements `start` to `start + n` of `name`.

        Raises: InputError: the disk is full or fails.
        """
        file = self._owner[name]
        raw = values.view(torch.uint8).numpy().data
        file.write(raw, file.shard.offsets[name] + start * values.element_size())

    def close(self) -> dict[str, dict[str, int | str]]:
        """Flush every shard to the disk, write the index, and return `bytes` and `sha256_64MiB` (None untaken) per file."""
        for file in self._files:
            file.close()
        if len(self.shards) > 1:
            weight_map = {name: shard.file_name for shard in self.shards for name in shard.offsets}
            total = sum(shard.size - len(shard.header) for shard in self.shards)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_file(
                self.folder / "model.safetensors.index.json",
                json.dumps(index, indent=2, sort_keys=True).encode() + b"\n",
            )
        return {file.shard.file_name: file.summary() for file in self._files}

    def release(self) -> None:
        """Close the files as they are; nothing where `close` did."""
        for file in self._files:
            file.release()


class _OpenShard:
    """One shard on disk, the bytes still missing in each chunk, and the digests of the chunks that are complete."""

    def __init__(self, path: Path, shard: Shard, digest: bool):
        self.path = path
        self.shard = shard
        self._lock = threading.Lock()
        self._missing = [min(CHUNK_BYTES, shard.size - begin) for begin in range(0, shard.size, CHUNK_BYTES)]
        self._digests: list[bytes] | None = [b""] * len(self._missing) if digest else None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            os.ftruncate(self._descriptor, shard.size)
        except OSError as error:
            raise self._failed(error) from error
        self.write(memoryview(shard.header), 0)

    def write(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise self._failed(error) from error
        for chunk in self._completed(offset, offset + len(view)):
            if self._digests is not None:
                self._digests[chunk] = self._digest(chunk)

    def _completed(self, begin: int, end: int) -> list[int]:
        """Count the bytes `begin` to `end` as written; the chunks that this completes."""
        completed = []
        with self._lock:
            for chunk in range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
                first = chunk * CHUNK_BYTES
                self._missing[chunk] -= min(end, first + CHUNK_BYTES) - max(begin, first)
                if self._missing[chunk] == 0:
                    completed.append(chunk)
        return completed

    def _digest(self, chunk: int) -> bytes:
        begin = chunk * CHUNK_BYTES
        return hash_range(self._descriptor, begin, min(begin + CHUNK_BYTES, self.shard.size))

    def summary(self) -> dict[str, int | str]:
        entry: dict[str, int | str] = {"bytes": self.shard.size}
        if self._digests is not None:
            entry["sha256_64MiB"] = hashlib.sha256(b"".join(self._digests)).hexdigest()
        return entry

    def close(self) -> None:
        assert not any(self._missing), f"{self.path.name}: {sum(self._missing)} bytes were never written"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error
        self.release()

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written: {error.strerror}. Free space or choose another --save_path, and run again."
        )


def hash_range(descriptor: int, begin: int, end: int) -> bytes:
    """sha256 of the bytes `begin` to `end` of an open file, read 1 MiB at a time."""
    digest = hashlib.sha256()
    for offset in range(begin, end, READ_BACK_BYTES):
        digest.update(os.pread(descriptor, min(READ_BACK_BYTES, end - offset), offset))
    return digest.digest()


def chunked_sha256(path: Path) -> str:
    """sha256 over the sha256 of a file's 64 MiB chunks: the digest in merge_recipe.json, which threads can take in parts."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        chunks = [
            hash_range(descriptor, begin, min(begin + CHUNK_BYTES, size)) for begin in range(0, size, CHUNK_BYTES)
        ]
    finally:
        os.close(descriptor)
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and flush it to the disk. Raises InputError where the disk is full or fails."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}. Free space or choose another --save_path."
        ) from error
