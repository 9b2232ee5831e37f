"""Read the directory of a ZIP into arrays, and refuse one that lies.

`zipfile` makes a Python object for each member, 570 MB for a million. Format: APPNOTE.TXT of PKWARE, sections 4.3 and
4.5.3.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import dnnlib

__all__ = ["ENTRY", "ENTRY_FIELDS", "check_name", "find_directory", "list_names", "plain_names", "read_members"]

# Where a member is and how it is stored. Members of 4 GiB or more are stated as 4 GiB: no image is as large.
ENTRY = np.dtype(
    [("offset", "<i8"), ("packed", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")]
)
ENTRY_FIELDS = struct.Struct("<q3I2H")  # the same; for one entry it is faster than NumPy
RECORD = np.dtype(
    [("signature", "<u4"), ("made", "u1"), ("system", "u1"), ("version", "<u2"), ("flags", "<u2"), ("method", "<u2"),
     ("time", "<u4"), ("crc", "<u4"), ("packed", "<u4"), ("size", "<u4"), ("name", "<u2"), ("extra", "<u2"),
     ("comment", "<u2"), ("disk", "<u2"), ("internal", "<u2"), ("external", "<u4"), ("offset", "<u4")]
)  # fmt: skip
END, LOCATOR, END_64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
UTF8, MANY = 0x800, 0xFFFFFFFF  # flag of names in UTF-8; "see the extra field"
UNICODE_PATH = 0x7075  # extra field of Info-ZIP with the name in UTF-8


@dataclass
class Members:
    """The members of a ZIP, sorted by name."""

    names: list[bytes]  # UTF-8
    entries: np.ndarray  # ENTRY [N]
    folders: list[bytes]  # the folders that have a member of their own


def find_directory(fd: int, size: int) -> tuple[int, int, int]:
    """Return where the directory of a ZIP of `size` bytes begins, its length, and the bytes in front of the ZIP.

    BadZipFile: this is no complete ZIP.
    """
    start = max(0, size - END.size - 0xFFFF)
    tail = os.pread(fd, size - start, start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise zipfile.BadZipFile
    length, offset = END.unpack_from(tail, at)[5:7]
    end = start + at
    if end >= LOCATOR.size + END_64.size:
        before = os.pread(fd, LOCATOR.size + END_64.size, end - LOCATOR.size - END_64.size)
        if before[END_64.size :].startswith(b"PK\x06\x07") and before.startswith(b"PK\x06\x06"):
            length, offset = END_64.unpack_from(before)[8:10]
            end -= len(before)
    if length > end or offset > end - length:
        raise zipfile.BadZipFile
    return end - length, length, end - length - offset


def list_names(path: str) -> list[str]:
    """Return the names of the files in a ZIP, sorted. UserError: the file is no readable ZIP, or lies about itself."""
    with dnnlib.open_file(path) as file:
        try:
            start, length, ahead = find_directory(file.fileno(), os.fstat(file.fileno()).st_size)
            file.seek(start)
            return [
                name.decode("utf-8", "surrogateescape") for name in read_members(file.read(length), path, ahead).names
            ]
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, OverflowError):
            raise dnnlib.UserError(f"{path}: not a ZIP file (or an incomplete one)") from None


def read_members(data: bytes, path: str, ahead: int = 0) -> Members:
    """Return the members that the directory `data` lists; `ahead` bytes come before the ZIP in its file.

    BadZipFile or ValueError: damaged. UserError names a member that leads out of the archive, occurs twice, is a link
    or a device, or overlaps another one.
    """
    places, place = [], 0
    while place < len(data):
        places.append(place)
        name, extra, comment = struct.unpack_from("<3H", data, place + 28)
        place += RECORD.itemsize + name + extra + comment
    if place > len(data):
        raise zipfile.BadZipFile
    records = _gather(data, np.array(places, dtype=np.int64))
    if (records["signature"] != 0x02014B50).any():
        raise zipfile.BadZipFile
    begins = np.array(places, dtype=np.int64) + RECORD.itemsize
    names = plain_names(_names(data, begins, records), path)
    entries = np.empty(len(names), ENTRY)
    for field in ("crc", "method", "flags"):
        entries[field] = records[field]
    sizes = [records[field].astype(np.int64) for field in ("size", "packed", "offset")]
    _read_extras(data, begins + records["name"], records, sizes)
    entries["size"], entries["packed"] = (np.minimum(values, MANY) for values in sizes[:2])
    entries["offset"] = sizes[2] + ahead
    order = _sorted(names)
    if order is not None:
        names, entries, records = [names[i] for i in order], entries[order], records[order]
        sizes = [values[order] for values in sizes]
    _check(names, records, sizes[1], entries["offset"], path)
    folders = []
    if b"/\0" in b"\0".join([*names, b""]):  # no name has this sign, see `_names`
        files = [i for i, name in enumerate(names) if not name.endswith(b"/")]
        folders = [name.rstrip(b"/") for name in names if name.endswith(b"/")]
        names, entries = [names[i] for i in files], entries[files]
    return Members(names, entries, folders)


def _gather(data: bytes, places: np.ndarray) -> np.ndarray:
    """Return the records that begin at `places`, RECORD [N]."""
    table = np.empty([len(places), RECORD.itemsize], np.uint8)
    text, step = np.frombuffer(data, np.uint8), 1 << 16
    for i in range(0, len(places), step):
        table[i : i + step] = text[places[i : i + step, None] + np.arange(RECORD.itemsize)]
    return table.reshape(-1).view(RECORD)


def _names(data: bytes, begins: np.ndarray, records: np.ndarray) -> list[bytes]:
    ends = begins + records["name"]
    names = [data[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
    text = b"".join(names)
    if b"\0" in text:
        names = [name.split(b"\0")[0] for name in names]
    if not text.isascii():
        utf8 = (records["flags"] & UTF8).astype(bool).tolist()
        for row, name in enumerate(names):
            if utf8[row]:
                name.decode("utf-8")  # ValueError
            elif not name.isascii():
                place = int(ends[row])
                names[row] = _guess(name, data[place : place + int(records["extra"][row])])
    return names


def _guess(name: bytes, extra: bytes) -> bytes:
    """Return a name whose member does not say in which alphabet it is, in UTF-8.

    It is what the extra field of Info-ZIP says if that belongs to this name; else UTF-8, as on a Mac, if it can be;
    else in the alphabet of the first PCs. Format: APPNOTE.TXT, section 4.6.9.
    """
    for kind, content in _fields(extra):
        if kind == UNICODE_PATH and content[:1] == b"\1" and content[1:5] == struct.pack("<I", zlib.crc32(name)):
            content[5:].decode("utf-8")  # ValueError
            return content[5:].split(b"\0")[0]
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437").encode()
    return name


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (kind, content) of the fields in the extra field of a member."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        yield kind, extra[place + 4 : place + 4 + length]
        place += 4 + length


def _read_extras(data: bytes, begins: np.ndarray, records: np.ndarray, sizes: list[np.ndarray]) -> None:
    """Put into `sizes` (unpacked, packed, offset) the 64-bit numbers of members that are large or far behind."""
    for row in np.flatnonzero((sizes[0] == MANY) | (sizes[1] == MANY) | (sizes[2] == MANY)).tolist():
        place = int(begins[row])
        for kind, content in _fields(data[place : place + int(records["extra"][row])]):
            if kind == 1:
                numbers = list(struct.unpack_from(f"<{len(content) // 8}Q", content))
                for values in sizes:
                    if values[row] == MANY and numbers:
                        values[row] = min(numbers.pop(0), 1 << 60)


def _sorted(names: list[bytes]) -> list[int] | None:
    """Return the order that sorts names, None if they are sorted."""
    if all(map(bytes.__le__, names[:-1], names[1:])):
        return None
    return sorted(range(len(names)), key=names.__getitem__)


def _check(names: list[bytes], records: np.ndarray, packed: np.ndarray, offsets: np.ndarray, path: str) -> None:
    """Raise UserError for members that occur twice, are links, or overlap."""

    def where(row: int) -> str:
        return f"{path}: {names[row].decode()}"

    twice = next((row for row in range(1, len(names)) if names[row] == names[row - 1]), None)
    if twice is not None:
        raise dnnlib.UserError(f"{where(twice)}: occurs twice in the ZIP")
    kinds = stat.S_IFMT(0xFFFF) & (records["external"] >> 16)
    for row in np.flatnonzero((kinds != 0) & (kinds != stat.S_IFREG) & (kinds != stat.S_IFDIR))[:1].tolist():
        kind = "link" if kinds[row] == stat.S_IFLNK else "special file"
        raise dnnlib.UserError(f"{where(row)}: is a {kind}, not an image")
    order = np.argsort(offsets, kind="stable")
    ends = offsets + 30 + records["name"] + packed
    for i in np.flatnonzero(offsets[order[1:]] < ends[order[:-1]])[:1].tolist():
        # A few bytes could unfold into very many images.
        raise dnnlib.UserError(f"{where(int(order[i + 1]))}: overlaps the member before it")


def plain_names(names: list[bytes], path: str) -> list[bytes]:
    """Return names with '/' between folders, whatever stood there: a backslash, as on Windows, '//' or '/./'.

    UserError: a name leads out of the archive `path`.
    """
    text = b"\0".join([b"", *names])
    if not any(sign in text for sign in (b"..", b":", b"\\", b"\0/", b"\0./", b"/./", b"//")):
        return names
    plain = []
    for name in names:
        shown = name.decode("utf-8", "surrogateescape")
        check_name(shown, f"{path}: {shown}")
        *folders, last = name.replace(b"\\", b"/").split(b"/")
        plain.append(b"/".join([*(part for part in folders if part not in (b"", b".")), last]) or b"/")
    return plain


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that would lead out of the folder into which the member is unpacked."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise dnnlib.UserError(f"{where}: the name leads out of the archive")
