"""Random images for measurements, and the configuration of a run on them."""

from __future__ import annotations

import numpy as np
import torch

import train
from benchmarks.archives import random_pixels
from training import options
from training.config import RunConfig

__all__ = ["RandomImages", "train_config"]


class RandomImages:
    """A data set of random images in memory, as far as objectives read one."""

    def __init__(self, n: int, channels: int, resolution: int, classes: int):
        self.num_channels, self.resolution, self.label_dim = channels, resolution, classes
        self.labels = np.random.RandomState(1).randint(classes, size=n)
        self.pixels = torch.from_numpy(random_pixels(n, channels, resolution)).permute(0, 3, 1, 2).contiguous()
        self.name, self.archives, self.class_names = "random", ["random"], None

    def onehot(self) -> torch.Tensor:
        """Return all labels, float32 [N,label_dim]."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels), self.label_dim).float()


def train_config(data: RandomImages, *args: str) -> RunConfig:
    """Return the configuration that `train.py ARGS` would give a run on `data`."""
    opts = train.main.make_context("train.py", ["--outdir=.", "--data=.", "--seed=0", *args]).params
    config = options.make_config(opts, "dsm", data, options.unet(opts, data))
    config.seed = 0
    return config
