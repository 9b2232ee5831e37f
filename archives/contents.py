"""What identifies a set of images wherever it lies: how many there are, and hashes of names, labels and image files."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np

from archives.archive_set import ArchiveSet
from archives.reader import ArchiveReader

__all__ = ["describe_contents", "what_differs"]

SAMPLE = 1000  # image files of a folder that are read; a ZIP's directory has the checksums of all
COUNTS = ("images", "classes")
PARTS = {
    "names": "file names",
    "labels": "labels",
    "sizes": "image files",
    "sample": "image files",
    "checksums": "image files",
    "clean_labels": "clean labels",
    "outliers": "recorded outliers",
    "hash": "contents",  # of a single file
}


def describe_contents(
    reader: ArchiveReader | ArchiveSet,
    labels: np.ndarray | None = None,
    classes: int = 0,
    **records: np.ndarray | None,
) -> dict[str, Any]:
    """Return what identifies the images of one or several archives, their `labels` and other `records`, as plain data.

    No image is decoded. Of a folder, it takes the size of each file and reads `SAMPLE` of them, evenly spaced; a folder
    and a ZIP of the same files compare by these.
    """
    names, sizes, sample, checksums = (hashlib.blake2b(digest_size=16) for _ in range(4))
    known = True
    for part in reader.readers if isinstance(reader, ArchiveSet) else [reader]:
        names.update(part.names.text)
        sizes.update(part.sizes())
        found, rows = part.checksums(), np.unique(np.linspace(0, len(part) - 1, SAMPLE).round().astype(np.int64))
        known = known and found is not None
        if found is None:
            sample.update(np.array([zlib.crc32(part.read(row)) for row in rows.tolist()], dtype="<u4"))
        else:
            sample.update(found[rows])
            checksums.update(found)
    hashes = dict(names=names, sizes=sizes, sample=sample) | (dict(checksums=checksums) if known else {})
    contents = dict(images=len(reader), classes=classes) | {key: value.hexdigest() for key, value in hashes.items()}
    if labels is not None:
        contents["labels"] = _digest(labels)
    for name, record in records.items():
        contents[name] = "none" if record is None else _digest(record)
    return contents


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array), digest_size=16).hexdigest()


def what_differs(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Say in which parts the contents `here` differ from those `there`; None when they are the same.

    Only parts that both know are compared.
    """
    other = [key for key in there if key in here and there[key] != here[key]]
    counts = [key for key in COUNTS if key in other]
    if counts and all(isinstance(there[key], int) for key in counts):
        return " and ".join(f"{here[key]:,} {key} instead of {there[key]:,}" for key in counts)
    found = dict.fromkeys(words for key, words in PARTS.items() if key in other)
    return f"other {' and '.join([*found] or counts)}" if found or counts else None
