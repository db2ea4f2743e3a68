"""The system calls that Python 3.11 has no function for, through ctypes. Linux only; importing works anywhere."""

from __future__ import annotations

import ctypes
import os
from typing import Any

MACHINE = os.uname().machine

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a system call, or an OSError that says which call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: Any) -> int:
    """A system call by its number; integers are passed as 64 bits."""
    wide = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    return check(libc.syscall(ctypes.c_long(number), *wide), what)


def prctl(option: int, value: int) -> None:
    """Set an attribute of the calling process (or thread) that takes one number."""
    zero = ctypes.c_ulong(0)
    check(libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl({option}, {value})")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones; a new process namespace is for the children."""
    check(libc.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), os.fsencode(target), kind.encode() if kind else None, ctypes.c_ulong(flags))
    check(libc.mount(*arguments, options.encode()), f"mount {source} on {target}")


def restrict_mount(target: str, attributes: int, flags: int) -> None:
    """Add restrictions to the mount at `target`, and with AT_RECURSIVE to all mounts below it (Linux 5.12 on)."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, userns fd
    path, size = os.fsencode(target), ctypes.sizeof(wanted)
    syscall(f"mount_setattr {target}", SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(wanted), size)


def pivot_root(new_root: str) -> None:
    """Make the mount at `new_root` the root and let go of the old one."""
    os.chdir(new_root)
    # pivot_root(2): with "." twice the old root comes to lie on top of the new one, from where it is taken off.
    check(libc.pivot_root(b".", b"."), f"pivot_root {new_root}")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def map_identity(inside: int, user: int, group: int) -> None:
    """In a user namespace just made: `inside` is the name there of the outer `user` and `group`; no other exists."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {user} 1"),
        ("gid_map", f"{inside} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def drop_root(user: int) -> None:
    """Become an unprivileged user for good; a caller who is not root stays who he is.

    Raises: OSError: not permitted, or some part of root would be left.
    """
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if 0 in os.getresuid():
        raise PermissionError("still root after dropping root")


def drop_capabilities() -> None:
    """Give up every capability, also those a namespace gave, and every way to get one back by exec."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check(libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
