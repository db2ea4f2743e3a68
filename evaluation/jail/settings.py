"""What the outside tells a zygote when it starts it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

# The layers that a run locks itself up with, in this order. Each is off where its name is not in Settings.layers.
NAMESPACES = "namespaces"  # own user, process, mount, network and IPC namespaces; a small file system for its folder
LANDLOCK = "landlock"
SECCOMP = "seccomp"
LIMITS = "limits"
LAYERS = (NAMESPACES, LANDLOCK, SECCOMP, LIMITS)

NOBODY = 65534
FIRST_DESCRIPTOR = 16  # of the hidden folders; below it a run has its own few


def descriptor_path(index: int) -> str:
    """Where a process of the zygote finds hidden folder number `index`: in a descriptor that was opened by root."""
    return f"/proc/self/fd/{FIRST_DESCRIPTOR + index}"


@dataclass(frozen=True)
class Settings:
    """Everything but the programs; plain values, so that it travels as JSON.

    Attributes:
        layers: those of LAYERS that are on.
        memory_bytes: address space of a program.
        folder: with namespaces the place where each run's own file system is mounted; else a folder of the zygote's
            user, where each run gets a folder of its own.
        readable: what a program may read, besides its folder.
        library: folders that become `sys.path`, after the standard library.
        hidden: folders among these that only root can get to; see `descriptor_path`.
        root: an empty folder on which the zygote builds its room; empty where it was started in one, or has none.
        binds: (outside, inside) of what a room shows.
        links: (inside, target) of symbolic links in a room.
    """

    layers: tuple[str, ...]
    memory_bytes: int
    folder: str
    readable: tuple[str, ...] = ()
    library: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    root: str = ""
    binds: tuple[tuple[str, str], ...] = field(default=())
    links: tuple[tuple[str, str], ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        return Settings(**json.loads(text))
