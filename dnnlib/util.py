"""Attribute dictionaries, errors for users, logs, durable files and cached downloads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

import click
import numpy as np
import requests

__all__ = ["EasyDict", "Logger", "UserError", "atomic_open", "format_time", "is_url", "one_line", "open_url",
           "read_bytes", "read_npz"]

_MAX_REDIRECTS = 10
_TIMEOUT = (20, 60)  # seconds to connect, seconds between bytes
_CHUNK = 1 << 20


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
    """A mistake in the user's data or files: one line that names the file, what was found and what would be right."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` on one line; characters that could steer a terminal (names come from strangers' files) become '?'."""
    text = re.sub(r"\s*[\r\n]+\s*", " ", str(text)).strip()
    return "".join(c if c.isprintable() else "?" for c in text)


def format_time(seconds: float) -> str:
    """Seconds as '12s', '3m 05s', '1h 02m 03s' or '1d 02h 03m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 86400}d {s // 3600 % 24:02d}h {s // 60 % 60:02d}m"


class Logger:
    """Copies what is printed on stdout to a file, line by line, until closed.

    `mode` 'a' continues a log. `file_name` None copies nothing, for the processes that keep no log.
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
        return getattr(self.__dict__["_stdout"], name)  # isatty, fileno, encoding: those of the terminal

    def write(self, text: str) -> int:
        if self._file is not None:
            self._file.write(text)
        return self._stdout.write(text)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        self._stdout.flush()

    def close(self) -> None:
        """Give stdout back. Closing twice is allowed."""
        if self._file is None:
            return
        self.flush()
        if sys.stdout is self:
            sys.stdout = self._stdout
        self._file.close()
        self._file = None


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere directories cannot be opened
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears under its name only when complete and on disk.

    Temporary name `.NAME.XXXXXXXX.tmp` in the same folder, flush, fsync, rename, fsync of the folder. On any exception
    the temporary file is removed and an older file of that name stays as it was. `mode`: 'wb', or 'w' for UTF-8 text.
    Raises OSError carrying `path` when the disk refuses.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temp, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        _sync_directory(path.parent)
    except OSError as e:
        # "No space left" from write() names no file, and the temporary name means nothing to the user.
        if e.errno is not None and e.filename in (None, str(temp)):
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
    finally:
        with contextlib.suppress(OSError):  # a disk that has become read-only: what it refused first is the news
            temp.unlink(missing_ok=True)


def is_url(s: object) -> bool:
    """Whether `s` is a string that starts with http:// or https://."""
    return isinstance(s, str) and re.match(r"https?://[^/]", s, re.IGNORECASE) is not None


def _cache_path(url: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    base = cache_dir or os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "cleanscore"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(urlsplit(url).path))[-80:] or "download"
    return Path(base) / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}_{name}"


def _download(url: str, allow_http: bool, file: IO[bytes]) -> None:
    schemes = ("https", "http") if allow_http else ("https",)
    for _ in range(_MAX_REDIRECTS):
        # Redirects are followed by hand: requests would follow one from https down to http.
        if urlsplit(url).scheme.lower() not in schemes:
            raise OSError(f"only https is downloaded, not {url[:200]}")
        with requests.get(url, stream=True, timeout=_TIMEOUT, allow_redirects=False,
                          headers={"Accept-Encoding": "identity"}) as reply:
            if reply.is_redirect:
                url = urljoin(url, reply.headers["location"])
                continue
            reply.raise_for_status()
            received = 0
            for chunk in reply.iter_content(_CHUNK):
                received += len(chunk)
                file.write(chunk)
            expected = reply.headers.get("content-length")  # urllib3 compares by itself from version 2 on
            if expected is not None and int(expected) != received:
                raise OSError(f"received {received} of {expected} bytes")
            return
    raise OSError(f"more than {_MAX_REDIRECTS} redirects")


def open_url(url: str, cache_dir: str | os.PathLike[str] | None = None, verbose: bool = True,
             allow_http: bool = False) -> IO[bytes]:
    """Binary file with the content of `url`, from the cache when it is there.

    The cache lies in `cache_dir`, else $DNNLIB_CACHE_DIR, else ~/.cache/cleanscore, keyed by the URL's SHA-256; a file
    enters it only when complete. https only, redirects included, unless `allow_http`.
    Raises UserError naming the URL and the cache path that would serve instead.
    """
    if not is_url(url):
        raise UserError(f"{url}: not a URL; expected https://...")
    path = _cache_path(url, cache_dir)
    if not path.is_file():
        if verbose:
            print(f"Downloading {url}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_open(path) as file:
                _download(url, allow_http, file)
        except (OSError, ValueError) as e:  # requests' errors are OSErrors; ValueError: malformed header or address
            raise UserError(f"{url}: download failed ({e}); to go on without it, put the file at {path}") from e
    return open(path, "rb")


def read_bytes(path_or_url: str | os.PathLike[str]) -> bytes:
    """Content of a file or URL. Raises UserError when it is missing or unreadable."""
    try:
        with open_url(path_or_url) if is_url(path_or_url) else open(path_or_url, "rb") as file:
            return file.read()
    except OSError as e:
        raise UserError(f"{path_or_url}: {e.strerror or e}") from e
    except ValueError as e:  # a null byte in the name
        raise UserError(f"{path_or_url}: {e}") from e


def read_npz(path_or_url: str | os.PathLike[str], expected: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file or URL, never unpickled. UserError that says what was `expected`."""
    data = read_bytes(path_or_url)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError, AttributeError, TypeError, KeyError, zipfile.BadZipFile, RuntimeError) as e:
        # NumPy names the argument that would let it unpickle, in every such message.
        pickled = "allow_pickle" in str(e)
        reason = "holds Python objects, which are never loaded" if pickled else "not a readable .npz file"
        raise UserError(f"{path_or_url}: {reason}; {expected}") from None
