"""A small set with names that attack a page, and what a detector might say about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from tests.support.synth import make_zip, pictures, png

ATTACK = "</script><img src=x onerror=window.stolen=1>"
CLASSES = ["cat", f'dog"{ATTACK}', "=cmd|calc", "'; alert(1); '"]
LABELS = np.array([0] * 30 + [1] * 10 + [2] * 8 + [3] * 2)
FOREIGN, DOUBLE = 9, (0, 31, 32)  # one foreign image; three equal ones, of which the first has another label


def make_set(folder: Path) -> ImageDataset:
    """Return 50 images of 8x8 pixels; the file names hold commas, quotes and tags."""
    names = [f"{i:02d},\"<b>'.png" for i in range(len(LABELS))]
    members = {name: png(image.squeeze()) for name, image in zip(names, pictures(len(LABELS)), strict=True)}
    pairs = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    members["dataset.json"] = json.dumps(dict(labels=pairs, class_names=CLASSES)).encode()
    return ImageDataset(str(make_zip(folder / "hostile.zip", members)))


def judge(dataset: ImageDataset) -> LabelFile:
    """Return a label file that suspects every second label; the class suggested is the next one."""
    n = len(dataset)
    is_clean = np.arange(n) % 2 == 1
    score = np.where(is_clean, 0.9, 0.1) + np.linspace(0, 0.09, n)
    suggested = np.where(is_clean, dataset.labels, (dataset.labels + 1) % 4)
    duplicate_of = np.arange(n)
    duplicate_of[list(DOUBLE)] = DOUBLE[0]
    return LabelFile(
        dataset.file_names,
        dataset.labels,
        is_clean,
        score.astype(np.float32),
        suggested,
        noise_rate=0.5,
        per_class_noise_rate=np.full(4, 0.5, np.float32),
        transition=np.full([4, 4], 0.25),
        noise_interval=(0.4, 0.6),
        is_outlier=np.arange(n) == FOREIGN,
        duplicate_of=duplicate_of,
    )
