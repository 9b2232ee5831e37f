"""Write the images of a source as PNGs: on several processes, in order, and only images that fit together."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import dnnlib
from archives.decode import DamagedFile, list_animated
from archives.listing import SHOWN
from archives.source import Source
from archives.workers import work_in_order
from archives.writer import ArchiveWriter, Transform, encode_png, fit_image, image_names, with_channels

__all__ = ["Encoder"]

PART = 1 << 20  # bytes of the pixels that a process takes at a time


class Encoded(NamedTuple):
    """What the first process learns about a part of the images. The PNGs stay in the process that encoded them."""

    kept: np.ndarray  # int64, indices of the images that were encoded: not left out by the transform, nor damaged
    shapes: dict[tuple[int, ...], int]  # their shapes, each with the first index that has it
    size: int  # bytes of the PNGs
    images: list[np.ndarray]  # their pixels, if wanted
    oblong: int  # how many of them were not square in the source
    enlarged: int  # how many of them the transform has enlarged
    damaged: list[DamagedFile]  # what is wrong with the other images
    animated: int  # image files with several frames, of which the first was taken
    examples: list[str]  # what some of these are called


class Encoder:
    """Write the images of a source as PNGs, on several processes and in order, and check that they fit together.

    source        where the images come from
    count         use images 0 .. count - 1
    transform     from `make_transform`
    channels      1 or 3 converts all images; None keeps the kind of the first
    foreign       {index of a replaced image: a function that reads the image to put there}
    keep          keep the pixels that are written, in `images`, uint8 [at least N,H,W,C]
    skip_damaged  leave out damaged images, and list them in `skipped`

    After `run`, `shape` is [H, W, C] of the images that were written, `names` are their names, `oblong` says how many
    of them were not square in the source, `enlarged` how many the transform has enlarged, and `animated` how many files
    had several frames, of which `examples` names some.
    """

    def __init__(
        self, source: Source, count: int, transform: Transform, channels: int | None,
        foreign: dict[int, Callable[[], np.ndarray]], keep: bool, skip_damaged: bool,
    ) -> None:  # fmt: skip
        self._source, self._count, self._transform = source, count, transform
        self._foreign, self._keep, self._skip_damaged = foreign, keep, skip_damaged
        self._first, first = self._find_first()
        self._convert, self._channels = channels is not None, channels or first.shape[2]
        self._step = max(1, PART // first.size)  # images per task
        self._only_count = mmap.mmap(-1, 1)  # shared with forked processes; 1: look only for damaged images
        self.shape: tuple[int, ...] = ()
        self.names: list[str] = []
        self.images: np.ndarray | None = None
        self.oblong = self.enlarged = self.animated = 0
        self.examples: list[str] = []
        self.skipped: list[DamagedFile] = []

    def _find_first(self) -> tuple[int, np.ndarray]:
        """Return the first image that is not damaged, and its index. DamagedFile: all are damaged."""
        first: DamagedFile | None = None
        for index in range(self._count):
            try:
                return index, self._source.image(index)
            except DamagedFile as error:
                first = first or error
        others = f", and so are all {self._count:,} images" if self._count > 1 else ""
        raise DamagedFile(first.file, f"{first.problem}{others}")

    def run(self, archive: ArchiveWriter, workers: int) -> np.ndarray:
        """Write the images. Return the indices of those that were not left out, int64.

        UserError: images are damaged and must not be left out; they differ in size or channels, or do not suit a U-Net.
        """
        kept = [np.zeros(0, dtype=np.int64)]

        def place(part: range, found: Encoded) -> tuple[int, int]:
            self.skipped += found.damaged
            counting = bool(self.skipped) and not self._skip_damaged  # nothing will be kept
            if counting:
                bar.set_description("counting damaged images")
            for shape, index in () if counting else found.shapes.items():
                self._check_shape(shape, index)
            kept.append(found.kept)
            self.oblong += found.oblong
            self.enlarged += found.enlarged
            self.animated += found.animated
            self.examples += found.examples[: SHOWN - len(self.examples)]
            first = len(self.names)
            if found.images and not counting:
                if self.images is None:  # rows that no image fills take no memory
                    self.images = np.empty([self._count, *self.shape], dtype=np.uint8)
                self.images[first : first + len(found.images)] = found.images
            names = image_names(first, first + len(found.kept))
            self.names += names
            bar.update(len(part))
            return first, archive.reserve(len(names), found.size + sum(map(len, names)))

        def write(pngs: list[bytes], where: tuple[int, int]) -> bytes:
            first, offset = where
            return archive.write(offset, image_names(first, first + len(pngs)), pngs)

        parts = [range(start, min(start + self._step, self._count)) for start in range(0, self._count, self._step)]
        with tqdm(total=self._count, unit="img", desc="archive", disable=None, leave=False) as bar:
            archive.record(work_in_order(parts, self._encode, place, write, workers))
        if self.skipped and not self._skip_damaged:
            self._refuse_damaged()
        return np.concatenate(kept)

    def _refuse_damaged(self) -> None:
        number, first = len(self.skipped), self.skipped[0]
        what = "it is the only damaged one" if number == 1 else f"{number:,} are damaged"
        leave = "it" if number == 1 else "them"
        raise dnnlib.UserError(
            f"{first.message}; of {self._count:,} images {what}: leave {leave} out with dataset_tool.py --skip_damaged"
        )

    def _encode(self, part: range) -> tuple[Encoded, list[bytes]]:
        with list_animated() as animated:
            found, pngs = self._encode_images(part)
        return found._replace(animated=len(animated), examples=animated[:SHOWN]), pngs

    def _outlier(self, index: int) -> np.ndarray:
        try:
            return self._foreign[index]()
        except DamagedFile as error:  # the image in whose place it would stand is not damaged
            hint = "make an archive of the outliers first, with dataset_tool.py --skip_damaged"
            raise dnnlib.UserError(f"{error.message}; {hint}") from None

    def _encode_images(self, part: range) -> tuple[Encoded, list[bytes]]:
        pngs: list[bytes] = []
        kept, shapes, images, oblong, enlarged, damaged = [], {}, [], 0, 0, []
        for index in part:
            try:
                image = self._source.image(index)
                if self._only_count[0]:
                    continue
                height, width = image.shape[:2]
                image = self._transform(self._same_channels(image, index))
                if image is not None and index in self._foreign:
                    image = fit_image(self._outlier(index), image.shape)
            except DamagedFile as error:
                damaged.append(error)
                self._only_count[0] = not self._skip_damaged
                continue
            if image is None:
                continue
            pngs.append(encode_png(image))
            kept.append(index)
            oblong += height != width
            enlarged += self._transform.enlarges(height, width)
            shapes.setdefault(image.shape, index)
            if self._keep:
                images.append(image)
        size = sum(map(len, pngs))
        return Encoded(np.array(kept, dtype=np.int64), shapes, size, images, oblong, enlarged, damaged, 0, []), pngs

    def _same_channels(self, image: np.ndarray, index: int) -> np.ndarray:
        """Return an image with the common number of channels. RGB becomes gray only when asked for: it loses color."""
        if image.shape[2] > self._channels and not self._convert:
            raise dnnlib.UserError(
                f"{self._source.name(index)}: is an RGB image, but {self._source.name(self._first)} is gray: "
                "convert all with dataset_tool.py --channels=1 or --channels=3"
            )
        return with_channels(image, self._channels)

    def _check_shape(self, shape: tuple[int, ...], index: int) -> None:
        if shape == self.shape:
            return
        name, size = self._source.name(index), f"{shape[1]}x{shape[0]}"
        hint = "convert all with dataset_tool.py --transform=center-crop (or pad) --resolution=WxH"
        if self.shape:
            raise dnnlib.UserError(f"{name}: is {size}, images before it are {self.shape[1]}x{self.shape[0]}: {hint}")
        if shape[0] != shape[1]:
            raise dnnlib.UserError(f"{name}: is {size}, images must be square: {hint}")
        if shape[0] & (shape[0] - 1):
            raise dnnlib.UserError(f"{name}: is {size}, the side must be a power of two: {hint}")
        self.shape = shape
