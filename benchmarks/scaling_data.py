"""Measurements of data at scale: the order of an epoch, which process reads which image, opening a large archive."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
import psutil
import torch

from archives.dataset import BatchStream, ImageDataset

__all__ = ["each_image_once", "opening_cost", "order_cost", "synthetic_archive"]


class Numbers:
    """A data set of `n` images without pixels."""

    path, cache = "numbers", False

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.empty([len(indices), 0])

    def onehot(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.empty([len(indices), 0])


def each_image_once(images: int, processes: int, batch: int, epochs: int = 3, seed: int = 0) -> bool:
    """Return whether all processes together read every image exactly once in each of the first `epochs` epochs.

    The processes do not communicate.
    """
    steps = -(-images * epochs // (batch * processes))
    order = np.empty([steps, processes, batch], dtype=np.int64)
    for rank in range(processes):
        stream = BatchStream(Numbers(images), batch, rank, processes, seed)
        for step in range(steps):
            next(stream)
            order[step, rank] = stream.items.numpy()
        stream.close()
    passes = order.reshape(-1)[: images * epochs].reshape(epochs, images)
    return bool((np.sort(passes, axis=1) == np.arange(images)).all())


def order_cost(images: int) -> dict[str, float]:
    """Measure the seconds and bytes that the order of an epoch costs each process.

    `peak` is the number of bytes while a batch lies in two epochs.
    """
    stream = BatchStream(Numbers(images), 1)
    start = time.process_time()
    order = stream._order(0)
    seconds = time.process_time() - start
    items = stream._items.nbytes
    return dict(images=images, seconds=seconds, bytes=items + order.nbytes, peak=items + 2 * order.nbytes)


def synthetic_archive(path: str, images: int, labels: bool) -> int:
    """Write a ZIP of `images` copies of a black 1x1 PNG, one stored entry each. Return the bytes of its directory.

    This writes the bytes itself, because zipfile needs a minute for a million entries. It leaves out ZIP64's extra
    fields, so offsets must stay below 4 GiB.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
    )
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(images)]
    members = [("dataset.json", json.dumps(dict(labels=[[name, i % 1000] for i, name in enumerate(names)])).encode())]
    members = members if labels else []
    directory, offset, count, image = [], 0, 0, (len(png), zlib.crc32(png))
    with open(path, "wb") as file:
        for name, data in [*members, *((name, None) for name in names)]:
            size, crc = image if data is None else (len(data), zlib.crc32(data))
            common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, crc, size, size, len(name), 0)
            directory.append(b"PK\1\2\x14\0" + common + struct.pack("<HHHII", 0, 0, 0, 0, offset) + name.encode())
            record = b"PK\3\4" + common + name.encode() + (png if data is None else data)
            file.write(record)
            offset, count = offset + len(record), count + 1
        whole = b"".join(directory)
        file.write(whole)
        where = offset + len(whole)
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(whole), offset))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, where, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return len(whole)


def opening_cost(images: int, labels: bool) -> dict[str, float]:
    """Measure the seconds and bytes of memory that a new process needs to open a synthetic archive.

    The first opening writes the index (`archives.index_file`), which takes `first` seconds and `peak` bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "many.zip")
        directory = synthetic_archive(path, images, labels)
        command = [sys.executable, "-m", "benchmarks.scaling_data", path]
        first, later = (
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)
        )
    costs = dict(first=first["seconds"], peak=first["peak"], seconds=later["seconds"], bytes=later["bytes"])
    return dict(images=images, labels="1,000 classes" if labels else "none", directory=directory, **costs)


def main(path: str) -> None:
    """Open an archive, and print the CPU seconds and bytes of memory that this took and took at most, as JSON."""
    before, start = psutil.Process().memory_info().rss, time.process_time()
    dataset = ImageDataset(path)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(dict(seconds=seconds, bytes=psutil.Process().memory_info().rss - before, peak=peak - before)))
    assert len(dataset)


if __name__ == "__main__":
    main(sys.argv[1])
