"""Images to measure with; the pixels are noise."""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
import train
from benchmarks.archives import random_pixels
from training import options

__all__ = ["RandomImages", "train_config"]


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
