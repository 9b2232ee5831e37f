"""Downloads over https into a private cache. An interrupted download continues where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from dnnlib.util import UserError, open_file, sync_directory

__all__ = ["cache_folder", "content_hash", "is_url", "make_private", "open_url", "read_bytes"]

_MAX_FILE = 16 << 30  # bytes, of a download and of a file that is read whole
_MAX_REDIRECTS = 10
_TIMEOUT = (20, 60)  # seconds to connect, seconds between bytes
_MIN_BYTES = 1 << 14  # that must arrive in every _TIMEOUT[1] seconds, so that a server cannot stall with single bytes
_ATTEMPTS = 3
_PAUSE = 1.0  # seconds before the second attempt; twice as long before the third
_CHUNK = 1 << 20
_BROKEN = (OSError, ValueError, HTTPError)  # requests raises OSErrors, and ValueError for a malformed header or address


class _FinalError(OSError):
    """A download fails in a way that another attempt would not fix."""


def is_url(s: object) -> bool:
    """Return whether `s` is a string that starts with http:// or https://."""
    return isinstance(s, str) and re.match(r"https?://[^/]", s, re.IGNORECASE) is not None


def open_url(
    url: str,
    cache_dir: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    allow_http: bool = False,
    sha256: str | None = None,
) -> IO[bytes]:
    """Return a binary file with the content of `url`, from the cache if it is there.

    `sha256`: the hash that the content must have, 64 hexadecimal digits; `url` may end in `#sha256=...` instead. The
    cache is `cache_dir`, else $DNNLIB_CACHE_DIR, else ~/.cache/cleanscore, and only this user can read it. A cached
    file is named after the SHA-256 of its content if that is known, and is compared with it each time; otherwise it is
    named after the SHA-256 of the URL. A file enters the cache only when it is complete. An interrupted download
    continues if the server says that the file is still the same. Only https is accepted, also for redirects, unless
    `allow_http`. Raises UserError that names the URL and the cache path where a copy of the file could be put instead.
    """
    url, sha256 = _checksum(url, sha256)
    path = _cache_path(url, cache_dir, sha256)
    if path.is_file() and sha256 is not None and _digest(path) != sha256:
        print(f"Warning: {path} is damaged; downloading it again")
        path.unlink()
    if not path.is_file():
        if verbose:
            print(f"Downloading {url}")
        try:
            make_private(path.parent)
            _download(url, path, allow_http, sha256)
        except _BROKEN as e:
            raise UserError(f"{url}: download failed ({e}); to go on without it, put the file at {path}") from e
    return open(path, "rb")


def _checksum(url: str, sha256: str | None) -> tuple[str, str | None]:
    if not is_url(url):
        raise UserError(f"{url}: not a URL; expected https://...")
    bare, fragment = urldefrag(url)
    if fragment.startswith("sha256="):
        url, stated = bare, fragment.removeprefix("sha256=")
        if sha256 not in (None, stated):
            raise UserError(f"{url}: two different checksums are stated")
        sha256 = stated
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{url}: {sha256!r} is not a SHA-256; expected 64 hexadecimal digits")
    return url, sha256 and sha256.lower()


def _cache_path(url: str, cache_dir: str | os.PathLike[str] | None, sha256: str | None) -> Path:
    base = Path(cache_dir) if cache_dir else cache_folder()
    if sha256 is not None:
        return base / f"sha256-{sha256}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(urlsplit(url).path))[-80:] or "download"
    return base / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}_{name}"


def cache_folder() -> Path:
    """Return the folder for files that can be made or downloaded again: $DNNLIB_CACHE_DIR or ~/.cache/cleanscore."""
    return Path(os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "cleanscore")


def make_private(folder: Path) -> None:
    """Make a folder that only this user can read. Raise OSError when everybody may write into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and folder.stat().st_mode & stat.S_IWOTH:
        raise _FinalError(
            f"everybody may write into {folder}, so anybody could put files there; change that with chmod o-w"
        )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url: str, path: Path, allow_http: bool, sha256: str | None) -> None:
    with _partial(path) as (file, part, tag):
        for attempt in range(_ATTEMPTS):
            try:
                continued = _fetch(url, allow_http, file, tag, resumable=sha256 is not None)
                file.flush()
                if sha256 is not None and (found := _digest(part)) != sha256:
                    _empty(file)
                    # Parts of two versions may have been joined; another attempt starts at the first byte.
                    raise (OSError if continued else _FinalError)(f"its SHA-256 is {found}, expected {sha256}")
                break
            except _FinalError:
                raise
            except _BROKEN:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_PAUSE * (attempt + 1))
        os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[tuple[IO[bytes], Path, Path]]:
    """Yield the open file that receives a download, its path, and the path of the file with the server's version tag.

    Both files stay when the download breaks off, unless nothing arrived. Only one process writes to them at a time;
    another process uses a file with a name of its own, which is deleted in the end.
    """
    part, own = path.with_name(f".{path.name}.part"), False
    file = _open_private(part)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        part, own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), True
        file = _open_private(part)
    tag = part.with_name(f"{part.name}.tag")
    try:
        with file:
            yield file, part, tag
    finally:
        if own or (part.exists() and not part.stat().st_size):
            part.unlink(missing_ok=True)
        if not part.exists():
            tag.unlink(missing_ok=True)


def _open_private(path: Path) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o600), "r+b")


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _fetch(url: str, allow_http: bool, file: IO[bytes], tag: Path, resumable: bool) -> bool:
    """Make one attempt to download `url`, or the part that is missing, into `file`; return whether it continued one.

    `resumable`: continue even when the server has not said which version the first part comes from.
    """
    version = tag.read_text() if tag.exists() else None
    if not (version or resumable):
        _empty(file)
    have = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    with _get(url, headers, allow_http) as reply:
        total = _begin(reply, file, have)
        continued = file.tell() > 0
        # A weak ETag (W/...) promises the same meaning, not the same bytes.
        version = reply.headers.get("etag", "W/")
        version = reply.headers.get("last-modified") if version.startswith("W/") else version
        if version:
            with open(os.open(tag, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
                f.write(version)
        elif tag.exists():
            tag.unlink()
        try:
            _receive(reply, file, total)
        except BaseException:
            if not (version or resumable):
                _empty(file)
            raise
    return continued


def _begin(reply: requests.Response, file: IO[bytes], have: int) -> int | None:
    """Move `file` to where the reply's bytes belong; return the size of the whole content, if the server says it."""
    length = reply.headers.get("content-length")
    if reply.status_code == 206:
        match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", reply.headers.get("content-range", ""))
        if match is None or int(match[1]) != have:
            _empty(file)
            raise OSError(f"the server sends {reply.headers.get('content-range')} instead of the part asked for")
        total = None if match[2] == "*" else int(match[2])
    else:
        _empty(file)
        if reply.status_code == 416:  # no bytes follow those we have, so it is a different file now
            raise OSError("the file on the server has changed")
        if reply.status_code != 200:
            kind = OSError if reply.status_code in (408, 429) or reply.status_code >= 500 else _FinalError
            raise kind(f"the server answers {reply.status_code} {reply.reason}"[:200])
        if reply.headers.get("content-type", "").startswith("text/html"):
            raise _FinalError("the server answers with a web page instead of the file")
        total = None if length is None else int(length)
    if total is not None and total > _MAX_FILE:
        raise _FinalError(f"{total:,} bytes are more than the limit of {_MAX_FILE >> 30} GiB")
    return total


def _receive(reply: requests.Response, file: IO[bytes], total: int | None) -> None:
    received, mark, due = file.tell(), file.tell(), time.monotonic() + _TIMEOUT[1]
    while chunk := reply.raw.read1(_CHUNK, decode_content=False):
        file.write(chunk)
        received += len(chunk)
        if received > _MAX_FILE:
            _empty(file)
            raise _FinalError(f"more than the limit of {_MAX_FILE >> 30} GiB")
        if time.monotonic() > due:
            if received - mark < _MIN_BYTES:
                raise TimeoutError(f"only {received - mark} bytes came in {_TIMEOUT[1]} seconds")
            mark, due = received, time.monotonic() + _TIMEOUT[1]
    if total is not None and received != total:
        raise OSError(f"received {received} of {total} bytes")


@contextlib.contextmanager
def _get(url: str, headers: dict[str, str], allow_http: bool) -> Iterator[requests.Response]:
    schemes = ("https", "http") if allow_http else ("https",)
    for _ in range(_MAX_REDIRECTS):
        # This loop follows redirects itself, because requests would follow one from https to http.
        if urlsplit(url).scheme.lower() not in schemes:
            raise _FinalError(f"only https is downloaded, not {url[:200]}")
        with requests.get(url, stream=True, timeout=_TIMEOUT, allow_redirects=False, headers=headers) as reply:
            if reply.is_redirect:
                url = urljoin(url, reply.headers["location"])
                continue
            yield reply
            return
    raise _FinalError(f"more than {_MAX_REDIRECTS} redirects")


def content_hash(path_or_url: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the content of a file or URL.

    Raise UserError when it is missing, unreadable or not a regular file.
    """
    found = hashlib.sha256()
    with open_url(path_or_url) if is_url(path_or_url) else open_file(path_or_url) as file:
        try:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
        except OSError as e:
            raise UserError(f"{path_or_url}: {e.strerror or e}") from e
    return found.hexdigest()


def read_bytes(path_or_url: str | os.PathLike[str]) -> bytes:
    """Return the content of a file or URL.

    Raise UserError when it is missing, unreadable, not a regular file or over 16 GiB.
    """
    with open_url(path_or_url) if is_url(path_or_url) else open_file(path_or_url) as file:
        try:
            if os.fstat(file.fileno()).st_size > _MAX_FILE:
                raise OSError(f"is larger than {_MAX_FILE >> 30} GiB")
            return file.read()
        except OSError as e:
            raise UserError(f"{path_or_url}: {e.strerror or e}") from e
