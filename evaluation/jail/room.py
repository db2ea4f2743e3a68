"""A room: a view of the system with the system's libraries, Python, numpy, four devices, and no way to write.

`bubblewrap` gives the command that makes one with bwrap; `build` makes the same one without it. Neither shows a home,
a temporary folder, /etc, /run or /sys. Both have their own processes, network, IPC and host name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import PurePath

from . import kernel
from .settings import NOBODY, Settings

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
FOLDER = "/tmp"  # each run mounts its own here; the room's is empty and cannot be written
ROOM_OPTIONS = "size=1m,mode=0755"


def bubblewrap(executable: str, binds: Iterable[tuple[str, str]], links: Iterable[tuple[str, str]]) -> list[str]:
    """The start of a command line that runs the rest of it in a room.

    Called by root, bwrap needs no user namespace, and what it starts keeps the two capabilities with which the
    zygote becomes an unprivileged user; called by anybody else, it makes one in which the caller is `nobody`.
    """
    command = [executable, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    binds = list(binds)
    # Folders on the way to what is shown: bwrap would make them closed to everybody but root.
    for folder in sorted({str(parent) for _, inside in binds for parent in PurePath(inside).parents} - {"/"}):
        command += ["--dir", folder]
    for outside, inside in binds:
        command += ["--ro-bind", outside, inside]
    for inside, target in links:
        command += ["--symlink", target, inside]
    command += ["--dir", "/dev"]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--proc", "/proc", "--dir", FOLDER, "--remount-ro", "/", "--chdir", "/"]


def build(settings: Settings) -> None:
    """Move the calling process, which must have one thread, into a room of its own; as its first process.

    The process that called stays behind outside, holds nothing, and ends when the room does; if it is killed, so is
    everything in the room. Root makes the room without a user namespace, anybody else in one as `nobody`.
    Raises: OSError: a namespace or a mount is not permitted here.
    """
    user, group = os.getuid(), os.getgid()
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(flags if user == 0 else flags | kernel.CLONE_NEWUSER)
    if user != 0:
        kernel.map_identity(NOBODY, user, group)
    first = os.fork()
    if first:
        os.closerange(0, 256)
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", settings.root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, ROOM_OPTIONS)
    read_only = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
    for outside, inside in settings.binds:
        _show(settings.root, outside, inside, read_only | kernel.MOUNT_ATTR_NODEV)
    for inside, target in settings.links:
        os.symlink(target, settings.root + inside)
    for device in DEVICES:
        _show(settings.root, device, device, read_only)
    # The zygote writes its children's user maps; for them /proc is covered.
    _show(settings.root, "/proc", "/proc", kernel.MOUNT_ATTR_NOSUID)
    os.makedirs(settings.root + FOLDER)
    kernel.pivot_root(settings.root)
    kernel.restrict_mount("/", kernel.MOUNT_ATTR_RDONLY, 0)


def _show(root: str, outside: str, inside: str, attributes: int) -> None:
    """Bind `outside` into the room, onto a folder or an empty file made for it."""
    target = root + inside
    if os.path.isdir(outside):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.mount(outside, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.restrict_mount(target, attributes, kernel.AT_RECURSIVE)
