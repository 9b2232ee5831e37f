"""Writing uncompressed ZIPs: members get their places in one process and can be written by several."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import dnnlib

__all__ = ["ZipWriter"]

LIMIT, COUNT_LIMIT = (1 << 31) - 1, (1 << 16) - 1  # of offsets and members; beyond them the ZIP64 fields, as zipfile
VERSION, VERSION_64 = 20, 45  # of the format: what unpacking needs
UNIX, MODE = 3, 0o100644 << 16  # the members unpack as rw-r--r--
SYNC = 1 << 24  # bytes that may wait for their way to the disk
DATE = 33  # 1980-01-01, the first there is
UTF8 = 0x800
HEADER, ENTRY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s2B5H3I5H2I")  # of a member, and in the directory


class ZipWriter:
    """What `zipfile` would write for stored members dated 1980, byte for byte, into an empty file `fd`.

    `reserve` gives members their place, `write` fills it, also from a forked process, and `record` takes note of what
    was written, in the order of the places; nothing is complete before `close`. What is there goes to the disk while
    more is being made. (`zipfile` writes every header twice, with two seeks between: for small images most of it.)
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._end, self._count = fd, 0, 0
        self._directory: list[bytes] = []
        self._disk, self._synced = ThreadPoolExecutor(1), 0  # its thread starts with the first work: after forks
        self._syncs: list[Future[None]] = []

    def reserve(self, count: int, size: int) -> int:
        """Room behind what is there for `count` members, `size` bytes of names and contents; returns where."""
        start = self._end
        self._end += count * HEADER.size + size
        self._count += count
        if self._end - self._synced > SYNC:
            self._synced = self._end
            self._syncs.append(self._disk.submit(os.fsync, self._fd))
        return start

    def write(self, offset: int, names: Sequence[str], contents: Sequence[bytes]) -> bytes:
        """Writes members to their place; returns their part of the directory. UserError: 4 GiB or more in one."""
        parts: list[bytes] = []
        directory: list[bytes] = []
        where = offset
        for name, data in zip(names, contents, strict=True):
            encoded, size, crc = name.encode(), len(data), zlib.crc32(data)
            if size >> 32:
                raise dnnlib.UserError(f"{name}: has {size:,} bytes, more than a member of a ZIP can have")
            flags, length, version, start, extra = 0, len(encoded), VERSION, where, b""
            if length != len(name):
                flags = UTF8
            if where > LIMIT:
                version, start, extra = VERSION_64, 0xFFFFFFFF, struct.pack("<HHQ", 1, 8, where)
            header = HEADER.pack(b"PK\x03\x04", VERSION, flags, 0, 0, DATE, crc, size, size, length, 0)
            entry = ENTRY.pack(
                b"PK\x01\x02",
                version,
                UNIX,
                version,
                flags,
                0,
                0,
                DATE,
                crc,
                size,
                size,
                length,
                len(extra),
                0,
                0,
                0,
                MODE,
                start,
            )
            parts += (header, encoded, data)
            directory += (entry, encoded, extra)
            where += HEADER.size + length + size
        _write_fully(self._fd, b"".join(parts), offset)
        return b"".join(directory)

    def record(self, directory: Sequence[bytes]) -> None:
        """Takes what `write` returned."""
        self._directory += directory

    def stop(self) -> None:
        """Ends the thread that waits for the disk; in place of `close` when nothing is to be completed."""
        self._disk.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Writes the directory; the file itself stays open."""
        self._disk.shutdown()
        for sync in self._syncs:
            sync.result()  # raises what the disk refused
        start, count = self._end, self._count
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


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    """`os.pwrite` until all is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
