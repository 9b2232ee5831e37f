"""Writing uncompressed ZIPs: members get their places in one process and can be written by several."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import dnnlib

__all__ = ["Member", "ZipWriter"]

LIMIT, COUNT_LIMIT = (1 << 31) - 1, (1 << 16) - 1  # of offsets and members; beyond them the ZIP64 fields, as zipfile
VERSION, VERSION_64 = 20, 45  # of the format: what unpacking needs
UNIX, MODE = 3, 0o100644 << 16  # the members unpack as rw-r--r--
DATE = 33  # 1980-01-01, the first there is
UTF8 = 0x800
HEADER, ENTRY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s2B5H3I5H2I")  # of a member, and in the directory

Member = tuple[str, int, int]  # name, size, CRC-32


class ZipWriter:
    """What `zipfile` would write for stored members dated 1980, byte for byte, into an empty file `fd`.

    `reserve` gives members their places, `write` fills them, also from a forked process; nothing is complete before
    `close`. (`zipfile` writes every header twice, with two seeks between: for small images most of the work.)
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._end = fd, 0
        self._directory: list[bytes] = []

    def reserve(self, members: Sequence[Member]) -> int:
        """Puts members behind those there are; where `write` is to put them. UserError: 4 GiB or more in one."""
        start = self._end
        for name, size, crc in members:
            if size >> 32:
                raise dnnlib.UserError(f"{name}: has {size:,} bytes, more than a member of a ZIP can have")
            encoded, version, where, extra = name.encode(), VERSION, self._end, b""
            if where > LIMIT:
                version, where, extra = VERSION_64, 0xFFFFFFFF, struct.pack("<HHQ", 1, 8, where)
            self._directory.append(ENTRY.pack(
                b"PK\x01\x02", version, UNIX, version, _flags(name, encoded), 0, 0, DATE, crc, size, size, len(encoded),
                len(extra), 0, 0, 0, MODE, where) + encoded + extra)  # fmt: skip
            self._end += HEADER.size + len(encoded) + size
        return start

    def write(self, offset: int, members: Sequence[Member], contents: Sequence[bytes]) -> None:
        """Writes members to the place that they were given."""
        parts: list[bytes] = []
        for (name, size, crc), data in zip(members, contents, strict=True):
            encoded = name.encode()
            flags = _flags(name, encoded)
            header = HEADER.pack(b"PK\x03\x04", VERSION, flags, 0, 0, DATE, crc, size, size, len(encoded), 0)
            parts += (header, encoded, data)
        _write_fully(self._fd, b"".join(parts), offset)

    def close(self) -> None:
        """Writes the directory; the file itself stays open."""
        start, count = self._end, len(self._directory)
        directory = b"".join(self._directory)
        size = len(directory)
        tail = [directory]
        if count > COUNT_LIMIT or start > LIMIT or size > LIMIT:
            numbers = (44, VERSION_64, VERSION_64, 0, 0, count, count, size, start)
            tail.append(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *numbers))
            tail.append(struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1))
        count, size, where = min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
        tail.append(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, where, 0))
        _write_fully(self._fd, b"".join(tail), start)


def _flags(name: str, encoded: bytes) -> int:
    return 0 if len(encoded) == len(name) else UTF8


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    """`os.pwrite` until all is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
