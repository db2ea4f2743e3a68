"""What a command does to its own process before torch is imported; importing this imports nothing."""

from __future__ import annotations

from collections.abc import MutableMapping

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Threads that have nothing to do sleep. By default they spin, and where other programs want the same cores a pass of two
threads, which wait for each other thousands of times, becomes slower than one of a single thread."""


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has said how they wait.

    Args:
        environment: `os.environ`, before torch is imported, which reads it once.
    """
    if not WAITING.keys() & environment.keys():
        environment.update(WAITING)
