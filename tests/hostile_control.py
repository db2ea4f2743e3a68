"""The control of tests/test_sandbox.py: hostile programs without the layers that stop them, inside an outer jail.

Runs as the first process of a room (own processes, network, IPC, files; nothing of the machine can be written), as an
unprivileged user, with its targets in a small file system in memory. It checks all this before the first program.
For each program it prints one line of JSON: {"name", "without": effects with all layers off, "with": {layer: effects}}.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import secrets
import socket
import struct
import tempfile
import time

from evaluation.jail import kernel, landlock, room, view
from evaluation.jail.host import Jail, JailError
from evaluation.jail.settings import LANDLOCK, LAYERS, NOBODY, Settings
from tests.hostile_programs import CONTROLLED, MEMORY_BYTES, SILENCE, Hostile
from tests.hostile_world import World, kill_processes_named

SCRATCH = "/scratch"
SCRATCH_BYTES = 256 << 20
PROCESSES = 60
USERS = 200_000  # from here on nobody has an account
PATIENCE_S = 0.1
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
NAMESPACE_KINDS = ("pid", "net", "mnt", "ipc")


def outer_namespaces() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACE_KINDS}


def main(arguments: list[str]) -> None:
    """Check that this is an outer jail, and run every control in it.

    Args:
        arguments: the namespaces of the machine as JSON, and, where a room is still to be made, its Settings as JSON.
    """
    machine = json.loads(arguments[0])
    if len(arguments) > 1:
        room.build(Settings.from_json(arguments[1]))
        options = f"size={SCRATCH_BYTES},mode=1777"
        with socket.socket() as any_socket:  # bwrap does this itself: the loopback device of a new network is off
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
        kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID)
        kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    # Not nobody, if there is a choice: other processes of nobody would count against the limit below.
    kernel.drop_root(USERS + secrets.randbelow(USERS))
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    here = outer_namespaces()
    assert all(here[kind] != machine[kind] for kind in NAMESPACE_KINDS), "not in namespaces of its own"
    assert os.getpid() == 1, "not the room's first process"
    assert min(*os.getresuid(), *os.getresgid()) >= NOBODY, "not as an unprivileged user"
    assert not any(os.access(folder, os.W_OK) for folder in ("/", "/usr", "/tmp")), "not in a room"
    tempfile.tempdir = SCRATCH
    with World() as world, Jails(world) as jails:
        for program in CONTROLLED:
            held_by = [layer for layer in program.held_by if layer != LANDLOCK or landlock.abi() >= program.landlock]
            started = time.monotonic()
            row: dict[str, object] = {
                "name": program.name,
                "without": sorted(jails.effects(program, ())),
                "with": {layer: sorted(jails.effects(program, (layer,))) for layer in held_by},
            }
            row["s"] = round(time.monotonic() - started, 2)
            print(json.dumps(row), flush=True)


class Jails:
    """Jails with few layers, one for each set of them, started when first needed and again when one broke."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._started: dict[tuple[str, ...], Jail] = {}

    def __enter__(self) -> Jails:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._output.close()

    def effects(self, program: Hostile, layers: tuple[str, ...]) -> set[str]:
        """What a program does to the world when only the given layers hold it; "jail" if it broke its jail."""
        world = self._world
        world.renew()
        os.ftruncate(self._output.fileno(), 0)
        found: set[str] = set()
        try:
            jail = self._started.get(layers) or self._start(layers)
            outcome = jail.attempt(world.constants() + program.source, program.test, program.timeout_s)
            found = world.effects(outcome.detail, PATIENCE_S if program.effect == "killed" else 0)
            jail.attempt("", "", program.timeout_s)
        except JailError:
            found |= world.effects(patience_s=PATIENCE_S) | {"jail"}
        if os.fstat(self._output.fileno()).st_size > 1 << 20:
            found.add("output")
        if found & {"jail", "left"}:
            self._end()
        return found

    def _start(self, layers: tuple[str, ...]) -> Jail:
        on = tuple(layer for layer in LAYERS if layer in layers)
        # With namespaces a place to mount on, without them the folder of the runs' folders.
        folder = tempfile.mkdtemp(dir=SCRATCH)
        settings = Settings(on, MEMORY_BYTES, folder, (*view.system()[0], "/lib", "/lib64"))
        jail = Jail(view.python(), settings, stdout=None if SILENCE in layers else self._output)
        self._started[layers] = jail
        return jail

    def _end(self) -> None:
        """End the jails and whatever a program left."""
        for jail in self._started.values():
            jail.close()
        self._started.clear()
        kill_processes_named(self._world.tag)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # the first process of a room inherits every orphan
                pass
