"""Have the system read what is needed next while a block is worked on, and drop from its memory what is written and needs no place there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoints.source import TensorRef
from streaming.blocks import Region

AHEAD_BYTES = 64 << 20
"""Of all inputs together that are asked for before they are needed: a disk's queue is full with less, and memory holds it."""
_HAS_ADVICE = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")


def read_ahead(refs: Sequence[TensorRef], regions: Sequence[Region]) -> Iterator[Region]:
    """The regions, each after those that follow it have been asked for, in the order of each file, where they are not in memory."""
    places = [(place, ref.info.dtype.itemsize) for ref in refs if (place := ref.place_in_file()) is not None]
    if not _HAS_ADVICE or not places:
        yield from regions
        return
    asked, bytes_ahead = 0, 0
    each = sum(itemsize for _, itemsize in places)
    for at, region in enumerate(regions):
        asked = max(asked, at)
        while asked < len(regions) and bytes_ahead < AHEAD_BYTES:
            for (descriptor, offset), itemsize in places:
                _ask_for(descriptor, offset + regions[asked].start * itemsize, regions[asked].numel * itemsize)
            bytes_ahead += regions[asked].numel * each
            asked += 1
        yield region
        bytes_ahead -= region.numel * each


def _ask_for(descriptor: int, begin: int, count: int) -> None:
    """Start reading a range of a file, unless its end is in memory: looking costs a thousandth of asking."""
    try:
        os.preadv(descriptor, [bytearray(1)], begin + count - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        os.posix_fadvise(descriptor, begin, count, os.POSIX_FADV_WILLNEED)
    except OSError:  # a file system that knows neither
        return


def fits_in_memory(nbytes: int) -> bool:
    """Whether the system can keep so many bytes of files in memory; True where it does not say."""
    try:
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    except (OSError, IndexError):
        return True
    return nbytes < int(available) * 1024
