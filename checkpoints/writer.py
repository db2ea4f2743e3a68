"""Write a checkpoint whose tensors' shapes are known beforehand: pre-sized shards, filled in any order by `pwrite`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blake3
import torch
import xxhash

from checkpoints.errors import WriteError
from checkpoints.folder import Folder
from checkpoints.safetensors_format import build_header
from checkpoints.source import TensorInfo

CHUNK_BYTES = 64 << 20
READ_BACK_BYTES = 1 << 20
ONE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Parts = Mapping[str, Sequence[tuple[int, int]]]
"""Tensor -> parts of it: first element, and the one after the last."""
ChunkDigests = Mapping[str, Mapping[str, str]]
"""File name -> number of a chunk, as text -> its digest in hexadecimal, after the name of the hash and a colon where that is not sha256."""
HashName = Literal["blake3", "sha256"]
HASHES: dict[HashName, Callable[[], Any]] = {"blake3": blake3.blake3, "sha256": hashlib.sha256}
"""What a file's digest can be made with: blake3 is fast on every processor, sha256 where there are instructions for it."""
DIGEST_KEYS: dict[HashName, str] = {name: f"{name}_64MiB" for name in HASHES}
"""Hash -> what a file's digest is called in merge_recipe.json."""


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(re.split(r"(\d+)", name))]


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, first bytes, and where each tensor goes.

    Attributes:
        file_name: relative to the checkpoint's folder.
        offsets, nbytes: of each tensor in it.
        size: of the whole file.
        itemsizes: bytes of an element of each tensor.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: Mapping[str, int]
    size: int
    itemsizes: Mapping[str, int]

    def bytes_of(self, name: str, part: tuple[int, int] | None = None) -> tuple[int, int]:
        """The first byte of a tensor, or of a part of its elements, and the one after the last."""
        begin = self.offsets[name]
        if part is None:
            return begin, begin + self.nbytes[name]
        return begin + part[0] * self.itemsizes[name], begin + part[1] * self.itemsizes[name]

    @property
    def is_of_module(self) -> bool:
        """Whether it holds the weights of a module behind the model: no index lists it."""
        return "/" in self.file_name


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int, modules: Collection[str] = ()) -> list[Shard]:
    """Share tensors out among files, in natural order of their names, as transformers names the files.

    Args:
        tensors: every tensor of the checkpoint.
        max_shard_bytes: a file's tensors add up to no more, unless a single one does.
        modules: those of modules behind the model, which lie in one file each, in the folder that their names begin with.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name in sorted(tensors.keys() - set(modules), key=natural_key):
        info = tensors[name]
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    shards = [
        _lay_out(
            ONE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, prefix=""
        )
        for number, group in enumerate(groups, 1)
    ]
    folders: dict[str, dict[str, TensorInfo]] = {}
    for name in sorted(set(modules) & tensors.keys(), key=natural_key):
        folders.setdefault(name[: name.rindex("/") + 1], {})[name] = tensors[name]
    return shards + [_lay_out(f"{folder}{ONE_FILE}", group, prefix=folder) for folder, group in folders.items()]


def _lay_out(file_name: str, group: Mapping[str, TensorInfo], *, prefix: str) -> Shard:
    """A file with these tensors, which it calls by their names without `prefix`."""
    # Larger dtypes first: a float32 tensor behind an odd number of bfloat16 elements could not be mapped.
    ordered = sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)
    header, offsets = build_header({name.removeprefix(prefix): info for name, info in ordered})
    nbytes = {name: info.nbytes for name, info in group.items()}
    placed = {prefix + name: offset for name, offset in offsets.items()}
    itemsizes = {name: info.dtype.itemsize for name, info in group.items()}
    return Shard(file_name, header, placed, nbytes, len(header) + sum(nbytes.values()), itemsizes)


def _indexed(shards: Sequence[Shard]) -> list[Shard]:
    """The files that an index lists: those of a model in several."""
    own = [shard for shard in shards if not shard.is_of_module]
    return own if len(own) > 1 else []


def file_names(shards: Sequence[Shard]) -> list[str]:
    """What `CheckpointWriter` writes."""
    return [*(shard.file_name for shard in shards), *([INDEX_FILE] if _indexed(shards) else [])]


class CheckpointWriter:
    """Fills the shards of one checkpoint. `write` may be called from several threads, in any order, once an element.

    Args:
        folder: open; the shards are created in it.
        shards: from `plan_shards`.
        digest: with which hash to take the digest of every 64 MiB chunk as soon as it is complete, while the page cache still holds
            it; None to take none.
        finished: tensors that an earlier writer of the same shards wrote and made durable, whose bytes are known to be there
            (`checkpoints.finished`); its files are gone on with.
        parts: the same of parts of tensors, elements from and to.
        chunks: the digests that its `sync` gave.
        makes: whether files that are not there are made; another process has made them where not.
        drops: let the system forget what is on the disk: its memory is wanted for the inputs.

    Raises: WriteError: a file cannot be made; ForeignFolder: something else lies in its place.
    """

    def __init__(
        self,
        folder: Folder,
        shards: list[Shard],
        *,
        digest: HashName | None,
        finished: Collection[str] = (),
        parts: Parts | None = None,
        chunks: ChunkDigests | None = None,
        makes: bool = True,
        drops: bool = False,
    ):
        self.folder = folder
        self.shards = shards
        known = chunks or {}
        self._files: list[_OpenShard] = []
        for shard in shards:
            ranges = _ranges(shard, finished, parts or {})
            own = known.get(shard.file_name, {})
            self._files.append(_OpenShard(folder, shard, digest, ranges, own, makes=makes, drops=drops))
        self._owner = {name: file for file in self._files for name in file.shard.offsets}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self._owner}

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write `values`, `[n]` contiguous on the CPU in the tensor's dtype, at the elements `start` to `start + n` of `name`.

        Raises: WriteError: the disk is full or fails.
        """
        file = self._owner[name]
        raw = values.view(torch.uint8).numpy().data
        offset = file.shard.offsets[name] + start * values.element_size()
        self._pieces[name].append((offset, len(raw), xxhash.xxh3_64_intdigest(raw)))
        file.write(raw, offset)

    def written(self, name: str, part: tuple[int, int] | None = None) -> tuple[str, list[int]]:
        """The file of a tensor, and what was written of it, or of a part of its elements: first byte, bytes and checksum of each
        piece, in their order."""
        shard = self._owner[name].shard
        begin, end = shard.bytes_of(name, part)
        pieces = sorted(piece for piece in self._pieces[name] if begin <= piece[0] < end or part is None)
        return shard.file_name, [number for piece in pieces for number in piece]

    def adopt(self, finished: Collection[str], parts: Parts, chunks: ChunkDigests) -> None:
        """Take what writers of other processes have written and made durable; see the arguments of the class."""
        for file in self._files:
            file.adopt(_ranges(file.shard, finished, parts), chunks.get(file.shard.file_name, {}))

    def sync(self) -> ChunkDigests:
        """Make everything durable that has been written so far. Raises WriteError: the disk is full or fails.

        Returns: the digests of the chunks that have become complete since the last time.
        """
        synced = {file.shard.file_name: file.sync() for file in self._files}
        self.folder.sync()
        return {name: digests for name, digests in synced.items() if digests}

    def close(self) -> dict[str, dict[str, int | str]]:
        """Flush every shard to the disk, write the index, and return `bytes` and, where it was taken, the digest (DIGEST_KEYS) per file."""
        for file in self._files:
            file.close()
        indexed = _indexed(self.shards)
        if indexed:
            weight_map = {name: shard.file_name for shard in indexed for name in shard.offsets}
            total = sum(shard.size - len(shard.header) for shard in indexed)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.folder.write(INDEX_FILE, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        return {file.shard.file_name: file.summary() for file in self._files}

    def release(self) -> None:
        """Close the files as they are; nothing where `close` did."""
        for file in self._files:
            file.release()


def _ranges(shard: Shard, finished: Collection[str], parts: Parts) -> list[tuple[int, int]]:
    """The bytes of a file that are written: of whole tensors, and of parts."""
    whole = [shard.bytes_of(name) for name in shard.offsets if name in finished]
    return whole + [shard.bytes_of(name, part) for name in shard.offsets for part in parts.get(name, ())]


class _OpenShard:
    """One shard on disk, the bytes still missing in each chunk, and the digests of the chunks that are complete."""

    def __init__(
        self,
        folder: Folder,
        shard: Shard,
        digest: HashName | None,
        ranges: Sequence[tuple[int, int]],
        known: Mapping[str, str],
        *,
        makes: bool,
        drops: bool,
    ):
        self.path = folder / shard.file_name
        self.shard = shard
        self._lock = threading.Lock()
        self._is_dirty = True
        self._missing = [min(CHUNK_BYTES, shard.size - begin) for begin in range(0, shard.size, CHUNK_BYTES)]
        self._hash = digest
        self._drops = drops and hasattr(os, "posix_fadvise")
        self._digests: list[bytes] | None = [b""] * len(self._missing) if digest else None
        self._told: set[int] = set()
        self._dropped: set[int] = set()
        there = folder.open_file(shard.file_name) if ranges or not makes else None
        if there is None and not makes:
            raise WriteError(self.path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
        self._descriptor = folder.new_file(shard.file_name) if there is None else there
        try:
            if makes:
                os.ftruncate(self._descriptor, shard.size)
        except OSError as error:
            self.release()
            raise WriteError(self.path, error) from error
        self.adopt(ranges, known)
        self.write(memoryview(shard.header), 0)

    def adopt(self, ranges: Sequence[tuple[int, int]], known: Mapping[str, str]) -> None:
        """Count bytes as written that are on the disk; `known`: digests of chunks among them."""
        for begin, end in ranges:
            for chunk in self._completed(begin, end):
                self._restore(chunk, known)

    def _restore(self, chunk: int, known: Mapping[str, str]) -> None:
        """Take the digest of a chunk that an earlier run completed from what that run noted, else from the disk."""
        if self._digests is not None:
            # Notes of sha256 are those of earlier versions, which named no hash.
            name, _, noted = f"sha256:{known.get(str(chunk), '')}".rpartition(":")
            is_ours = noted and name.rpartition(":")[2] == self._hash
            self._digests[chunk] = bytes.fromhex(noted) if is_ours else self._digest(chunk)
            self._told.add(chunk)

    def write(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise WriteError(self.path, error) from error
        self._is_dirty = True
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
        assert self._hash is not None
        return hash_range(self._descriptor, begin, min(begin + CHUNK_BYTES, self.shard.size), self._hash)

    def summary(self) -> dict[str, int | str]:
        entry: dict[str, int | str] = {"bytes": self.shard.size}
        if self._digests is not None and self._hash is not None:
            entry[DIGEST_KEYS[self._hash]] = _join(self._digests, self._hash)
        return entry

    def sync(self) -> dict[str, str]:
        """See `CheckpointWriter.sync`."""
        complete = [(chunk, digest) for chunk, digest in enumerate(self._digests or []) if digest]
        if self._is_dirty:
            self._is_dirty = False  # before: what is written meanwhile waits for the next time
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise WriteError(self.path, error) from error
            if self._drops:
                self._drop(complete=[chunk for chunk, missing in enumerate(self._missing) if not missing])
        tag = "" if self._hash == "sha256" else f"{self._hash}:"
        new = {str(chunk): tag + digest.hex() for chunk, digest in complete if chunk not in self._told}
        self._told.update(map(int, new))
        return new

    def _drop(self, complete: Sequence[int]) -> None:
        for chunk in set(complete) - self._dropped:
            os.posix_fadvise(self._descriptor, chunk * CHUNK_BYTES, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
        self._dropped.update(complete)

    def close(self) -> None:
        assert not any(self._missing), f"{self.path.name}: {sum(self._missing)} bytes were never written"
        self.sync()
        self.release()

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hash_range(descriptor: int, begin: int, end: int, name: HashName) -> bytes:
    """The digest of the bytes `begin` to `end` of an open file, read 1 MiB at a time."""
    digest = HASHES[name]()
    buffer = memoryview(bytearray(READ_BACK_BYTES))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: min(READ_BACK_BYTES, end - begin)]], begin)
        if count == 0:
            break  # shorter than it was
        digest.update(buffer[:count])
        begin += count
    return bytes(digest.digest())


def _join(chunks: Sequence[bytes], name: HashName) -> str:
    digest = HASHES[name]()
    digest.update(b"".join(chunks))
    return str(digest.hexdigest())


def chunked_digest(path: Path, name: HashName) -> str:
    """The digest of a file in merge_recipe.json, which threads can take in parts: that of the digests of its 64 MiB chunks."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        chunks = [
            hash_range(descriptor, begin, min(begin + CHUNK_BYTES, size), name) for begin in range(0, size, CHUNK_BYTES)
        ]
    finally:
        os.close(descriptor)
    return _join(chunks, name)
