"""Keep the index of a large ZIP in a file of arrays that all processes of a machine share.

The file holds what `ArchiveReader` found in the ZIP's directory and in `dataset.json`. It belongs to one directory, of
which it has the hash: the directory has the checksum of every member, so another or a changed archive has another
index. The file can be deleted at any time. Layout: docs/formats.md, "Index of an archive".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

import dnnlib
from archives.zip_directory import ENTRY
from dnnlib.downloads import cache_folder, make_private
from torch_utils.safe_files import MAX_JSON, load_json

__all__ = ["fingerprint", "load_index", "one_at_a_time", "save_index"]

MAGIC = b"CSINDEX2"  # the last character is the version: it changes with the layout, and with what an index means
HEAD = struct.Struct("<8sQI")  # magic, length of the header, checksum of all behind this
ALIGN, CHUNK = 64, 1 << 20
WAIT = 60  # seconds to wait for another process that makes the same index
NUMBERS = (np.dtype("<i8"), np.dtype("<f4"))  # labels are numbers or vectors
TYPES = {
    "names": (np.dtype("u1"),),
    "starts": (np.dtype("<i8"),),
    "entries": (ENTRY,),
    "labels": NUMBERS,
    "clean_labels": NUMBERS,
    "previous_labels": NUMBERS,
    "outliers": (np.dtype("u1"),),
}
Index = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, record
# What is raised for a file that is absent, damaged, of another archive, or that lies.
USELESS = (dnnlib.UserError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error)


def fingerprint(fd: int, start: int, length: int, size: int) -> str:
    """Return a hash of the directory of a ZIP, and of where it lies in the `size` bytes of its file."""
    found = hashlib.blake2b(struct.pack("<8s3Q", MAGIC, start, length, size), digest_size=32)
    for place in range(start, start + length, CHUNK):
        found.update(os.pread(fd, min(CHUNK, start + length - place), place))
    return found.hexdigest()


def load_index(path: str, key: str) -> Index | None:
    """Return the index of the ZIP `path` whose directory has the hash `key`; None if there is none to be believed.

    The arrays are mapped into memory: a page is read when it is used, and all processes share it. They can be written
    to, which changes this process's copy only.
    """
    for place in _places(path, key, make=False):
        with contextlib.suppress(*USELESS):
            return _load(place, key, os.stat(path).st_uid)
    return None


def save_index(path: str, key: str, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write the index of the ZIP `path` beside it, or else into the user's cache, or else nowhere."""
    header = dict(archive=key, record=record, arrays={})
    parts, end = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        end += -end % ALIGN
        header["arrays"][name] = [data.dtype.str if data.dtype != ENTRY else "entry", list(data.shape), end]
        parts.append((end, data.reshape(-1).view(np.uint8)))
        end += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(HEAD.size + len(text)) % ALIGN)
    for place in _places(path, key, make=True):
        with contextlib.suppress(OSError):
            if os.path.lexists(place) and not _is_index(place):
                continue  # somebody else's file of that name
            with dnnlib.atomic_open(place) as file:
                _write(file, text, parts)
            return


def _places(path: str, key: str, make: bool) -> Iterator[str]:
    """Yield where the index of a ZIP may be: beside it, and in the user's cache if it is private. `make`: make it."""
    yield f"{path}.index"
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        if make or cache_folder().is_dir():
            make_private(cache_folder())
            yield str(cache_folder() / f"archive-{key}.index")


def _is_index(place: str) -> bool:
    with contextlib.suppress(dnnlib.UserError, OSError), dnnlib.open_file(place) as file:
        return file.read(len(MAGIC) - 1) == MAGIC[:-1]
    return False


def _write(file: IO[bytes], text: bytes, parts: list[tuple[int, np.ndarray]]) -> None:
    file.write(bytes(HEAD.size))
    checksum = zlib.crc32(text)
    file.write(text)
    done = 0
    for place, data in parts:
        for piece in (bytes(place - done), data):
            checksum = zlib.crc32(piece, checksum)
            file.write(piece)
        done = place + len(data)
    file.seek(0)
    file.write(HEAD.pack(MAGIC, len(text), checksum))


def _load(place: str, key: str, owner: int) -> Index:
    """Return an index. Raise one of USELESS if there is none to be believed.

    Only the user, the `owner` of the archive and the administrator may have written it.
    """
    with dnnlib.open_file(place) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        if status.st_uid not in (os.geteuid(), owner, 0) or status.st_mode & stat.S_IWOTH:
            raise ValueError
        magic, length, checksum = HEAD.unpack(file.read(HEAD.size))
        if magic != MAGIC or HEAD.size + length > size:
            raise ValueError
        text = file.read(length)
        header = load_json(text, place, max(MAX_JSON, 16 * size))
        if header["archive"] != key:
            raise ValueError
        found = zlib.crc32(text)
        while piece := file.read(CHUNK):  # read, not mapped, so that the pages do not count as this process's memory
            found = zlib.crc32(piece, found)
        if found != checksum:
            raise ValueError
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    arrays = {}
    for name, (kind, shape, offset) in header["arrays"].items():
        dtype = ENTRY if kind == "entry" else np.dtype(kind)
        if dtype not in TYPES[name] or not all(type(n) is int and n >= 0 for n in [*shape, offset]):
            raise ValueError
        arrays[name] = np.frombuffer(mapped, dtype, math.prod(shape), HEAD.size + length + offset).reshape(shape)
    _check(arrays, header["record"])
    return arrays, header["record"]


def _check(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Raise one of USELESS for what would end in a traceback later. Offsets and names are checked when used."""
    count = len(arrays["entries"])
    names, corruption, notes = record["class_names"], record["corruption"], record["notes"]
    fits = all(array.shape[:1] == (count,) for name, array in arrays.items() if name not in ("names", "starts"))
    if not fits or not count or arrays["starts"].shape != (count + 1,) or arrays["names"].ndim != 1:
        raise ValueError
    if arrays["starts"][0] != 0 or arrays["starts"][-1] != len(arrays["names"]):
        raise ValueError
    texts = [text for texts in (names, notes) if texts is not None for text in texts]
    lists = isinstance(notes, list) and (names is None or isinstance(names, list))
    if not isinstance(corruption, dict) or not lists or not all(isinstance(text, str) for text in texts):
        raise ValueError
    place = record["list"]
    if place is not None and not (isinstance(place, list) and len(place) == 6 and set(map(type, place)) == {int}):
        raise ValueError
    for labels in (arrays[name] for name in TYPES if TYPES[name] is NUMBERS and name in arrays):
        right = labels.ndim == 1 and 0 <= labels.min() and labels.max() < 1 << 31
        if not (right if labels.dtype.kind == "i" else labels.ndim == 2 and labels.size and np.isfinite(labels).all()):
            raise ValueError


@contextlib.contextmanager
def one_at_a_time(file: IO[bytes]) -> Iterator[None]:
    """Wait while another process of this machine is in such a block for the same file, for at most WAIT seconds."""
    locked, until = False, time.monotonic() + WAIT
    while not locked:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        except OSError:  # the file system has no locks
            break
    try:
        yield
    finally:
        if locked:
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
