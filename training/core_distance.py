"""How far images are from the core of a training set: the robust transport cost, and how foreign an image is.

    d(x)^2 = min over images y of the core of || W (phi(x) - phi(y)) ||^2 / USUAL

phi: features that mean the same at every resolution (`training.image_features`), in robust deviations of the set,
limited; W: to deviations of the core along its principal axes; USUAL: the 99% quantile of what images of the core have
among themselves. So d = 1 is the limit of what is usual, whatever the images and their size.
"""

from __future__ import annotations

import numpy as np
import torch

from archives.dataset import ImageDataset, to_float
from torch_utils.precision import full_float32
from training.connected_core import USUAL, connected_core, nearest
from training.image_features import image_features
from training.robust_core import whitened

__all__ = ["CoreDistance", "read_features"]

LIMIT = 4.0  # features count up to so many deviations, so that no single one decides
CHUNK = 512  # images that are processed at a time


class CoreDistance:
    """d^2 of images, given the features [N,d] of images that stand for the training set.

    Attributes: `core` bool [N], the images of the core, and `training`, d^2 of all of them, float64 [N], each one of
    the core without itself.
    """

    def __init__(self, features: np.ndarray, seed: int = 0):
        center = np.median(features, axis=0)
        spread = 1.4826 * np.median(np.abs(features - center), axis=0)
        spread = np.maximum(spread, max(0.2 * float(spread.mean()), 1e-6))
        z = np.clip((features - center) / spread, -LIMIT, LIMIT)
        self.core = connected_core(z, seed)
        points, mean, axes = whitened(z, self.core)
        self.training = np.empty(len(z))
        members = points[self.core]
        self.training[self.core] = nearest(members, members, 1, own=np.arange(len(members)))[1][:, 0]
        if not self.core.all():
            self.training[~self.core] = nearest(points[~self.core], members, 1)[1][:, 0]
        among = self.training[self.core]
        among = among[(among > 0) & np.isfinite(among)]  # copies of an image say nothing about what is usual
        usual = float(np.quantile(among, USUAL)) if len(among) else 1.0
        self.training = np.square(self.training / usual)

        parts = center, spread, mean, axes / usual, members / usual
        self._parts = [torch.from_numpy(part).float() for part in parts]

    def to(self, device: torch.device) -> CoreDistance:
        """Compute on this device from now on. Returns self."""
        self._parts = [part.to(device) for part in self._parts]
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return d^2 [N] of images [N,C,H,W] in [-1,1], differentiable; memory for N times the size of the core."""
        with full_float32(images.device):
            return self.of_features(image_features(images.float()))

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return d^2 [N] of images with these features [N,d]."""
        center, spread, mean, axes, anchors = self._parts
        points = (((features - center) / spread).clamp(-LIMIT, LIMIT) - mean) @ axes
        with torch.no_grad():
            closest = torch.cdist(points, anchors).argmin(dim=1)
        return (points - anchors[closest]).square().sum(dim=1)


def read_features(dataset: ImageDataset, items: np.ndarray) -> np.ndarray:
    """Return the features of some images of a data set, float64 [n,d]."""
    parts = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    return np.concatenate([image_features(to_float(dataset.images(part))).numpy() for part in parts]).astype(np.float64)
