"""Keep hidden states that wait for their next layer: in the machine's memory while there is room, else on disk; never on a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from checkpoints.errors import InputError, WriteError
from checkpoints.settings import setting
from forward.steps import Run, tensors_in

SMALL_BYTES = 1 << 16
"""What is smaller stays in memory: masks, tables of positions."""


class Shelf:
    """Puts away what a run holds while it waits, and brings it back.

    Args:
        room_bytes: of memory for all runs together.
        folder: for what does not fit; None where nothing may be written.
    """

    def __init__(self, room_bytes: int, folder: Path | None):
        self._room_bytes = room_bytes
        self._folder = folder
        self._used_bytes = 0
        self._away: dict[int, list[tuple[torch.UntypedStorage, int, Path | torch.Tensor | None]]] = {}
        self._known: dict[int, list[StorageWeakRef]] = {}

    @property
    def is_in_memory(self) -> bool:
        """Whether nothing is on disk."""
        return not any(isinstance(place, Path) for away in self._away.values() for _, _, place in away)

    def check_room(self, run: Run, runs: int) -> None:
        """Raise InputError where so many runs as this one fit neither in memory nor on disk."""
        needed = sum(storage.nbytes() for storage in _large(run)) * runs
        if needed <= self._room_bytes:
            return
        free = shutil.disk_usage(_existing(self._folder)).free if self._folder else 0
        if needed - self._room_bytes > free:
            raise InputError(
                f"calibration: the hidden states take {needed:,} bytes, and there is room for {self._room_bytes:,} in memory and {free:,} "
                f"on disk. Use less text ({setting('n_samples')}), or free space."
            )

    def put(self, run: Run) -> None:
        """Put away what a run that waits holds, as far as there is no room in memory."""
        away: list[tuple[torch.UntypedStorage, int, Path | torch.Tensor | None]] = []
        storages = self._held(run)
        for storage in storages:
            size = storage.nbytes()
            place: Path | torch.Tensor | None = None  # it stays where it is
            if self._used_bytes + size <= self._room_bytes or self._folder is None:
                self._used_bytes += size
                if is_elsewhere(storage):
                    place = _bytes_of(storage).to("cpu", copy=True)
            else:
                place = self._folder / f"hidden-{id(run)}-{len(away)}"
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    _bytes_of(storage).clone().cpu().numpy().tofile(place)  # a copy: what NumPy looks at keeps its size
                except OSError as error:
                    raise WriteError(place, error) from error
            if place is not None:
                storage.resize_(0)  # the tensors stay, their numbers go
            away.append((storage, size, place))
        self._away[id(run)] = away
        self._known[id(run)] = [StorageWeakRef(storage) for storage in storages]

    def take(self, run: Run) -> None:
        """Bring back what a run holds."""
        for storage, size, place in self._away.pop(id(run), []):
            if not isinstance(place, Path):
                self._used_bytes -= size
            if place is None:
                continue
            storage.resize_(size)
            if isinstance(place, Path):
                _bytes_of(storage).copy_(torch.from_file(str(place), size=size, dtype=torch.uint8))
                place.unlink()
            else:
                _bytes_of(storage).copy_(place)

    def _held(self, run: Run) -> list[torch.UntypedStorage]:
        """What a run's next layer is called with, and what it was called with before and holds still: its embeddings, mostly."""
        storages = {storage._cdata: storage for storage in _large(run)}
        for known in self._known.pop(id(run), []):
            storage = torch.UntypedStorage._new_with_weak_ptr(known.cdata)
            if storage is not None:
                storages.setdefault(storage._cdata, storage)
        return list(storages.values())


def is_elsewhere(storage: torch.UntypedStorage) -> bool:
    """Whether it is not in the machine's memory, but on a GPU, which has room for one batch alone."""
    return storage.device.type != "cpu"


def _large(run: Run) -> list[torch.UntypedStorage]:
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors_in((run.args, run.kwargs)):
        storage: Any = tensor.untyped_storage()
        if storage.nbytes() >= SMALL_BYTES and tensor.is_floating_point() and tensor.shape[:1] == run.tokens.shape[:1]:
            storages[storage._cdata] = storage
    return list(storages.values())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())
