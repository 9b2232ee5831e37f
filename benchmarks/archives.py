"""Archives of random images. As a program, this module builds archives in a process without PyTorch, for data_rows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time

import numpy as np

from archives.build import build_archive
from archives.sources import Source, open_source
from archives.writer import make_transform
from benchmarks.core import Turns

__all__ = ["random_pixels", "write_archive"]


def random_pixels(n: int, channels: int, resolution: int) -> np.ndarray:
    """Return random pixels, uint8 [n,resolution,resolution,channels], the same in every call."""
    return np.random.RandomState(0).randint(256, size=[n, resolution, resolution, channels]).astype(np.uint8)


def write_archive(path: str, n: int, channels: int, resolution: int, classes: int) -> str:
    """Write an archive of `n` random images with the labels 0, 1, ... in turn, and return its path."""
    pixels = random_pixels(n, channels, resolution)
    source = Source("random", n, pixels.__getitem__, np.arange(n) % classes)
    build_archive(source, path, make_transform(None, None), workers=1)
    return path


def main() -> None:
    """Serve one form: write `images` images of CIFAR-10's shape, from `archive` or memory, with `workers` processes."""
    turns, wanted = Turns(), json.loads(sys.argv[1])
    pixels = random_pixels(0 if wanted["archive"] else wanted["images"], 3, 32)

    def build() -> float:
        start = time.perf_counter()
        source = (
            open_source(wanted["archive"])
            if wanted["archive"]
            else Source("random", len(pixels), pixels.__getitem__, np.arange(len(pixels)) % 10)
        )
        with contextlib.redirect_stderr(io.StringIO()):
            build_archive(source, wanted["dest"], make_transform(None, None), workers=wanted["workers"])
        seconds = time.perf_counter() - start
        os.remove(wanted["dest"])
        return seconds

    turns.serve(build)


if __name__ == "__main__":
    main()
