"""Read image archives (a ZIP or a folder) from any number of threads: names, labels, decoded images.

The reader accepts what the tools of EDM, StyleGAN and TDSM write, folders with one subfolder per class, and plain
folders of images (`archives.listing`, `archives.folder_labels`).
"""

from __future__ import annotations

import contextlib
import lzma
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import dnnlib
from archives.decode import Color, DamagedFile, decode_image
from archives.folder_labels import FolderLabels, label_by_folder
from archives.index_file import fingerprint, load_index, one_at_a_time, save_index
from archives.json_lists import in_pieces, load_lists
from archives.labels import match_labels, match_origins, text_classes
from archives.listing import METADATA, as_text, examine, list_folder, note_unread
from archives.names import Names
from archives.table_labels import label_by_table, note_tables
from archives.zip_directory import ENTRY_FIELDS, find_directory, read_members
from torch_utils.safe_files import MAX_JSON, read_member, unpacked_limit

__all__ = ["METADATA", "ArchiveReader"]

# What the readers of a ZIP raise for a member that is not where the directory says, or whose bytes changed.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, RuntimeError, EOFError, ValueError,
           ArithmeticError)  # fmt: skip
LABELS = ("labels", "clean_labels", "previous_labels")  # lists of labels in `dataset.json`
MEMBER_LIMIT = unpacked_limit(0)  # the most bytes that an image in a ZIP may have
INDEX_FROM = 1 << 20  # bytes of a ZIP's directory from which on its index is kept in a file: some 15,000 images


class ArchiveReader:
    """The images of a ZIP or a folder, in sorted order, and its `dataset.json`. Opening an archive reads no image.

    Images are numbered by row, 0 .. N - 1. `names` are their names relative to the root, with '/' between folders.
    `background` is the color behind transparent pixels, which are refused without it (see `decode_image`).
    Names, places and labels are arrays. Those of a large ZIP are mapped from its index file (`index_file`).
    `notes` says in one line each what was left out or may be a mistake.

    UserError: the file is missing, unreadable or not a ZIP; it holds no images; `dataset.json` is not a JSON object
    with `labels`; members lead out of the archive, overlap, or are links or devices.
    """

    def __init__(self, path: str, background: Color | None = None) -> None:
        self.path, self.paths, self._background = path, [path], background
        self._file = None
        self._known: dict[str, Any] = {}  # what has been found out: labels, clean_labels, outliers, ...
        self._root, self._disk = "", {}  # of a folder: where the names begin, {name: another name on the disk}
        self._list = None  # of a ZIP: where `dataset.json` is, the fields of an ENTRY
        self.notes: list[str] = []
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
        files, folders, self._disk = list_folder(self.path)

        def read(row: int) -> bytes:
            data = self._read_file(as_text(files[row])[len(self._root) :])
            self._size = len(data)
            return data

        self._take(files, folders, "folder", read)

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
            self._metadata, self.notes = None, record["notes"]
            self._table = self._entries.view(np.uint8)
            self._list = record["list"]
            self._known = {key: arrays.get(key) for key in LABELS} | {
                "outliers": arrays["outliers"].astype(bool) if "outliers" in arrays else None,
                "class_names": record["class_names"],
                "corruption": record["corruption"],
            }

    @dnnlib.no_garbage()  # makes objects for each image, and throws few away
    def _read_directory(self, start: int, length: int, ahead: int) -> None:
        members = read_members(_read_fully(self._file.fileno(), length, start), self.path, ahead)
        self._entries = entries = members.entries

        def read(row: int) -> bytes:
            return self._read_zip(entries[row].item(), as_text(members.names[row]), unpacked_limit(self._size))

        self._entries = entries[self._take(members.names, members.folders, "ZIP", read)]
        self._table = self._entries.view(np.uint8)

    def _take(
        self, files: list[bytes], folders: list[bytes], kind: str, read: Callable[[int], bytes]
    ) -> np.ndarray | list[int]:
        """Take names, `dataset.json` and labels by folder from an archive's files; return the rows of its images.

        `read` returns the bytes of `dataset.json` or of a table, given its row.
        """
        found = examine(files, self.path, kind)
        self._root, self.notes = as_text(found.root), found.notes
        self._metadata = None if found.metadata is None else self._parse(read(found.metadata))
        self._list = None if found.metadata is None or self._file is None else self._entries[found.metadata].item()
        rows, names = found.images, [files[row] for row in found.images]
        if found.root:
            names = [name[len(found.root) :] for name in names]
        if self._metadata is None:
            by_table, notes, tables = label_by_table(
                names, found.others, lambda name: read(files.index(name)), self.path, kind
            )
            self._by_folder = by_table or label_by_folder(names, folders, found.others, self.path, kind)
            self.notes += notes + self._by_folder.notes
            tables |= self._by_folder.named
            found.others = [name for name in found.others if name not in tables]
            if self._by_folder.kept is not None:
                rows, names = ([values[i] for i in self._by_folder.kept] for values in (rows, names))
        self.notes += note_unread(found.others, self.path) + note_tables(found.others, self.path, kind)
        self.names = Names.of(names)
        return rows

    def _save(self, key: str) -> None:
        """Write the index file, unless something in `dataset.json` is wrong: that is said only when it is needed."""
        try:
            found = {key: self.labels(key) for key in LABELS} | {"outliers": self.outliers()}
            record = dict(class_names=self.class_names(), corruption=self.corruption())
            record |= dict(list=self._list, notes=self.notes)
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
        return np.fromiter((os.path.getsize(self._disk_path(name)) for name in self.names), np.int64, len(self))

    def checksums(self) -> np.ndarray | None:
        """Return the CRC-32 of every image file, uint32 [N]; None for a folder, which does not state them."""
        return None if self._file is None else np.ascontiguousarray(self._entries["crc"])

    def close(self) -> None:
        """Close the ZIP. A folder has nothing to close."""
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> object:
        """Return what messages call an image, as text: 'archive.zip: 00000/img00000000.png (cat/a.jpg)'."""
        return _Where(self, row)

    def shown_name(self, row: int) -> str:
        """Return the name of an image, with its original path where the archive knows it."""
        origins = None
        with contextlib.suppress(dnnlib.UserError):  # of a damaged `dataset.json`: the message is about something else
            origins = self.source_names()
        return self.names[row] if origins is None else f"{self.names[row]} ({origins[row]})"

    def source_names(self) -> list[str] | None:
        """Return the original paths of the images, None where the archive does not know them. Reads `dataset.json`."""
        return self._find("source_names", self._find_source_names)

    def _find_source_names(self) -> list[str] | None:
        metadata = self._metadata
        if metadata is None and self._list is not None:  # opened by its index
            metadata = self._parse(self._read_zip(tuple(self._list), METADATA, unpacked_limit(self._size)))
        pairs = (metadata or {}).get("source_names")
        where = f'{self.path}: {METADATA}: "source_names"'
        return None if pairs is None else match_origins(pairs, self.names, where)

    def read(self, row: int) -> bytes:
        """Return the bytes of an image file. Threads need no lock. UserError names a file that is damaged."""
        if self._file is None:
            return self._read_file(self.names[row])
        return self._read_zip(ENTRY_FIELDS.unpack_from(self._table, row * ENTRY_FIELDS.size), row, MEMBER_LIMIT)

    def _disk_path(self, name: str) -> str:
        name = self._root + name
        return os.path.join(self.path, self._disk.get(os.fsencode(name), name) if self._disk else name)

    def file(self, row: int) -> str:
        """Return the path of the file that an image is in: of the ZIP, or its own in a folder."""
        return self._disk_path(self.names[row]) if self._file is None else self.path

    def _read_file(self, name: str) -> bytes:
        try:
            with open(self._disk_path(name), "rb") as f:
                return f.read()
        except OSError as err:
            raise DamagedFile(f"{self.path}: {name}", f"cannot be read ({err.strerror or err})") from None

    def _read_zip(self, entry: tuple[int, ...], member: int | str, limit: int) -> bytes:
        """Read at given positions of the one open file: threads share no position, so they need no lock."""
        offset, packed, size, crc, method, flags = entry
        try:
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or flags & 1:
                return self._read_rare(offset, crc, limit)
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
            raise DamagedFile(f"{self.path}: {self._name(member)}", "damaged (or encrypted) in the ZIP") from None

    def _name(self, member: int | str) -> str:
        return member if isinstance(member, str) else self.shown_name(member)

    def _read_rare(self, offset: int, crc: int, limit: int) -> bytes:
        """Read an unusual compression with `zipfile`, which uses a lock and the position of the file.

        Forked processes would share that position, so each of them opens the file again.
        """
        with self._lock:
            if getattr(self, "_owner", None) != os.getpid():
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
                self._infos = {info.header_offset: info for info in self._zip.infolist()}
        info = self._infos.get(offset)
        if info is None or info.CRC != crc:  # only an index that somebody forged
            raise zipfile.BadZipFile
        return read_member(self._zip, info, limit)

    def image(self, row: int) -> np.ndarray:
        """Return a decoded image, uint8 [H, W, C] with C = 1 or 3."""
        return decode_image(self.read(row), self.where(row), self._background)

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
            return self._folder_classes().labels if key == "labels" else None
        if self._metadata.get(key) is None:
            return None
        where = f'{self.path}: {METADATA}: "{key}"'
        return match_labels(self._metadata[key], self.names, where, self.class_names(), self.notes)

    def class_names(self) -> list[str] | None:
        """Return the names of the classes: those in the metadata, else those of the subfolders, else None."""
        names = self._find("class_names", self._find_class_names)
        return names if names is None else list(names)

    def _find_class_names(self) -> list[str] | None:
        if self._metadata is None:
            return self._folder_classes().class_names
        names = self._metadata.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise dnnlib.UserError(f'{self.path}: {METADATA}: "class_names" must be a list of strings')
        if names is None:  # labels may be names
            return text_classes([self._metadata.get(key) for key in LABELS[:2]], f"{self.path}: {METADATA}")
        return names

    @property
    def has_list(self) -> bool:
        """Whether `dataset.json` numbers the classes; else they have the alphabetical order of folders or texts."""
        return self._metadata is not None or self._list is not None

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
            rows = {name: self.names.find(name.replace("\\", "/")) for name in piece}
            if absent := sorted(name for name, row in rows.items() if row is None):
                raise dnnlib.UserError(f"{where} names '{absent[0]}', which is not among the {len(self)} images")
            found[list(rows.values())] = True
        return found

    def corruption(self) -> dict[str, Any]:
        """Return what the archive records about its label noise and outliers, an empty dict without a record."""
        found = self._find("corruption", lambda: (self._metadata or {}).get("corruption"))
        return dict(found) if isinstance(found, dict) else {}

    def _folder_classes(self) -> FolderLabels:
        if self._by_folder.problem is not None:
            raise dnnlib.UserError(self._by_folder.problem)
        return self._by_folder


class _Where:
    """The name of an image for error messages, which is put together only when there is an error."""

    __slots__ = ("_reader", "_row")

    def __init__(self, reader: ArchiveReader, row: int):
        self._reader, self._row = reader, row

    def __str__(self) -> str:
        return f"{self._reader.path}: {self._reader.shown_name(self._row)}"


def _read_fully(fd: int, size: int, offset: int) -> bytes:
    """Return `size` bytes, fewer at the end of the file. One call of `pread` returns at most 2 GiB."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
