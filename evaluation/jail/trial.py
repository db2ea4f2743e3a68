"""A harmless trial of a jail: whether it really holds, found by attempts that would do no harm if it did not."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from .host import Jail, JailError

TIME_S = 10.0
SHORT_S = 0.2
CONTENT = "marker"

# Every attempt is aimed at the marker file, at the listener, or at nobody (signal 0, a child that ends at once). The program
# makes them, and so does the test: it comes from a file of data.
ATTEMPTS = """
import os, socket

def refused(what, attempt):
    try:
        attempt()
    except OSError:
        return
    raise AssertionError(f"the trial could {what}")

def start_process():
    if os.fork() == 0:
        os._exit(0)

def connect(kind, address):
    with socket.socket(*kind) as client:
        client.connect(address)

assert 0 not in os.getresuid(), "the trial ran as root"
assert not os.environ, "the trial saw an environment"
refused("read the marker", lambda: open(MARKER).read())
refused("write the marker", lambda: open(MARKER, "a"))
refused("remove the marker", lambda: os.remove(MARKER))
refused("change the marker's mode", lambda: os.chmod(MARKER, 0o600))
refused("list the marker's folder", lambda: os.listdir(os.path.dirname(MARKER)))
refused("connect", lambda: connect((socket.AF_INET, socket.SOCK_STREAM), ("127.0.0.1", PORT)))
refused("use a datagram socket", lambda: connect((socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", PORT)))
refused("reach the process outside", lambda: os.kill(OUTSIDE, 0))
refused("start a process", start_process)
refused("start a program", lambda: os.execv("/usr/bin/true", ["true"]))
try:
    bytearray(MEMORY)
except MemoryError:
    pass
else:
    raise AssertionError("the trial could take more memory than its limit")
"""
OF_THE_PROGRAM = """
assert not os.listdir("."), "the trial's folder was not empty"
with open("own", "w") as file:
    file.write("x")
assert open("own").read() == "x", "the trial could not write in its own folder"
"""


def problem(start: Callable[[], Jail], memory_bytes: int) -> str | None:
    """Start a jail and try it: why it cannot be relied on, or None.

    Args:
        start: makes the jail.
        memory_bytes: the limit it was made with.
    """
    folder = tempfile.mkdtemp(prefix="sandbox-trial-")
    marker = Path(folder, "marker")
    marker.write_text(CONTENT)
    # So that nothing but the jail stands between an unprivileged user and the marker.
    os.chmod(folder, 0o777)
    os.chmod(marker, 0o666)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        known = {"MARKER": str(marker), "PORT": listener.getsockname()[1], "OUTSIDE": os.getpid()}
        header = "".join(f"{name} = {value!r}\n" for name, value in {**known, "MEMORY": memory_bytes}.items())
        try:
            complaint = _try(start, header + ATTEMPTS)
        except (JailError, OSError) as error:
            complaint = str(error)
        try:
            listener.accept()[0].close()
            complaint = "the trial reached a listener outside"
        except BlockingIOError:
            pass
    if not marker.exists() or marker.read_text() != CONTENT:
        complaint = "the trial changed a file outside"
    shutil.rmtree(folder, ignore_errors=True)
    return complaint


def _try(start: Callable[[], Jail], attempts: str) -> str | None:
    jail = start()
    try:
        for source, test in ((attempts + OF_THE_PROGRAM, ""), ("", attempts)):
            outcome = jail.attempt(source, test, TIME_S)
            if not outcome.passed:
                return f"a trial run did not pass: {outcome.detail}"
        if jail.attempt("", "", TIME_S, impossible=True).passed:
            return "a trial run passed an impossible test"
        if not jail.attempt("while True: pass", "", SHORT_S).timed_out:
            return "a trial run was not stopped in time"
    finally:
        jail.close()
    return None
