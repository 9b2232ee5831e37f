"""Read image archives (a ZIP or a folder) from any number of threads: names, labels, decoded images.

The reader accepts what the tools of EDM, StyleGAN and TDSM write, folders with one subfolder per class, and plain
folders of images.
"""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import dnnlib
from archives.decode import EXTENSIONS, decode_image
from archives.index_file import fingerprint, load_index, one_at_a_time, save_index
from archives.json_lists import in_pieces, load_lists
from archives.labels import match_labels
from archives.names import Names
from archives.zip_directory import ENTRY_FIELDS, find_directory, read_members
from torch_utils.safe_files import MAX_JSON, read_member, unpacked_limit

__all__ = ["METADATA", "ArchiveReader"]

ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
METADATA = "dataset.json"
SHARD = re.compile(r"\d{5,6}")  # the numbered folders in archives of this project and of EDM are not classes
# What the readers of a ZIP raise for a member that is not where the directory says, or whose bytes changed.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, RuntimeError, EOFError, ValueError,
           ArithmeticError)  # fmt: skip
MEMBER_LIMIT = unpacked_limit(0)  # the most bytes that an image in a ZIP may have
INDEX_FROM = 1 << 20  # bytes of a ZIP's directory from which on its index is kept in a file: some 15,000 images


class ArchiveReader:
    """The images of a ZIP or a folder, in sorted order, and its `dataset.json`. Opening an archive reads no image.

    Images are numbered by row, 0 .. N - 1. `names` are their names relative to the root, with '/' between folders.
    Names, places and labels are arrays. Those of a large ZIP are mapped from its index file (`index_file`).

    UserError: the file is missing, unreadable or not a ZIP; it holds no images; `dataset.json` is not a JSON object
    with `labels`; members lead out of the archive, overlap, or are links or devices.
    """

    def __init__(self, path: str) -> None:
        self.path, self.paths = path, [path]
        self._file = None
        self._known: dict[str, Any] = {}  # what has been found out: labels, clean_labels, outliers, ...
        if os.path.isdir(path):
            self._list_folder()
            return
        self._file = dnnlib.open_file(path)  # stays open until `close`
        try:
            self._open_zip()
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, OverflowError, RuntimeError):
            self.close()
            raise dnnlib.UserError(f"{path}: not a ZIP file (or an incomplete one)") from None
        except dnnlib.UserError:
            self.close()
            raise

    def _list_folder(self) -> None:
        files = [os.fsencode(name) for name in sorted(_walk(self.path))]
        self._set_names(files, "folder")
        data = self._read_file(METADATA) if METADATA.encode() in files else None
        self._size = 0 if data is None else len(data)
        self._metadata = None if data is None else self._parse(data)

    def _open_zip(self) -> None:
        fd, self._size, self._lock = self._file.fileno(), os.fstat(self._file.fileno()).st_size, threading.Lock()
        directory = find_directory(fd, self._size)
        if directory[1] < INDEX_FROM:
            self._read_directory(*directory)
            return
        key = fingerprint(fd, *directory[:2], self._size)
        found = load_index(self.path, key)
        if found is None:
            with one_at_a_time(self._file):
                found = load_index(self.path, key)  # another process may have made it
                if found is None:
                    self._read_directory(*directory)
                    self._save(key)
                    found = load_index(self.path, key)  # its pages are shared, and the lists become garbage
        if found is not None:
            arrays, record = found
            self.names, self._entries = Names(arrays["names"], arrays["starts"]), arrays["entries"]
            self._root, self._metadata = record["root"], None
            self._table = self._entries.view(np.uint8)
            self._known = {key: arrays.get(key) for key in ("labels", "clean_labels")} | {
                "outliers": arrays["outliers"].astype(bool) if "outliers" in arrays else None,
                "class_names": record["class_names"],
                "corruption": record["corruption"],
            }

    @dnnlib.no_garbage()  # makes objects for each image, and throws few away
    def _read_directory(self, start: int, length: int, ahead: int) -> None:
        members = read_members(_read_fully(self._file.fileno(), length, start), self.path, ahead)
        files, self._entries = members.names, members.entries
        self._root = ""
        found = [
            name for name in files if name.endswith(METADATA.encode()) and name.split(b"/")[-1] == METADATA.encode()
        ]
        if len(found) == 1:  # which is not in the root when a whole folder was zipped
            root = found[0][: -len(METADATA)]
            self._root = root.decode()
            below = [row for row, name in enumerate(files) if name.startswith(root)] if root else None
            if below is not None:
                files, self._entries = [files[row][len(root) :] for row in below], self._entries[below]
        metadata = files.index(METADATA.encode()) if METADATA.encode() in files else None
        entry = None if metadata is None else self._entries[metadata].item()
        rows = self._set_names(files, "ZIP")
        self._entries = self._entries[rows]
        self._table = self._entries.view(np.uint8)
        self._metadata = (
            None if entry is None else self._parse(self._read_zip(entry, METADATA, unpacked_limit(self._size)))
        )

    def _set_names(self, files: list[bytes], kind: str) -> list[int]:
        """Take the names of the images among sorted files, and return their rows."""
        rows = _image_rows(files)
        if not rows:
            raise dnnlib.UserError(f"{self.path}: {kind} without images (.png, .jpg, ...)")
        self.names = Names.of([files[row] for row in rows])
        return rows

    def _save(self, key: str) -> None:
        """Write the index file, unless something in `dataset.json` is wrong: that is said only when it is needed."""
        try:
            found = {key: self.labels(key) for key in ("labels", "clean_labels")} | {"outliers": self.outliers()}
            record = dict(root=self._root, class_names=self.class_names(), corruption=self.corruption())
        except dnnlib.UserError:
            return
        arrays = dict(names=self.names.text, starts=self.names.starts, entries=self._entries)
        arrays |= {name: array.view(f"u{array.itemsize}") if array.dtype == bool else array
                   for name, array in found.items() if array is not None}  # fmt: skip
        save_index(self.path, key, arrays, record)

    def sizes(self) -> np.ndarray:
        """Return the bytes of every image file, int64 [N]."""
        if self._file is not None:
            return self._entries["size"].astype(np.int64)
        return np.fromiter((os.path.getsize(os.path.join(self.path, name)) for name in self.names), np.int64, len(self))

    def checksums(self) -> np.ndarray | None:
        """Return the CRC-32 of every image file, uint32 [N]; None for a folder, which does not state them."""
        return None if self._file is None else np.ascontiguousarray(self._entries["crc"])

    def close(self) -> None:
        """Close the ZIP. A folder has nothing to close."""
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """Return the name of an image for error messages: 'archive.zip: 00000/img00000000.png'."""
        return f"{self.path}: {self.names[row]}"

    def read(self, row: int) -> bytes:
        """Return the bytes of an image file. Threads need no lock. UserError names a file that is damaged."""
        if self._file is None:
            return self._read_file(self.names[row])
        return self._read_zip(ENTRY_FIELDS.unpack_from(self._table, row * ENTRY_FIELDS.size), row, MEMBER_LIMIT)

    def _read_file(self, name: str) -> bytes:
        try:
            with open(os.path.join(self.path, name), "rb") as f:
                return f.read()
        except OSError as err:
            raise dnnlib.UserError(f"{self.path}: {name}: cannot be read ({err.strerror or err})") from None

    def _read_zip(self, entry: tuple[int, ...], member: int | str, limit: int) -> bytes:
        """Read at given positions of the one open file: threads share no position, so they need no lock."""
        offset, packed, size, crc, method, flags = entry
        try:
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or flags & 1:
                return self._read_rare(self._name(member), limit)
            if max(size, packed) > limit:
                raise zipfile.BadZipFile
            fd = self._file.fileno()
            signature, name_length, extra_length = struct.unpack("<4s22xHH", os.pread(fd, 30, offset))
            if signature != b"PK\x03\x04":
                raise zipfile.BadZipFile
            data = os.pread(fd, packed, offset + 30 + name_length + extra_length)
            if len(data) < packed:
                data = _read_fully(fd, packed, offset + 30 + name_length + extra_length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            if len(data) != size or zlib.crc32(data) != crc:
                raise zipfile.BadZipFile
            return data
        except DAMAGED:
            raise dnnlib.UserError(f"{self.path}: {self._name(member)}: damaged (or encrypted) in the ZIP") from None

    def _name(self, member: int | str) -> str:
        return member if isinstance(member, str) else self.names[member]

    def _read_rare(self, name: str, limit: int) -> bytes:
        """Read an unusual compression with `zipfile`, which uses a lock and the position of the file.

        Forked processes would share that position, so each of them opens the file again.
        """
        with self._lock:
            if getattr(self, "_owner", None) != os.getpid():
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return read_member(self._zip, self._zip.getinfo(self._root + name), limit)

    def image(self, row: int) -> np.ndarray:
        """Return a decoded image, uint8 [H, W, C] with C = 1 or 3."""
        return decode_image(self.read(row), _Where(self, row))

    def _parse(self, data: bytes) -> dict[str, Any]:
        where = f"{self.path}: {METADATA}"
        metadata = load_lists(data, where, max(MAX_JSON, 16 * self._size))
        if not isinstance(metadata, dict) or "labels" not in metadata:
            raise dnnlib.UserError(f'{where}: lacks "labels" (a list of [file name, label] pairs, or null)')
        return metadata

    def _find(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def labels(self, key: str = "labels") -> np.ndarray | None:
        """Return the labels of all rows: int64 [N], float32 [N, D], or None when the archive has none.

        Without a `dataset.json`, images in two or more subfolders are labeled by folder (`class_names`).
        """
        return self._find(key, lambda: self._find_labels(key))

    def _find_labels(self, key: str) -> np.ndarray | None:
        if self._metadata is None:
            return self._folder_labels()[0] if key == "labels" else None
        if self._metadata.get(key) is None:
            return None
        return match_labels(self._metadata[key], self.names, f'{self.path}: {METADATA}: "{key}"')

    def class_names(self) -> list[str] | None:
        """Return the names of the classes: those in the metadata, else those of the subfolders, else None."""
        names = self._find("class_names", self._find_class_names)
        return names if names is None else list(names)

    def _find_class_names(self) -> list[str] | None:
        if self._metadata is None:
            return self._folder_labels()[1]
        names = self._metadata.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise dnnlib.UserError(f'{self.path}: {METADATA}: "class_names" must be a list of strings')
        return names

    def outliers(self) -> np.ndarray | None:
        """Return which images came from another source, bool [N]; None without a record."""
        return self._find("outliers", self._find_outliers)

    def _find_outliers(self) -> np.ndarray | None:
        listed = (self._metadata or {}).get("outliers")
        if listed is None:
            return None
        where, found = f'{self.path}: {METADATA}: "outliers"', np.zeros(len(self), dtype=bool)
        for piece in in_pieces(listed) or [[None]]:
            if not all(isinstance(name, str) for name in piece):
                raise dnnlib.UserError(f"{where} must be a list of file names")
            rows = {name: self.names.find(name) for name in piece}
            if absent := sorted(name for name, row in rows.items() if row is None):
                raise dnnlib.UserError(f"{where} names '{absent[0]}', which is not among the {len(self)} images")
            found[list(rows.values())] = True
        return found

    def corruption(self) -> dict[str, Any]:
        """Return what the archive records about its label noise and outliers, an empty dict without a record."""
        found = self._find("corruption", lambda: (self._metadata or {}).get("corruption"))
        return dict(found) if isinstance(found, dict) else {}

    def _folder_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        parts = [name.split("/")[:-1] for name in self.names]
        common = os.path.commonprefix(parts)  # compares whole folder names, since these are lists
        if any(len(part) == len(common) for part in parts):
            return None, None  # some images lie next to the subfolders, or all lie in one folder
        folders = [part[len(common)] for part in parts]
        classes = sorted(set(folders))
        if all(SHARD.fullmatch(name) for name in classes):
            return None, None
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in folders], dtype=np.int64), classes


class _Where:
    """The name of an image for error messages, which is put together only when there is an error."""

    __slots__ = ("_reader", "_row")

    def __init__(self, reader: ArchiveReader, row: int):
        self._reader, self._row = reader, row

    def __str__(self) -> str:
        return self._reader.where(self._row)


def _read_fully(fd: int, size: int, offset: int) -> bytes:
    """Return `size` bytes, fewer at the end of the file. One call of `pread` returns at most 2 GiB."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def _image_rows(files: list[bytes]) -> list[int]:
    """Return which of the names in UTF-8 are images, and not hidden."""
    rows = [row for row, name in enumerate(files) if name.lower().endswith(ENDINGS)]
    text = b"/".join([b"", *files])
    if b"/." in text or b"/__MACOSX" in text:
        rows = [row for row in rows if not files[row].startswith(b"__MACOSX/") and b"/." not in b"/" + files[row]]
    return rows


def _walk(path: str) -> Iterator[str]:
    def fail(err: OSError) -> None:
        raise dnnlib.UserError(f"{err.filename or path}: cannot be read ({err.strerror or err})")

    root = os.path.realpath(path)
    for folder, _folders, files in os.walk(path, onerror=fail):
        prefix = os.path.relpath(folder, path).replace(os.sep, "/")
        for name in files:
            member = name if prefix == "." else f"{prefix}/{name}"
            if member == METADATA or _image_rows([os.fsencode(member)]):
                _check_file(os.path.join(folder, name), root, f"{path}: {member}")
            yield member


def _check_file(path: str, root: str, where: str) -> None:
    """Raise UserError for what is not a file (a device never ends, a pipe waits) and for links out of the folder."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise dnnlib.UserError(f"{where}: is a link to a file outside the folder; replace it by a copy")
            mode = os.stat(path).st_mode
    except (OSError, ValueError) as err:
        raise dnnlib.UserError(f"{where}: cannot be read ({getattr(err, 'strerror', None) or err})") from None
    if not stat.S_ISREG(mode):
        raise dnnlib.UserError(f"{where}: is not a regular file")
