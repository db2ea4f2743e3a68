"""What hostile programs are aimed at: marker files, listeners and a victim process, all of our own making.

A program's claims are not asked for where its deeds can be seen: `World.effects` looks at the targets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

NOBODY = 65534
TRACELESS = {"secret", "reached"}
REACHED = "REACHED"  # what a program says when it got what leaves no trace outside it
SHARED_KEY = 0x5EED
PROC = Path("/proc")


class World:
    """Targets within reach of any user, as far as file modes go; a context manager.

    Attributes:
        home: a folder that anybody may write, with two files.
        secret: what one of the files and the victim's environment hold.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        self.folder.chmod(0o755)
        self.home = self.folder / "home"
        self.secret = secrets.token_hex(16)
        self.tag = process_name()
        self.sockets: dict[str, socket.socket] = {}
        self.victim: subprocess.Popen[bytes] | None = None
        self._spoilt = True
        self.renew()

    def renew(self) -> None:
        """Make every target anew, if something happened to one of them."""
        if not self._spoilt:
            return
        self._spoilt = False
        self._end()
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.home.chmod(0o777)
        for name, text in (("secret", self.secret), ("keep", "keep")):
            (self.home / name).write_text(text)
            (self.home / name).chmod(0o666)
        self.sockets = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "abstract": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
            "path": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        }
        self.sockets["udp"].bind(("127.0.0.1", 0))
        self.sockets["abstract"].bind(f"\0{self.tag}-stream")
        self.sockets["abstract"].listen()
        self.sockets["datagram"].bind(f"\0{self.tag}-datagram")
        place = self.folder / "socket"
        place.unlink(missing_ok=True)
        self.sockets["path"].bind(str(place))
        place.chmod(0o666)
        for listener in self.sockets.values():
            listener.setblocking(False)
        # As the user that programs run as: file modes and user numbers do not protect it.
        user = NOBODY if os.getuid() == 0 else None
        self.victim = subprocess.Popen(
            ["/usr/bin/sleep", "600"],
            env={"SECRET": self.secret},
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        self._before = self._files()
        self._victim_before = self._victim_state()

    def constants(self) -> str:
        """The first lines of every hostile program: where its targets are, and its name."""
        assert self.victim is not None
        known = {
            "HOME": str(self.home),
            "TCP": self.sockets["tcp"].getsockname(),
            "UDP": self.sockets["udp"].getsockname(),
            "ABSTRACT": f"\0{self.tag}-stream",
            "DATAGRAM": f"\0{self.tag}-datagram",
            "SOCKET": str(self.folder / "socket"),
            "VICTIM": self.victim.pid,
            "HARNESS": os.getpid(),
        }
        lines = [f"{name} = {value!r}" for name, value in known.items()]
        return "\n".join([*lines, "import ctypes, os, sys", f"ctypes.CDLL(None).prctl(15, {self.tag.encode()!r})", ""])

    def effects(self, detail: str = "", patience_s: float = 0.0) -> set[str]:
        """What has happened to the targets since `renew`.

        Args:
            detail: what the program said at its end.
            patience_s: how long to wait for the victim's death; a signal takes a moment.
        """
        assert self.victim is not None
        found = {name for name, listener in self.sockets.items() if _contacted(listener)}
        if self._files() != self._before:
            found.add("files")
        if self.secret in detail:
            found.add("secret")
        if REACHED in detail:
            found.add("reached")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(patience_s)
        if self.victim.returncode is not None:
            found.add("killed")
        elif self._victim_state() != self._victim_before:
            found.add("victim")
        if processes_named(self.tag):
            found.add("left")
        if _shared_memory():
            found.add("shared memory")
        self._spoilt = bool(found - TRACELESS)
        return found

    def close(self) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        for listener in self.sockets.values():
            listener.close()
        if self.victim is not None:
            self.victim.kill()
            self.victim.wait()
        for segment in _shared_memory():
            ctypes.CDLL(None).shmctl(segment, 0, None)  # IPC_RMID

    def _files(self) -> dict[str, tuple[int, bytes]]:
        """Path, mode and content of everything in the home, and of the folder around it."""
        found = {}
        for path in [self.home, *sorted(self.home.rglob("*"))]:
            try:
                mode = path.lstat().st_mode
                found[str(path)] = (mode, path.read_bytes() if stat.S_ISREG(mode) else b"")
            except OSError as error:  # gone, or closed to us: different from before
                found[str(path)] = (-1, str(error.errno).encode())
        return found

    def _victim_state(self) -> tuple[object, ...]:
        """What can be done to a process without killing it: priority, limits, its chance to be killed for memory."""
        assert self.victim is not None
        pid = self.victim.pid
        texts = [(PROC / str(pid) / name).read_text() for name in ("limits", "oom_score_adj")]
        return os.getpriority(os.PRIO_PROCESS, pid), *texts


def _contacted(listener: socket.socket) -> bool:
    """Whether somebody connected to a listener, or sent something."""
    try:
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.accept()[0].close()
        else:
            listener.recv(100)
    except BlockingIOError:
        return False
    return True


def _shared_memory() -> list[int]:
    """Identifiers of the segments that a hostile program made."""
    rows = [line.split() for line in (PROC / "sysvipc/shm").read_text().splitlines()[1:]]
    return [int(row[1]) for row in rows if int(row[0]) == SHARED_KEY]


def process_name() -> str:
    """A name for hostile processes, which their children inherit; another test run on this machine has another."""
    return f"hostile-{secrets.token_hex(3)}"


def processes_named(wanted: str) -> list[int]:
    """Processes of a name that still live."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, state = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
                if name == wanted and state.split()[0] not in ("Z", "X"):
                    found.append(int(entry.name))
    return found


def kill_processes_named(name: str) -> None:
    """End what a control left; only ever called inside an outer jail."""
    for _ in range(100):
        found = processes_named(name)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
