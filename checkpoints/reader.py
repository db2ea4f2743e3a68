"""Open a checkpoint folder as a source: safetensors or `pytorch_model.bin`, one file or many."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoints.errors import InputError, cannot_open
from checkpoints.files import is_plain_name, parse_json
from checkpoints.safetensors_format import StoredTensor, pread_exactly, read_header
from checkpoints.sidecars import SideFiles, list_module_weights
from checkpoints.source import READ_ELEMENTS, Source, TensorInfo, TensorRef

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"

LONGEST_NAME = 1000
"""Characters of a tensor's name. Python makes no number of some thousand digits, for one."""
LFS_POINTER = b"version https://git-lfs"


def find_weight_files(
    folder: Path, label: str, names: Sequence[str] = WEIGHT_FILES
) -> tuple[list[Path], Mapping[str, str] | None]:
    """The weight files of a checkpoint folder, in order of their names, and the index's weight map where there is one.

    Args:
        names: what to look for, the first that is there counts.

    Raises: InputError: no weights in the folder; an index that is damaged, or names a file that is missing or lies outside.
    """
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{label}: expected {' or '.join(name for name in names if not name.endswith('.json'))}{' or an index of shards' * (names == WEIGHT_FILES)} in {folder}, got {there}. Give the folder of the weights."
        )
    if file.suffix != ".json":
        return [file], None
    try:
        weight_map = parse_json(file.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(
            f"{label}: {file.name}: expected a JSON object with a weight_map, got something else. Download it again."
        ) from None
    for name in names:
        if not is_plain_name(name):
            raise InputError(
                f"{label}: {file.name}: expected plain names of files in its folder, got '{name:.200}', which may lie outside. "
                "Do not trust this checkpoint."
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{label}: {file.name} names files that are not there: {', '.join(missing)}. Download them.")
    return [folder / name for name in names], weight_map


def is_adapter(folder: Path, files: Sequence[str]) -> bool:
    """Whether what was found in a folder, or on the hub, is an adapter: its config, and no whole weights."""
    return (folder / ADAPTER_CONFIG).is_file() and all(name.startswith("adapter_model.") for name in files)


def open_checkpoint(folder: Path, label: str, names: Sequence[str] = WEIGHT_FILES) -> Checkpoint:
    """Open a folder's weights, and of a whole model those of the modules behind it; reads headers only.

    Args:
        folder: a checkpoint as `save_pretrained` or the hub lays it out.
        label: how messages name the model.
        names: its weight files may have, see `find_weight_files`.

    Raises: InputError: no weights, a damaged file, an index and files that disagree, a pickle that is not plain tensors.
    """
    paths, weight_map = find_weight_files(folder, label, names)
    files: list[WeightFile] = []
    try:
        for path in paths:
            files.append(_open_file(path, label, path.name))
        if names is WEIGHT_FILES:
            files += [_open_file(folder / name, label, name) for name in list_module_weights(folder)]
        checkpoint = Checkpoint(folder, label, files)
        if weight_map is not None:
            _check_index(
                weight_map, {name: file.name for file in files if not file.prefix for name in file.tensors}, label
            )
        if not checkpoint.tensors:
            raise InputError(
                f"{label}: expected tensors, got none in {_names(paths) or 'its index'}. Download it again."
            )
    except BaseException:
        for file in files:
            file.close()
        raise
    return checkpoint


def open_tensor_file(path: Path, label: str) -> Checkpoint:
    """Open a safetensors file that stands by itself; reads its header only.

    Raises: InputError: a damaged file, or one without tensors.
    """
    file = _open_file(path, label, path.name)
    try:
        checkpoint = Checkpoint(path.resolve(), label, [file])
        if not checkpoint.tensors:
            raise InputError(f"{label}: expected tensors, got none. Download it again.")
    except BaseException:
        file.close()
        raise
    return checkpoint


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _check_index(weight_map: Mapping[str, str], in_files: Mapping[str, str], label: str) -> None:
    """Raise InputError where the index and the files' own headers tell different stories."""
    for name in sorted(weight_map.keys() | in_files.keys()):
        if weight_map.get(name) != in_files.get(name):
            raise InputError(
                f"{label}: {name}: the index puts it in {weight_map.get(name, 'no file')}, "
                f"the files' headers in {in_files.get(name, 'no file')}. Download the index and the files again."
            )


class Checkpoint:
    """A folder's tensors as a source (see `Source`), and the files they lie in.

    Args:
        folder: of the checkpoint.
        label: how messages name it.
        files: its weight files, open.

    Attributes:
        modules: the weights of modules behind the model, by folder and name (`2_Dense/linear.weight`), mostly none.

    Raises: InputError: two files hold a tensor of one name; a name that is none.
    """

    def __init__(self, folder: Path, label: str, files: Sequence[WeightFile]):
        self.folder = folder
        self.label = label
        self.files: Sequence[WeightFile] = sorted(files, key=lambda file: file.name)
        self._owner: dict[str, WeightFile] = {}
        for file in self.files:
            for own in file.tensors:
                if not own.isprintable() or len(own) > LONGEST_NAME:
                    raise InputError(
                        f"{label}: {file.name}: expected names of tensors, got {own!r:.100}. The file is damaged; download it again."
                    )
                name = file.prefix + own
                if name in self._owner:
                    other = self._owner[name].name
                    raise InputError(
                        f"{label}: the tensor {name} is in {other} and in {file.name}. Remove one of them."
                    )
                self._owner[name] = file
        infos = {name: self._info(name) for name in sorted(self._owner)}
        outside = {name for name, file in self._owner.items() if file.prefix}
        self.tensors: Mapping[str, TensorInfo] = {name: info for name, info in infos.items() if name not in outside}
        self.modules: Source = _Part(self, {name: info for name, info in infos.items() if name in outside})

    def _info(self, name: str) -> TensorInfo:
        file = self._owner[name]
        return file.tensors[name.removeprefix(file.prefix)]

    @property
    def is_here(self) -> bool:
        """Whether its numbers can be read: False where only the headers of a hub model were."""
        return not any(isinstance(file, RemoteFile) for file in self.files)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; of the modules' tensors too."""
        file = self._owner[name]
        return file.read(name.removeprefix(file.prefix), start, stop, buffer)

    def place_in_file(self, name: str) -> tuple[int, int] | None:
        """See `TensorRef.place_in_file`."""
        file = self._owner[name]
        return file.place_in_file(name.removeprefix(file.prefix))

    def adjust(self, files: SideFiles) -> None:
        """See `Weights`: they are what its files hold."""

    def check_unchanged(self) -> None:
        """Raise InputError where a file is not the one that was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close every file; reading afterwards is an error."""
        for file in self.files:
            file.close()


class _Part:
    """Some tensors of a checkpoint as a source of their own."""

    def __init__(self, whole: Checkpoint, tensors: Mapping[str, TensorInfo]):
        self.label, self.tensors, self._whole = whole.label, tensors, whole

    @property
    def is_here(self) -> bool:
        """See `Checkpoint`."""
        return self._whole.is_here

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        return self._whole.read(name, start, stop, buffer)

    def place_in_file(self, name: str) -> tuple[int, int] | None:
        """See `TensorRef.place_in_file`."""
        return self._whole.place_in_file(name)


class WeightFile:
    """One open weight file, and what it looked like when it was opened.

    Attributes:
        name: relative to the checkpoint's folder, `2_Dense/model.safetensors` say.
        prefix: what tensors of a file in a subfolder are called by: the subfolder and `/`; empty for the model's own.
    """

    def __init__(self, path: Path, label: str, name: str, status: os.stat_result | None = None):
        self.path = path
        self.name = name
        self.prefix = name[: name.rfind("/") + 1]
        self.where = f"{label}: {name}"
        self.tensors: Mapping[str, TensorInfo] = {}
        self.size = status.st_size if status else 0
        self.mtime_ns = status.st_mtime_ns if status else 0

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        raise AssertionError("each kind of file reads its own way")

    def place_in_file(self, name: str) -> tuple[int, int] | None:
        """See `TensorRef.place_in_file`."""
        return None

    def check_unchanged(self) -> None:
        """Raise InputError where the file is not the one that was opened, by size and time of change."""
        status = self.path.stat() if self.path.exists() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise InputError(
                f"{self.where}: the file changed while it was read. Run the command again when it is at rest."
            )

    def close(self) -> None:
        """Close what is open."""


class SafetensorsFile(WeightFile):
    """Reads with `pread`: half the time of mmap, and the pages stay out of the process's memory."""

    def __init__(self, path: Path, label: str, name: str):
        super().__init__(path, label, name, path.stat())
        self._stored: dict[str, StoredTensor] = read_header(path, label, name)
        self.tensors = {name: stored.info for name, stored in self._stored.items()}
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`."""
        stored = self._stored[name]
        itemsize = stored.info.dtype.itemsize
        raw = buffer[: (stop - start) * itemsize]
        pread_exactly(self._descriptor, raw.numpy().data, stored.offset + start * itemsize, f"{self.where}: {name}")
        return raw.view(stored.info.dtype)

    def place_in_file(self, name: str) -> tuple[int, int] | None:
        """See `TensorRef.place_in_file`."""
        return self._descriptor, self._stored[name].offset

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class PickleFile(WeightFile):
    """`pytorch_model.bin`; see `pickle_format`."""

    def __init__(self, path: Path, label: str, name: str):
        from checkpoints.pickle_format import load_pickle

        super().__init__(path, label, name, path.stat())
        self._loaded = load_pickle(path, self.where)
        self.tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._loaded.items()}

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `Source.read`; only the rows asked for are made contiguous."""
        tensor = self._loaded[name]
        if tensor.ndim < 2:
            return tensor.reshape(-1)[start:stop]
        per_row = tensor[0].numel()
        first = start // per_row
        rows = tensor[first : -(-stop // per_row)].reshape(-1)
        return rows[start - first * per_row : stop - first * per_row]

    def close(self) -> None:
        """Let go of the mapped tensors."""
        self._loaded = {}


class RemoteFile(WeightFile):
    """A file on the hub of which only the header was read. What a plan asks of it can be told; its numbers cannot."""

    def __init__(self, name: str, label: str, size: int, stored: Mapping[str, StoredTensor]):
        super().__init__(Path(name), label, name)
        self.size = size
        self.tensors = {key: place.info for key, place in stored.items()}


def _open_file(path: Path, label: str, name: str) -> WeightFile:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"{label}: {name}: expected weights, got the pointer that git puts in their place. Run `git lfs pull` in its folder."
                )
        return (SafetensorsFile if path.suffix == ".safetensors" else PickleFile)(path, label, name)
    except OSError as error:
        raise cannot_open(f"{label}: {name}", error) from error


def read_tensor(source: Source, name: str) -> torch.Tensor:
    """One whole tensor in its stored dtype and shape: for small tensors and for tests, not for the stream."""
    info = source.tensors[name]
    if info.numel == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    return source.read(name, 0, info.numel, torch.empty(info.numel * 8, dtype=torch.uint8)).clone().view(info.shape)


def equal_tensors(source: Source, first: str, second: str) -> bool:
    """Whether two tensors of one source hold the same numbers in the same shape; see `same_values`."""
    return same_values(TensorRef(source, first), TensorRef(source, second))


def same_values(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors hold the same numbers in the same shape, compared a piece at a time until one differs."""
    if first.info.shape != second.info.shape:
        return False
    if not all(getattr(ref.source, "is_here", True) for ref in (first, second)):
        return True  # a plan from headers alone hopes for the best; the numbers are compared before anything is written
    buffers = [torch.empty(READ_ELEMENTS * 8, dtype=torch.uint8) for _ in range(2)]
    for start in range(0, first.info.numel, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, first.info.numel)
        values, other = (ref.read(start, stop, buffer) for ref, buffer in zip((first, second), buffers, strict=True))
        if not torch.equal(values.double(), other.double()):
            return False
    return True
