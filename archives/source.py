"""`Source`: what every kind of images becomes before an archive is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Source"]


@dataclass
class Source:
    """N images with their labels, by index."""

    path: str  # what messages call it
    length: int  # N
    image: Callable[[int], np.ndarray]  # 0 .. N - 1 -> uint8 [H, W, C]; called from threads and from forked processes
    labels: np.ndarray | None = None  # int64 [N] or float32 [N, D], as observed
    clean_labels: np.ndarray | None = None  # the labels before noise, where they are known
    class_names: list[str] | None = None
    names: Sequence[str] | None = None  # [N], where the images have names
    outliers: np.ndarray | None = None  # bool [N], which images came from another source; None without a record
    corruption: dict[str, Any] = field(default_factory=dict)  # family of the images; how labels and images were changed
    notes: list[str] = field(
        default_factory=list
    )  # what a person should know, such as what was left out; one line each

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
