"""Reading ahead: what is asked of the system, when, in which order; what never is."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch

from checkpoints.source import TensorInfo, TensorRef
from streaming import ahead
from streaming.blocks import Region, TensorSpec, tile

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
SPEC = TensorSpec("w", (40, 25))


class Stored:
    """A source whose tensor `w` begins at a byte of a file, or in none."""

    def __init__(self, place: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16):
        self.label, self.tensors = "stored", {"w": TensorInfo(dtype, SPEC.shape)}
        self._place = place

    def place_in_file(self, name: str) -> tuple[int, int] | None:
        return self._place


class System:
    """Notes what is asked of it; `cold` says whether a byte of a file is not in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cold: bool = True):
        self.asked: list[tuple[int, int, int]] = []
        self.looked: list[tuple[int, int]] = []
        self.cold = cold
        monkeypatch.setattr(os, "preadv", self.look)
        monkeypatch.setattr(os, "posix_fadvise", self.advise)

    def look(self, descriptor: int, buffers: list[bytearray], at: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        self.looked.append((descriptor, at))
        if self.cold:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return len(buffers[0])

    def advise(self, descriptor: int, begin: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.asked.append((descriptor, begin, count))


def refs(*places: tuple[int, int] | None) -> list[TensorRef]:
    return [TensorRef(Stored(place), "w") for place in places]


def regions() -> list[Region]:
    return list(tile(SPEC, 100))


def test_every_byte_is_asked_for_once_in_the_order_of_each_file(monkeypatch: pytest.MonkeyPatch):
    system = System(monkeypatch)
    assert list(ahead.read_ahead(refs((7, 1000), (8, 64)), regions())) == regions()
    for descriptor, offset in ((7, 1000), (8, 64)):
        ranges = [(begin, begin + count) for at, begin, count in system.asked if at == descriptor]
        assert ranges[0][0] == offset
        assert ranges[-1][1] == offset + SPEC.numel * 2
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


def test_so_much_is_under_way_and_no_more(monkeypatch: pytest.MonkeyPatch):
    """A region is asked for before it is given, and those behind it up to the bytes that all inputs together may be ahead."""
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 1000)
    system = System(monkeypatch)
    for number, region in enumerate(ahead.read_ahead(refs((7, 0), (8, 0)), regions())):
        ends = [begin + count for descriptor, begin, count in system.asked if descriptor == 7]
        assert max(ends) >= 2 * region.stop
        under_way = sum(count for _, _, count in system.asked) - 2 * 2 * region.start
        assert under_way <= 1000 + 2 * 2 * 100, number
        assert under_way >= min(1000, 2 * 2 * (SPEC.numel - region.start))


def test_what_is_in_memory_is_looked_at_and_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    system = System(monkeypatch, cold=False)
    assert list(ahead.read_ahead(refs((7, 10)), regions())) == regions()
    assert system.asked == []
    assert [at for _, at in system.looked] == [10 + 2 * region.stop - 1 for region in regions()]


def test_sources_that_are_in_no_file_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    system = System(monkeypatch)
    assert list(ahead.read_ahead(refs(None), regions())) == regions()
    assert system.looked == []
    assert list(ahead.read_ahead(refs(None, (8, 0)), regions())) == regions()
    assert {descriptor for descriptor, _, _ in system.asked} == {8}


def test_file_systems_that_know_no_such_thing(monkeypatch: pytest.MonkeyPatch):
    system = System(monkeypatch)

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "preadv", refuse)
    assert list(ahead.read_ahead(refs((7, 0)), regions())) == regions()
    assert system.asked == []


def test_a_real_file(tmp_path: Path):
    """Nothing that is asked changes what is read."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4096 + SPEC.numel * 2))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert list(ahead.read_ahead(refs((descriptor, 4096)), regions())) == regions()
        assert os.pread(descriptor, 1 << 20, 0) == path.read_bytes()
    finally:
        os.close(descriptor)


def test_whether_files_fit_into_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 99 kB\nMemAvailable:   10 kB\nBuffers: 1 kB\n")
    assert ahead.fits_in_memory(10 * 1024 - 1)
    assert not ahead.fits_in_memory(10 * 1024)
    monkeypatch.setattr(Path, "read_text", lambda self: "nothing of it")
    assert ahead.fits_in_memory(1 << 60)
