"""Write the images of a source as PNGs: on several processes, in order, and only images that fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import dnnlib
from archives.sources import Source
from archives.workers import work_in_order
from archives.writer import ArchiveWriter, Transform, encode_png, fit_image, image_names, with_channels

__all__ = ["Encoder"]


class Encoded(NamedTuple):
    """What the first process learns about a part of the images. The PNGs stay in the process that encoded them."""

    kept: np.ndarray  # int64, indices of the images that the transform did not leave out
    shapes: dict[tuple[int, ...], int]  # their shapes, each with the first index that has it
    size: int  # bytes of the PNGs
    images: list[np.ndarray]  # their pixels, if wanted


class Encoder:
    """Write the images of a source as PNGs, on several processes and in order, and check that they fit together.

    source     where the images come from
    transform  from `make_transform`
    channels   1 or 3 converts all images; None keeps the kind of the first
    foreign    {index of a replaced image: a function that reads the image to put there}
    keep       keep the pixels that are written, in `images`, uint8 [at least N,H,W,C]

    After `run`, `shape` is [H, W, C] of the images that were written, and `names` are their names.
    """

    def __init__(
        self, source: Source, transform: Transform, channels: int | None,
        foreign: dict[int, Callable[[], np.ndarray]], keep: bool,
    ) -> None:  # fmt: skip
        self._source, self._transform, self._foreign, self._keep = source, transform, foreign, keep
        first = source.image(0)
        self._convert, self._channels = channels is not None, channels or first.shape[2]
        self._step = max(1, (1 << 20) // first.size)  # images per task, about a megabyte of pixels
        self.shape: tuple[int, ...] = ()
        self.names: list[str] = []
        self.images: np.ndarray | None = None

    def run(self, archive: ArchiveWriter, count: int, workers: int) -> np.ndarray:
        """Write images 0 .. count - 1. Return the indices of those that the transform did not leave out, int64."""
        kept = [np.zeros(0, dtype=np.int64)]

        def place(part: range, found: Encoded) -> tuple[int, int]:
            for shape, index in found.shapes.items():
                self._check_shape(shape, index)
            kept.append(found.kept)
            first = len(self.names)
            if found.images:
                if self.images is None:  # rows that no image fills take no memory
                    self.images = np.empty([count, *self.shape], dtype=np.uint8)
                self.images[first : first + len(found.images)] = found.images
            names = image_names(first, first + len(found.kept))
            self.names += names
            bar.update(len(part))
            return first, archive.reserve(len(names), found.size + sum(map(len, names)))

        def write(pngs: list[bytes], where: tuple[int, int]) -> bytes:
            first, offset = where
            return archive.write(offset, image_names(first, first + len(pngs)), pngs)

        parts = [range(start, min(start + self._step, count)) for start in range(0, count, self._step)]
        with tqdm(total=count, unit="img", desc="archive", disable=None, leave=False) as bar:
            archive.record(work_in_order(parts, self._encode, place, write, workers))
        return np.concatenate(kept)

    def _encode(self, part: range) -> tuple[Encoded, list[bytes]]:
        pngs: list[bytes] = []
        kept, shapes, images = [], {}, []
        for index in part:
            image = self._transform(self._same_channels(self._source.image(index), index))
            if image is not None and index in self._foreign:
                image = fit_image(self._foreign[index](), image.shape)
            if image is None:
                continue
            pngs.append(encode_png(image))
            kept.append(index)
            shapes.setdefault(image.shape, index)
            if self._keep:
                images.append(image)
        return Encoded(np.array(kept, dtype=np.int64), shapes, sum(map(len, pngs)), images), pngs

    def _same_channels(self, image: np.ndarray, index: int) -> np.ndarray:
        """Return an image with the common number of channels. RGB becomes gray only when asked for: it loses color."""
        if image.shape[2] > self._channels and not self._convert:
            raise dnnlib.UserError(
                f"{self._source.name(index)}: is an RGB image, but {self._source.name(0)} is gray: "
                "convert all with dataset_tool.py --channels=1 or --channels=3"
            )
        return with_channels(image, self._channels)

    def _check_shape(self, shape: tuple[int, ...], index: int) -> None:
        if shape == self.shape:
            return
        name, size = self._source.name(index), f"{shape[1]}x{shape[0]}"
        hint = "convert all with dataset_tool.py --transform=center-crop --resolution=WxH"
        if self.shape:
            raise dnnlib.UserError(f"{name}: is {size}, images before it are {self.shape[1]}x{self.shape[0]}: {hint}")
        if shape[0] != shape[1]:
            raise dnnlib.UserError(f"{name}: is {size} after the transform, images must be square: {hint}")
        if shape[0] & (shape[0] - 1):
            raise dnnlib.UserError(f"{name}: is {size}, the side must be a power of two: {hint}")
        self.shape = shape
