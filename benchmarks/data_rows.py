"""Images into an archive: photographs on all cores over one, raw images over Pillow and zipfile."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np
import PIL.Image
from sklearn.datasets import load_sample_images

from benchmarks.core import Row, compare
from benchmarks.data import random_pixels
from training.archive_sources import Source, open_source
from training.archive_writer import make_transform
from training.archives import build_archive

__all__ = ["rows"]

PHOTOS, RAW = 64, 5000


def rows(repeats: int) -> Iterator[Row]:
    """Both kinds."""
    images = random_pixels(RAW, 3, 32)
    photo = load_sample_images().images[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.mkdir(os.path.join(folder, "photos"))
        for i in range(PHOTOS):
            PIL.Image.fromarray(np.roll(photo, 7 * i, axis=1)).save(os.path.join(folder, "photos", f"{i:03d}.jpg"))
        dest = os.path.join(folder, "x.zip")

        def build(workers: int) -> None:
            source = open_source(os.path.join(folder, "photos"))
            build_archive(source, dest, make_transform("center-crop", (64, 64)), None, None, workers)

        def plain() -> None:
            with zipfile.ZipFile(dest, "w") as file:
                for i, image in enumerate(images):
                    data = io.BytesIO()
                    PIL.Image.fromarray(image).save(data, format="png", compress_level=0)
                    file.writestr(f"{i}.png", data.getvalue())

        def ours() -> None:
            build_archive(Source("random", RAW, images.__getitem__), dest, make_transform(None, None), None, None, 1)

        t = compare(dict(all=lambda: build(os.cpu_count() or 1), one=lambda: build(1), ours=ours, plain=plain), repeats)
    yield Row("photographs to a 64x64 archive, all cores; plain: one core", t["all"], t["one"], images=PHOTOS)
    yield Row("raw 32x32 images to an archive; plain: Pillow and zipfile", t["ours"], t["plain"], images=RAW)
