"""`Source`: what every kind of images becomes before an archive is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dnnlib
from archives.decode import Color

__all__ = ["Choice", "Source"]


@dataclass
class Choice:
    """What a person wants of a source that has several parts, or several kinds of labels."""

    test: bool = False  # the test part
    part: str | None = None  # another part, by name; None: the usual one
    labels: str | None = None  # the kind of labels, by name; None: the usual one
    background: Color | None = None  # what is behind transparent pixels

    def check(self, path: str, test: bool = False, parts: Sequence[str] = (), labels: Sequence[str] = ()) -> None:
        """Raise UserError for a wish that the source `path` cannot fulfill: it has a `test` part, `parts`, `labels`."""
        if self.test and not test:
            raise dnnlib.UserError(f"{path} has no test part (CIFAR, MNIST and other published sets have one)")
        for what, wish, known in (("part", self.part, parts), ("kind of labels", self.labels, labels)):
            if wish is not None and wish not in known:
                there = f"there are: {', '.join(known)}" if known else "there is nothing to choose"
                if what != "part" and not known:
                    there = (
                        f"it has at most one kind, so {there}; for a column of a table, name the table, too: "
                        "dataset_tool.py --labels=FILE"
                    )
                raise dnnlib.UserError(f"{path}: has no {what} '{wish}' ({there})")


@dataclass
class Source:
    """N images with their labels, by index."""

    path: str  # what messages call it
    length: int  # N
    image: Callable[[int], np.ndarray]  # 0 .. N - 1 -> uint8 [H, W, C]; called from threads and from forked processes
    labels: np.ndarray | None = None  # int64 [N] or float32 [N, D], as observed
    clean_labels: np.ndarray | None = None  # the labels before noise, where they are known
    previous_labels: np.ndarray | None = None  # labels that others replaced, of which nobody said that they are clean
    class_names: list[str] | None = None
    names: Sequence[str] | None = None  # [N], where the images have names
    origins: Sequence[str] | None = None  # [N], their original paths, where the source remembers others than `names`
    outliers: np.ndarray | None = None  # bool [N], which images came from another source; None without a record
    corruption: dict[str, Any] = field(default_factory=dict)  # family of the images; how labels and images were changed
    notes: list[str] = field(default_factory=list)  # what a person should know, such as what was left out
    verified: np.ndarray | None = None  # bool [N], which labels people found right; None where they were not asked

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""
        return f"{self.path}: {self.names[index] if self.names is not None else f'image {index}'}"

    @classmethod
    def in_memory(
        cls, path: str, images: np.ndarray, labels: np.ndarray, family: str, class_names: list[str] | None
    ) -> Source:
        """Return a source of images uint8 [N, H, W, C] in memory."""
        record = dict(family=family)
        return cls(path, len(images), images.__getitem__, labels, class_names=class_names, corruption=record)

    def take(self, rows: np.ndarray) -> None:
        """Keep the images number `rows`, int64 [M], in this order."""
        image = self.image
        self.image, self.length = lambda index: image(rows[index]), len(rows)
        for name in ("labels", "clean_labels", "previous_labels", "outliers", "verified"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[rows])
        for name in ("names", "origins"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, [values[i] for i in rows.tolist()])
