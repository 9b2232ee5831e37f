"""MNIST, Fashion-MNIST and KMNIST: idx files, gzipped as published or unpacked."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct

import numpy as np

import dnnlib
from archives.layouts.lists import find_below, find_file
from archives.layouts.packed import DAMAGED
from archives.source import Choice, Source
from torch_utils.safe_files import unpacked_limit

__all__ = ["find_mnist", "open_mnist"]

# Some programs write a dot in place of the second dash. torchvision puts the files into NAME/raw.
IMAGES = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(?:\.gz)?")
FOLDERS = ("", "raw", *(f"{name}/raw" for name in ("MNIST", "FashionMNIST", "KMNIST")))
DIGITS = [str(i) for i in range(10)]
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
KUZUSHIJI = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
# All use the same file names, so only the path tells them apart.
FAMILIES = {"fashion": ("fashion-mnist", FASHION), "kmnist": ("kmnist", KUZUSHIJI), "": ("mnist", DIGITS)}


def _spellings(part: str, kind: str, ndim: int) -> list[str]:
    return [f"{part}-{kind}{mark}idx{ndim}-ubyte{end}" for mark in "-." for end in (".gz", "")]


def find_mnist(path: str) -> list[str]:
    """Return where MNIST is: a file with images, or the folders that hold one."""
    if os.path.isfile(path):
        return [path] if IMAGES.fullmatch(os.path.basename(path)) else []
    return find_below(path, FOLDERS, [name for part in ("train", "t10k") for name in _spellings(part, "images", 3)])


def open_mnist(path: str, choice: Choice) -> Source:
    """Open the training or the test part of MNIST: in a folder, or the part to which a file belongs."""
    choice.check(path, test=True)
    folder, part, given = path, "train", None
    if os.path.isfile(path):
        folder, given = os.path.dirname(path), path
        part = IMAGES.fullmatch(os.path.basename(path))[1]
    if choice.test and part != "t10k":
        part, given = "t10k", None

    def file(kind: str, ndim: int) -> str:
        return find_file(folder or ".", _spellings(part, kind, ndim), f"which hold the {kind} of this part")

    images = _read_idx(given or file("images", 3), 3)
    labels = _read_idx(file("labels", 1), 1).astype(np.int64)
    if len(images) != len(labels):
        raise dnnlib.UserError(f"{path}: {len(images)} images, but {len(labels)} labels")
    if not images.size:
        raise dnnlib.UserError(f"{path}: holds no images")
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])  # 32 x 32: the U-Nets halve the side several times
    known = path
    if os.path.basename(os.path.abspath(folder)) == "raw":  # the name stands above, perhaps not in the path
        known += os.path.basename(os.path.dirname(os.path.abspath(folder)))
    family, names = next(FAMILIES[word] for word in FAMILIES if word in known.lower())
    return Source.in_memory(path, images[..., None], labels, family, names)


def _read_idx(path: str, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: the magic number 0x800 + ndim, the sizes, the values; big-endian."""
    data = dnnlib.read_bytes(path)
    try:
        if path.endswith(".gz"):
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
