"""Landlock: a process limits itself and its children to listed paths, without any privilege (Linux 5.13 on).

Handled are all rights the running kernel knows: files (ABI 1, 2 rename, 3 truncate, 5 device ioctl), TCP (4), abstract
unix sockets and signals (6). Not by Landlock: stat, chmod and the like, UDP, chdir; seccomp.py and the room see to
those.
Source: Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h of Linux 6.18.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from . import kernel

SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
TCP = 0b11  # bind, connect
SCOPES = 0b11  # abstract unix sockets, signals


def abi() -> int:
    """The version of Landlock in the running kernel, 0 where there is none."""
    try:
        return kernel.syscall("landlock", SYS_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except (OSError, AttributeError):
        return 0


def known_rights(version: int) -> int:
    """All rights on files that a version knows."""
    bits = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    return (1 << bits) - 1


def restrict(readable: Iterable[int], writable: Iterable[str]) -> None:
    """Limit the calling process to reading `readable` and to anything but devices and programs in `writable`.

    Args:
        readable: descriptors of files and folders, opened with O_PATH.
        writable: folders, in which files may be made, changed and removed, and single files, to read and write.
    Raises: OSError: no Landlock, or a path that cannot be opened.
    """
    version = abi()
    handled = known_rights(version)
    # struct landlock_ruleset_attr grew with the versions; an older kernel refuses the longer one.
    attributes = (ctypes.c_uint64 * 3)(handled, TCP, SCOPES)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = kernel.syscall("landlock_create_ruleset", SYS_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    everything = handled & ~(EXECUTE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    opened = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in writable]
    for descriptor in readable:
        _allow(ruleset, descriptor, READ_FILE | READ_DIR)
    for descriptor in opened:
        _allow(ruleset, descriptor, everything)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.syscall("landlock_restrict_self", SYS_RESTRICT_SELF, ruleset, 0)
    for descriptor in (*opened, ruleset):
        os.close(descriptor)


def _allow(ruleset: int, path: int, rights: int) -> None:
    """Add the rights on a path and all below it; on a file, those of them that files have."""
    if not stat.S_ISDIR(os.fstat(path).st_mode):
        rights &= ON_FILES
    # struct landlock_path_beneath_attr is packed: 8 bytes of rights, 4 of the descriptor.
    rule = ctypes.create_string_buffer(rights.to_bytes(8, "little") + path.to_bytes(4, "little"), 12)
    kernel.syscall("landlock_add_rule", SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
