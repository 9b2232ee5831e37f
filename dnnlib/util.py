"""Dictionaries with attributes, errors for users, logs, and files that survive a crash."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import gc
import io
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click

__all__ = [
    "EasyDict",
    "Logger",
    "UserError",
    "atomic_folder",
    "atomic_open",
    "format_time",
    "list_contents",
    "no_garbage",
    "one_line",
    "open_file",
    "print_notes",
    "sync_directory",
    "temporary_folder",
]

# Files that operating systems put into the folders which people look at.
LITTER = re.compile(r"\.DS_Store|\.localized|\._.*|(?:eh)?thumbs\.db|desktop\.ini", re.IGNORECASE | re.DOTALL)
_MAX_LINE = 4000  # characters of an error message; a name in a stranger's file may have millions


class EasyDict(dict):
    """Dictionary whose string keys are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


class UserError(click.ClickException):
    """A mistake in the user's data or files.

    The message is one line that names the file, what was found and what would be right.
    """

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Return `text` on one line, with '?' for characters that could control a terminal.

    Messages quote names from files that strangers made.
    """
    text = re.sub(r"\s*[\r\n]+\s*", " ", str(text)).strip()
    text = text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}..."
    return "".join(c if c.isprintable() else "?" for c in text)


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV in UTF-8, complete or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    with atomic_open(path) as f:
        f.write(text.getvalue().encode("utf-8", "surrogateescape"))  # names of files may be no UTF-8


def print_notes(notes: Iterable[str]) -> None:
    """Print what a person should know, such as what was left out, one line each on stderr."""
    for note in notes:
        click.echo(f"Note: {one_line(note)}", err=True)


def format_time(seconds: float) -> str:
    """Return a time in seconds as '12s', '3m 05s', '1h 02m 03s' or '1d 02h 03m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 86400}d {s // 3600 % 24:02d}h {s // 60 % 60:02d}m"


class Logger:
    """Copies what the program prints on stdout to a file, line by line, until it is closed.

    `mode` 'a' appends to an existing log. With `file_name` None nothing is copied: only one process keeps a log. A disk
    that refuses the log ends the copying, with a warning, and not the program.
    """

    def __init__(self, file_name: str | os.PathLike[str] | None, mode: str = "w"):
        self._file: IO[str] | None = None
        self._stdout = sys.stdout
        if file_name is not None:
            self._file = open(file_name, mode, encoding="utf-8", errors="replace", buffering=1)
            sys.stdout = self  # type: ignore[assignment]

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stdout"], name)  # isatty, fileno and encoding are the terminal's

    def write(self, text: str) -> int:
        length = self._stdout.write(text)
        self._log(lambda file: file.write(text))
        return length

    def flush(self) -> None:
        self._stdout.flush()
        self._log(lambda file: file.flush())

    def _log(self, act: Callable[[IO[str]], Any]) -> None:
        if self._file is None:
            return
        file = self._file
        try:
            act(file)
        except OSError as e:
            self._file = None
            with contextlib.suppress(OSError):  # closing it writes what is left
                file.close()
            self._stdout.write(f"Warning: {file.name}: {e.strerror or e}; from here on only the screen has the log\n")

    def close(self) -> None:
        """Restore stdout. A second call does nothing."""
        if sys.stdout is self:
            sys.stdout = self._stdout
        if self._file is not None:
            self.flush()
            self._log(lambda file: file.close())
            self._file = None


def sync_directory(path: Path) -> None:
    """Write the names in a folder to the disk; return when they are there."""
    if os.name == "posix":  # other systems cannot open a directory
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading. Raise UserError when it is missing, unreadable, or not a regular file."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:  # a null byte in the name
        raise UserError(f"{path}: {e}") from e
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: not a regular file")  # reading a device such as /dev/zero never ends
    return file


def list_contents(path: str | os.PathLike[str]) -> list[str]:
    """Return the names in a folder, sorted, without the files that operating systems put there by themselves."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if not _is_litter(entry))


def _is_litter(entry: os.DirEntry[str]) -> bool:
    return LITTER.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Turn off the cyclic garbage collector, which slows down code that creates very many objects without cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that gets its name only when it is complete and on disk.

    The steps: write `.NAME.XXXXXXXX.tmp` in the same folder, flush, fsync, rename, fsync the folder. On any exception
    the temporary file is deleted, and an older file of that name stays as it was. What killed processes have left of
    the same file is deleted first. `mode` is 'wb', or 'w' for UTF-8
    text. Raises OSError with `path` as its file name when the disk refuses.
    """
    path = Path(path)
    _remove_stale(path)
    try:
        held = False
        while not held:
            temp = _temporary_name(path)
            file = open(temp, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
            held = _hold(file.fileno())
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temp, path)
        sync_directory(path.parent)
    except OSError as e:
        # "No space left" from write() names no file, and the temporary name means nothing to the user.
        if e.errno is not None and e.filename in (None, str(temp)):
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
    finally:
        with contextlib.suppress(
            OSError
        ):  # a read-only disk refuses this too, but its first error is the one to report
            temp.unlink(missing_ok=True)


def temporary_folder(path: Path) -> tuple[Path, int]:
    """Make the folder `.NAME.XXXXXXXX.tmp` beside `path`, which it shall become. Return it, and a descriptor to close.

    What killed processes have left of `path` is deleted first.
    """
    _remove_stale(path)
    while True:
        folder = _temporary_name(path)
        os.mkdir(folder)
        fd = os.open(folder, os.O_RDONLY)
        if _hold(fd):
            return folder, fd
        os.close(fd)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder that gets its name only when all its files are there, and is deleted on any exception.

    Missing parent folders are made. UserError, before anything is made: `path` is a file, or a folder with files in it.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not (path.is_dir() and not list_contents(path)):
        raise UserError(f"{path}: exists already; choose another name or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, held = temporary_folder(path)
    try:
        yield folder
        if path.is_dir():
            with os.scandir(path) as entries:
                for entry in filter(_is_litter, entries):
                    os.unlink(entry)
        os.rename(folder, path)  # also over an empty folder
        sync_directory(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _hold(fd: int) -> bool:
    """Keep other processes from taking an open temporary file or folder for stale, until it is closed.

    Return False when one of them has just deleted it.
    """
    with contextlib.suppress(OSError):  # a file system without locks: there nothing is stale
        fcntl.flock(fd, fcntl.LOCK_SH)
    return os.fstat(fd).st_nlink > 0


def _remove_stale(path: Path) -> None:
    """Delete the temporary files and folders of `path` that killed processes have left: no process holds them."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in [entry for entry in entries if pattern.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
                finally:
                    os.close(fd)
