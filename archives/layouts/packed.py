"""Read compressed files without unpacking more of them than an honest one holds."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import tarfile
import zlib

from torch_utils.safe_files import unpacked_limit

__all__ = ["DAMAGED", "Unpacked"]

# What damaged .gz and .tar files raise.
DAMAGED = (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, struct.error, tarfile.TarError)


class Unpacked:
    """A file, unpacked if it is compressed, of which `tarfile` can read a limited number of bytes in all.

    The limit holds whatever sizes the headers in the file claim.
    """

    def __init__(self, path: str):
        with open(path, "rb") as file:
            magic = file.read(6)
        packed = {b"\x1f\x8b": gzip, b"BZ": bz2, b"\xfd7": lzma}.get(magic[:2])
        self._file = packed.open(path) if packed else open(path, "rb")
        self._left = unpacked_limit(os.path.getsize(path))
        self.tell, self.close = self._file.tell, self._file.close

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise tarfile.ReadError("unpacks into too much")
        data = self._file.read(size)
        self._left -= len(data)
        return data

    def seek(self, position: int) -> int:
        # Moving forward in a compressed file unpacks what is skipped, so it counts.
        ahead = position - self._file.tell()
        if ahead < 0:
            return self._file.seek(position)
        while ahead > 0 and (data := self.read(min(ahead, 1 << 20))):
            ahead -= len(data)
        return self._file.tell()
