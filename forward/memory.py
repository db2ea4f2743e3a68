"""Ask how much memory there is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def available_bytes() -> int:
    """Bytes that this process can still allocate without swapping: the machine's, or its control group's where that is less."""
    limits = [1 << 62]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, usage in GROUPS:
        with suppress(OSError, ValueError):  # no limit reads "max"
            group = Path("/sys/fs/cgroup")
            limits.append(int((group / limit).read_text()) - int((group / usage).read_text()))
    return max(0, min(limits))
