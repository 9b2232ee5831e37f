"""Images to measure with; the pixels are noise."""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
import train
from training import options
from training.archive_sources import Source
from training.archive_writer import make_transform
from training.archives import build_archive

__all__ = ["RandomImages", "random_pixels", "train_config", "write_archive"]


def random_pixels(n: int, channels: int, resolution: int) -> np.ndarray:
    """uint8 [n,resolution,resolution,channels], always the same."""
    return np.random.RandomState(0).randint(256, size=[n, resolution, resolution, channels]).astype(np.uint8)


class RandomImages:
    """The part of a data set that objectives read, in memory."""

    def __init__(self, n: int, channels: int, resolution: int, classes: int):
        self.num_channels, self.resolution, self.label_dim = channels, resolution, classes
        self.labels = np.random.RandomState(1).randint(classes, size=n)
        self.pixels = torch.from_numpy(random_pixels(n, channels, resolution)).permute(0, 3, 1, 2).contiguous()
        self.name, self.class_names = "random", None

    def onehot(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels), self.label_dim).float()


def train_config(data: RandomImages, *args: str) -> dict:
    """The configuration that `train.py ARGS` gives a run on this data."""
    given = train.main.make_context("train.py", ["--outdir=.", "--data=.", "--seed=0", *args]).params
    return options.make_config(dnnlib.EasyDict(given), "dsm", data, {}) | dict(seed=0)


def write_archive(path: str, n: int, channels: int, resolution: int, classes: int) -> str:
    """An archive of `n` random images with labels 0, 1, ... in turn; returns its path."""
    pixels = random_pixels(n, channels, resolution)
    source = Source("random", n, pixels.__getitem__, np.arange(n) % classes)
    build_archive(source, path, make_transform(None, None), None, None, 1)
    return path
