"""Write uncompressed ZIPs: one process gives the members their places, several can write them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import dnnlib

__all__ = ["ZipWriter"]

LIMIT, COUNT_LIMIT = (1 << 31) - 1, (1 << 16) - 1  # of offsets and members; ZIP64 fields beyond them, as in zipfile
VERSION, VERSION_64 = 20, 45  # of the format, which unpacking needs
UNIX, MODE = 3, 0o100644 << 16  # the members unpack as rw-r--r--
SYNC = 1 << 24  # bytes that may be written before the system is asked to put them on disk
DATE = 33  # 1980-01-01, the earliest that the format knows
UTF8 = 0x800
HEADER, ENTRY = struct.Struct("<4s5H3I2H"), struct.Struct("<4s2B5H3I5H2I")  # of a member, and in the directory


class ZipWriter:
    """Writes a ZIP into the empty file `fd`: byte for byte what `zipfile` writes for stored members dated 1980.

    `reserve` gives members their place. `write` fills it, also from a forked process. `record` takes note of what was
    written, in the order of the places. The ZIP is complete only after `close`. A thread puts the first members on disk
    while later ones are made. (`zipfile` writes every header twice, with two seeks in between; for small images that
    takes most of its time.)
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._end, self._count = fd, 0, 0
        self._directory: list[bytes] = []
        self._disk, self._synced = ThreadPoolExecutor(1), 0  # The thread starts with its first work: after forks.
        self._syncs: list[Future[None]] = []

    def reserve(self, count: int, size: int) -> int:
        """Reserve room at the end for `count` members, `size` bytes of names and contents, and return its offset."""
        start = self._end
        self._end += count * HEADER.size + size
        self._count += count
        if self._end - self._synced > SYNC:
            self._synced = self._end
            self._syncs.append(self._disk.submit(os.fsync, self._fd))
        return start

    def write(self, offset: int, names: Sequence[str], contents: Sequence[bytes]) -> bytes:
        """Write members to their place and return their part of the directory. UserError: one has 4 GiB or more."""
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
        """Take note of what `write` returned."""
        self._directory += directory

    def stop(self) -> None:
        """End the thread that waits for the disk. Call it instead of `close` to abandon the file."""
        self._disk.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Write the directory; the file itself stays open. OSError: the disk refused an earlier part."""
        self._disk.shutdown()
        for sync in self._syncs:
            sync.result()
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
    """Call `os.pwrite` until everything is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
