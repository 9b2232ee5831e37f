"""Rows about archives: writing and reading them on all cores, on one core, and with Pillow and zipfile."""

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

from archives.build import build_archive
from archives.dataset import BatchStream, ImageDataset
from archives.sources import Source, open_source
from archives.writer import make_transform
from benchmarks.archives import random_pixels, write_archive
from benchmarks.core import Row, compare, processes
from dnnlib.threads import usable_cores

__all__ = ["rows"]

PHOTOS, RAW, CIFAR = 64, 5000, 50_000


def rows(repeats: int) -> Iterator[Row]:
    """Measure small archives, then archives of CIFAR-10's size."""
    yield from building_rows(repeats)
    yield from cifar_rows(repeats)


def building_rows(repeats: int) -> Iterator[Row]:
    """Measure writing: photographs with one and all cores, and raw images against Pillow and zipfile."""
    images = random_pixels(RAW, 3, 32)
    photo = load_sample_images().images[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.mkdir(os.path.join(folder, "photos"))
        for i in range(PHOTOS):
            PIL.Image.fromarray(np.roll(photo, 7 * i, axis=1)).save(os.path.join(folder, "photos", f"{i:03d}.jpg"))
        dest = os.path.join(folder, "x.zip")

        def build(workers: int) -> None:
            source = open_source(os.path.join(folder, "photos"))
            build_archive(source, dest, make_transform("center-crop", (64, 64)), workers=workers, overwrite=True)

        def plain() -> None:
            with zipfile.ZipFile(dest, "w") as file:
                for i, image in enumerate(images):
                    data = io.BytesIO()
                    PIL.Image.fromarray(image).save(data, format="png", compress_level=0)
                    file.writestr(f"{i}.png", data.getvalue())

        def ours() -> None:
            source = Source("random", RAW, images.__getitem__)
            build_archive(source, dest, make_transform(None, None), workers=1, overwrite=True)

        t = compare(dict(all=lambda: build(usable_cores()), one=lambda: build(1), ours=ours, plain=plain), repeats)
    yield Row("photographs to a 64x64 archive, all cores; plain: one core", t["all"], t["one"], images=PHOTOS)
    yield Row("raw 32x32 images to an archive; plain: Pillow and zipfile", t["ours"], t["plain"], images=RAW)


def cifar_rows(repeats: int) -> Iterator[Row]:
    """Measure archives of CIFAR-10's size: writing from memory and from an archive, and reading in shuffled order."""
    cores = usable_cores()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        archive = write_archive(os.path.join(folder, "in.zip"), CIFAR, 3, 32, 10)
        sources = dict(memory=None, ZIP=archive)
        building = {
            f"{kind} {n}": (
                "benchmarks.archives",
                dict(archive=source, images=CIFAR, workers=n, dest=os.path.join(folder, "out.zip")),
            )
            for kind, source in sources.items()
            for n in (1, cores)
        }

        def read(workers: int) -> None:
            data = ImageDataset(archive, cache=False)
            with contextlib.closing(BatchStream(data, 500, workers=workers)) as stream:
                for _ in range(CIFAR // 500):
                    next(stream)

        def plain() -> None:
            with zipfile.ZipFile(archive) as file:
                names = [name for name in file.namelist() if name.endswith(".png")]
                for i in np.random.RandomState(0).permutation(CIFAR):
                    np.asarray(PIL.Image.open(io.BytesIO(file.read(names[i]))))

        with processes(**building) as forms:
            t = compare(forms | dict(one=lambda: read(1), all=lambda: read(cores), plain=plain), repeats)
    for kind in sources:
        yield Row(
            f"CIFAR-10's shape, from {kind} to an archive, {cores} workers; plain: one",
            t[f"{kind} {cores}"],
            t[f"{kind} 1"],
            images=CIFAR,
        )
    yield Row(
        "CIFAR-10's shape, read in shuffled order, one thread; plain: zipfile and Pillow",
        t["one"],
        t["plain"],
        images=CIFAR,
    )
    yield Row(
        f"CIFAR-10's shape, read in shuffled order, {cores} threads; plain: one", t["all"], t["one"], images=CIFAR
    )
