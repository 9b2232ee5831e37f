"""STL-10, the binary version: `train_X.bin` and others, uint8 [n, 3, column, row] of 96 x 96 pixels."""

from __future__ import annotations

import os
import re

import numpy as np

import dnnlib
from archives.layouts.lists import find_below, find_file, read_class_names
from archives.source import Choice, Source

__all__ = ["find_stl10", "open_stl10"]

FILE = re.compile(r"(train|test|unlabeled)_X\.bin")
SIDE = 96
SIZE = 3 * SIDE * SIDE  # bytes per image
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def find_stl10(path: str) -> list[str]:
    """Return where STL-10 is: a file with images, or the folders that hold one."""
    if os.path.isfile(path):
        return [path] if FILE.fullmatch(os.path.basename(path)) else []
    return find_below(path, ["", "stl10_binary"], [f"{part}_X.bin" for part in ("train", "test", "unlabeled")])


def open_stl10(path: str, choice: Choice) -> Source:
    """Open one part of STL-10, `train`, `test` or `unlabeled`, of which only the first two have labels.

    UserError: a file is missing, cut off, or holds labels outside 1..10.
    """
    choice.check(path, test=True, parts=["train", "unlabeled"])
    folder, part = path, "test" if choice.test else choice.part or "train"
    if os.path.isfile(path):
        folder, stated = os.path.dirname(path) or ".", FILE.fullmatch(os.path.basename(path))[1]
        if not choice.test and choice.part is None:
            part = stated
    images = find_file(folder, [f"{part}_X.bin"], f"the images of the part '{part}'")
    file = dnnlib.open_file(images)  # stays open as long as the source; every process reads at its own places
    size = os.fstat(file.fileno()).st_size
    count = size // SIZE
    if size % SIZE or not count:
        raise dnnlib.UserError(f"{images}: {size:,} bytes are not whole images of {SIZE:,} bytes")
    labels = names = None
    if part != "unlabeled":
        labels = _read_labels(find_file(folder, [f"{part}_y.bin"], f"the labels of the part '{part}'"), count)
        names = read_class_names(os.path.join(folder, "class_names.txt"), labels) or CLASSES

    def image(index: int) -> np.ndarray:
        data = os.pread(file.fileno(), SIZE, index * SIZE)
        if len(data) < SIZE:
            raise dnnlib.UserError(f"{images}: image {index} is cut off")
        return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(2, 1, 0))

    return Source(path, count, image, labels, class_names=names, corruption=dict(family="stl10"))


def _read_labels(path: str, count: int) -> np.ndarray:
    stored = np.frombuffer(dnnlib.read_bytes(path), np.uint8).astype(np.int64)
    if len(stored) != count:
        raise dnnlib.UserError(f"{path}: has {len(stored)} labels, but there are {count} images")
    if stored.min() < 1 or stored.max() > len(CLASSES):
        raise dnnlib.UserError(
            f"{path}: has labels from {stored.min()} to {stored.max()}, expected 1 to {len(CLASSES)}"
        )
    return stored - 1
