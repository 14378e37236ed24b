"""One process works in a folder at a time.

It holds a lock on a file there, which the system takes back when the process ends, however it ends.
"""

import logging
import os
import socket
import time
import weakref
from io import TextIOWrapper
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

LOCK = ".lock"
"""The file's name."""
# Seconds between two looks at a lock that another process holds.
PATIENCE = 0.2
# Locks by process and folder: work inside of work in the same folder does not wait for itself.
_locks: "weakref.WeakValueDictionary[tuple[int, Path], _Held]" = weakref.WeakValueDictionary()


class Lock:
    """A folder is used by this process alone, until `release`, the end of a `with` or of this object."""

    def __init__(self, held: "_Held") -> None:
        self._held: _Held | None = held

    @property
    def holds(self) -> bool:
        """Whether it keeps others out: not where nothing can be locked, nor when the folder was removed."""
        return self._held is not None and self._held.holds

    def release(self) -> None:
        """Lets other processes in, unless this process has the folder elsewhere, too."""
        self._held = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(folder: Path, *, wait: bool = True) -> Lock:
    """Keeps other processes out of a folder, which it makes if missing.

    A process that has it already gets it again. On a file system without locks, and on Windows, nothing is
    locked.

    Args:
        folder: what to lock.
        wait: until another process that has it is done, or leave.

    Raises:
        ValueError: another process works there, and `wait` is False.
    """
    place = folder.resolve()
    key = os.getpid(), place  # a fork does not have what its parent has
    held = _locks.get(key)
    if held is None or not held.holds:
        held = _locks[key] = _Held(place, wait)
    return Lock(held)


class _Held:
    """The lock of this process on a folder, until nobody refers to it."""

    def __init__(self, folder: Path, wait: bool) -> None:
        self._path, told = folder / LOCK, False
        while True:
            try:
                self._file = _locked(self._path)
                break
            except BlockingIOError as error:
                if not wait:
                    message = f"{error} is at work in {folder}: wait for it, or name another folder."
                    raise ValueError(message) from None
                if not told:
                    logging.getLogger(__name__).warning("waiting for %s in %s", error, folder)
                told = True
                time.sleep(PATIENCE)
        if self._file is not None:
            weakref.finalize(self, _release, self._file, self._path, os.getpid())

    @property
    def holds(self) -> bool:
        return self._file is not None and _is_at(self._path, self._file)


def _locked(path: Path) -> TextIOWrapper | None:
    """The open file with its lock; None where nothing can be locked.

    Raises:
        BlockingIOError: another process has it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl is not None:
        try:
            file = path.open("a+")
        except PermissionError:
            if not path.exists():  # where this process cannot write, it disturbs nobody
                return None
            file = path.open()  # another user's
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise BlockingIOError(file.read() or "another process") from None
        except OSError:  # a file system without locks
            file.close()
            return None
        if _is_at(path, file):
            if not file.writable():  # nobody has it, and this process cannot say that it does
                file.close()
                return None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # the one who had it has removed it
    return None


def _is_at(path: Path, file: TextIOWrapper) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _release(file: TextIOWrapper, path: Path, owner: int) -> None:
    if os.getpid() == owner and _is_at(path, file):  # and not a fork of it
        path.unlink()
    file.close()
