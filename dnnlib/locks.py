"""One call at a time: for files that several calls read, change and replace."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

__all__ = ["locked"]

TRIES = 1000  # a file system may show another file than the one that is open


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], wait: bool = True) -> Iterator[None]:
    """Wait until no other process is in such a block for the file `path`.

    The lock is the file `.NAME.lock` beside it, which is deleted at the end of the block. Where the file system has no
    locks, or the folder takes no files, nothing waits. BlockingIOError: without `wait`, another process is in a block.
    """
    folder, name = os.path.split(os.path.abspath(path))
    lock, fd = os.path.join(folder, f".{name}.lock"), None
    try:
        fd = _acquire(lock, wait)
    except BlockingIOError:
        raise
    except OSError:
        pass
    try:
        yield
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock)  # before it is unlocked, so that a process that waits notices and makes a new file
            os.close(fd)


def _lock(fd: int, wait: bool) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


def _acquire(lock: str, wait: bool) -> int:
    """Return a descriptor that holds the lock. OSError: the file cannot be made."""
    for _ in range(TRIES):
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, wait)
            with contextlib.suppress(FileNotFoundError):  # the process that had the lock has just deleted the file
                if os.path.samestat(os.fstat(fd), os.stat(lock)):
                    return fd
        except BaseException:  # a signal while it waits
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), lock)
