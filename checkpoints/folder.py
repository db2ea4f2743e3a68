"""Open a folder once, and what is in it relative to its descriptor: through no link, and looked at first.

Somebody else may put things into a folder while nobody works in it, or while we do. A name in it is therefore never followed
to another place: files are made where nothing was (`O_EXCL`), or taken where they are plain files with one name that belong
to whoever owns the folder. Replacing a file goes by a name that nobody can guess, and a rename.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoints.errors import InputError, WriteError

TEMPORARY = re.compile(r"\.partial-[0-9a-f]{32}")
"""What a file is called until it is whole."""
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is opened, and refused, rather than waited for
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
READ_BYTES = 1 << 20


class ForeignFolder(InputError):
    """A folder, or something in it, is not ours or not what we put there; nothing in it may be touched."""


def umask() -> int:
    """The mode bits that this process leaves out of what it makes."""
    with suppress(OSError, ValueError, IndexError):  # read, where it can be: setting it concerns all threads
        return int(Path("/proc/self/status").read_text().split("\nUmask:")[1].split()[0], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class Folder:
    """An open folder; a context manager, which closes it and the subfolders that were opened through it.

    Args:
        path: for messages, and for libraries that open by name.
        descriptor: of the open folder, closed by `close`.

    Attributes:
        written: `bytes` and `sha256` of what `write` wrote, by name.
    """

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self.descriptor = descriptor
        self.written: dict[str, dict[str, int | str]] = {}
        self._inner: dict[str, Folder] = {}

    @classmethod
    def open(cls, path: Path, *, follow: bool = True) -> Self:
        """Open a folder that exists; with `follow`, also where its last name is a link. Raises OSError."""
        return cls(path, os.open(path, _FOLDER | (0 if follow else os.O_NOFOLLOW)))

    def close(self) -> None:
        """Close it; nothing where that was done."""
        for folder in self._inner.values():
            folder.close()
        self._inner.clear()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ------------------------------------------------------------------------------------------------- what is in it

    def names(self) -> list[str]:
        """What is in it, sorted. Raises WriteError: the disk fails."""
        with self._writing():
            return sorted(os.listdir(self.descriptor))

    def look(self, name: str) -> os.stat_result | None:
        """What lies under a name, a link itself rather than what it points to; None where nothing does."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def fault(self, name: str) -> str | None:
        """Why what lies under a name is not taken, in a few words; None for a plain file or a folder of our own."""
        status = self.look(name)
        return None if status is None else self._fault_of(status, folder=stat.S_ISDIR(status.st_mode))

    def strangers(self, known: Collection[str] | None) -> list[str]:
        """What is in it and its subfolders and must not be touched: `NAME (why)`, sorted.

        Args:
            known: names that may be there, with `/` for what is in a subfolder; None where any may.
        """
        allowed = None if known is None else {*known, *(part for name in known for part in _above(name))}
        return list(self._strangers("", allowed))

    def _strangers(self, prefix: str, allowed: Collection[str] | None) -> Iterator[str]:
        for name in self.names():
            whole = prefix + name
            fault = self.fault(name)
            if fault is not None:
                yield f"{whole} ({fault})"
            elif allowed is not None and whole not in allowed and not TEMPORARY.fullmatch(name):
                yield whole
            elif self._is_folder(name):
                yield from self.subfolder(name)._strangers(f"{whole}/", allowed)

    def _fault_of(self, status: os.stat_result, *, folder: bool = False) -> str | None:
        if status.st_uid not in (os.geteuid(), os.fstat(self.descriptor).st_uid):
            return "belongs to another user"
        if folder:
            return None if stat.S_ISDIR(status.st_mode) else "no folder"
        if not stat.S_ISREG(status.st_mode):
            kinds = {
                stat.S_ISLNK: "a link",
                stat.S_ISFIFO: "a pipe",
                stat.S_ISDIR: "a folder",
                stat.S_ISSOCK: "a socket",
            }
            return next((what for test, what in kinds.items() if test(status.st_mode)), "a device")
        return "a file with further names (hard links)" if status.st_nlink != 1 else None

    def _is_folder(self, name: str) -> bool:
        status = self.look(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def _refuse(self, name: str, fault: str) -> ForeignFolder:
        return ForeignFolder(f"{self / name}: expected a plain file of our own, got: {fault}. Remove it and run again.")

    # ---------------------------------------------------------------------------------------------- opening and writing

    def subfolder(self, name: str, *, mode: int = 0o777) -> Folder:
        """A folder in it, made where nothing is; it is closed with this one.

        Raises: ForeignFolder: something else lies there; WriteError: it cannot be made.
        """
        if name not in self._inner:
            with self._writing(name):
                with suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=self.descriptor)
                fault = self.fault(name)
                if fault is not None or not self._is_folder(name):
                    raise ForeignFolder(f"{self / name}: expected a folder of our own, got: {fault or 'a file'}.")
                opened = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor)
            self._inner[name] = Folder(self / name, opened)
        return self._inner[name]

    def open_file(self, name: str, *, access: int = os.O_RDWR) -> int | None:
        """The descriptor of a file that is there, to be read and written unless `access` says otherwise; None where there is none.

        `/` in its name leads to subfolders, which are not made.

        Raises: ForeignFolder: a link, a pipe, a file with further names or of another user; WriteError: it cannot be opened.
        """
        first, inner, rest = name.partition("/")
        if inner:
            return None if self.look(first) is None else self.subfolder(first).open_file(rest, access=access)
        with self._writing(name):
            fault = self.fault(name)
            if fault is not None:
                raise self._refuse(name, fault)
            try:
                descriptor = os.open(name, access | _FLAGS, dir_fd=self.descriptor)
            except FileNotFoundError:
                return None
            fault = self._fault_of(os.fstat(descriptor))  # once more: it may be another by now
            if fault is not None:
                os.close(descriptor)
                raise self._refuse(name, fault)
        return descriptor

    def new_file(self, name: str) -> int:
        """The descriptor of a new file, in the place of what lay there; `/` in its name leads to subfolders, which are made.

        Raises: WriteError: it cannot be made; ForeignFolder: something else lies in the way.
        """
        first, inner, rest = name.partition("/")
        if inner:
            return self.subfolder(first).new_file(rest)
        with self._writing(name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.descriptor)
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666, dir_fd=self.descriptor)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none. Raises as `open_file`."""
        descriptor = self.open_file(name, access=os.O_RDONLY)
        if descriptor is None:
            return None
        with self._writing(name), _closing(descriptor):
            parts = []
            while part := os.read(descriptor, READ_BYTES):
                parts.append(part)
            return b"".join(parts)

    def write(self, name: str, content: bytes) -> None:
        """Make a small file anew, flush it to the disk, and note it in `written`; `/` in its name leads to subfolders.

        Raises: WriteError: the disk is full or fails; ForeignFolder: something else lies in the way.
        """
        with self._writing(name), _closing(self.new_file(name)) as descriptor:
            _write_all(descriptor, [content])
        self.written[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def replace(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file whole or not at all, in the place of what lay there; it is on the disk when this returns.

        Raises: WriteError: the disk is full or fails.
        """
        temporary = f".partial-{secrets.token_hex(16)}"
        with self._writing(name):
            try:
                with _closing(self.new_file(temporary)) as descriptor:
                    _write_all(descriptor, pieces)
                os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self.descriptor)
                raise
            os.fsync(self.descriptor)

    def sync(self) -> None:
        """Flush its entries, and those of subfolders that are open, to the disk. Raises WriteError: the disk fails."""
        for folder in list(self._inner.values()):  # a shard may be made meanwhile
            folder.sync()
        with self._writing():
            os.fsync(self.descriptor)

    def sync_all(self) -> None:
        """Flush its entries and those of its subfolders to the disk. Raises WriteError: the disk fails."""
        for name in self.names():
            if self._is_folder(name):
                self.subfolder(name).sync_all()
        self.sync()

    # ------------------------------------------------------------------------------------------------------- removing

    def remove(self, name: str) -> None:
        """Remove a file, a link itself, or a folder with what is in it; nothing where nothing is. Raises WriteError."""
        with self._writing(name):
            status = self.look(name)
            if status is None:
                return
            if stat.S_ISDIR(status.st_mode):
                self.subfolder(name).clear()
                self._inner.pop(name).close()
                os.rmdir(name, dir_fd=self.descriptor)
            else:
                os.unlink(name, dir_fd=self.descriptor)

    def clear(self, *, last: Collection[str] = ()) -> None:
        """Remove what is in it, and not the folder; `last`: names that go when nothing else is left. Raises WriteError."""
        for name in sorted(self.names(), key=lambda name: (name in last, name)):
            self.remove(name)

    @contextmanager
    def _writing(self, name: str = "") -> Iterator[None]:
        """Turn what the system says into a WriteError that names the file."""
        try:
            yield
        except OSError as error:
            raise WriteError(self / name if name else self.path, error) from error


def _above(name: str) -> list[str]:
    """The folders that a name leads through: of `a/b/c`, `a` and `a/b`."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    for piece in pieces:
        left = memoryview(piece)
        while left:
            left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)
