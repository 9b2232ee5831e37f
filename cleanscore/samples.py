"""Generated images in memory, with their classes: to look at, to save, and to evaluate."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sampling.grid import save_class_grid
from sampling.output import check_free, save_images

__all__ = ["Samples"]


@dataclass(frozen=True)
class Samples:
    """Images that `cleanscore.sample` has made. In a notebook they show themselves."""

    images: np.ndarray  # uint8 [N,H,W,C], C = 1 or 3
    labels: np.ndarray | None  # int64 [N], the class of each; None for networks without classes
    seeds: list[int]  # [N], the seed of each
    class_names: list[str] | None = None  # of all classes, where they are known

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the images into a folder or `X.zip`, with `dataset.json`: a labeled archive (docs/formats.md).

        UserError: there is something already.
        """
        check_free(os.fspath(path))
        save_images([(self.seeds, self.images, self.labels)], os.fspath(path), class_names=self.class_names)

    def sheet(self, path: str | os.PathLike[str]) -> None:
        """Write all images as one PNG, with a column per class under its name. Its folder is made if it is missing."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        save_class_grid(self.images, os.fspath(path), self.labels, self.class_names)

    def _repr_png_(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder, "sheet.png")
            self.sheet(picture)
            return picture.read_bytes()
