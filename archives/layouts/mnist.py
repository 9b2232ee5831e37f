"""MNIST and Fashion-MNIST: idx files, gzipped as published or unpacked."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct

import numpy as np

import dnnlib
from archives.layouts.packed import DAMAGED
from archives.source import Source
from torch_utils.safe_files import unpacked_limit

__all__ = ["IDX_NAME", "open_mnist"]

IDX_NAME = re.compile(r"(train|t10k)-images-idx3-ubyte(?:\.gz)?")
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def open_mnist(folder: str, part: str, path: str) -> Source:
    """Open the `part` of the set in a folder, train or t10k. `path` is what messages call it."""
    images = _read_idx(os.path.join(folder, f"{part}-images-idx3-ubyte"), 3)
    labels = _read_idx(os.path.join(folder, f"{part}-labels-idx1-ubyte"), 1).astype(np.int64)
    if len(images) != len(labels):
        raise dnnlib.UserError(f"{path}: {len(images)} images, but {len(labels)} labels")
    if not images.size:
        raise dnnlib.UserError(f"{path}: holds no images")
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])  # 32 x 32: the U-Nets halve the side several times
    # Both data sets use the same file names, so only the path tells them apart.
    fashion = "fashion" in path.lower()
    family, names = ("fashion-mnist", FASHION) if fashion else ("mnist", [str(i) for i in range(10)])
    return Source.in_memory(path, images[..., None], labels, family, names)


def _read_idx(path: str, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: the magic number 0x800 + ndim, the sizes, the values; big-endian."""
    zipped = os.path.exists(path + ".gz")
    path = path + ".gz" if zipped else path
    data = dnnlib.read_bytes(path)
    try:
        if zipped:
            limit = unpacked_limit(len(data))
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
            if len(data) > limit:
                raise ValueError
        magic, *shape = struct.unpack(f">{1 + ndim}I", data[: 4 + 4 * ndim])
        if magic != 0x800 + ndim:
            raise ValueError
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except DAMAGED:
        raise dnnlib.UserError(f"{path}: damaged, incomplete or not an idx file of {ndim} dimensions") from None
