"""How far images are from the core of a training set: the robust transport cost, and how foreign an image is.

    d(x)^2 = min over images y of the core of || W (phi(x) - phi(y)) ||^2 / USUAL

phi: features that mean the same at every resolution (`training.image_features`), in robust deviations of the set,
limited; W: to deviations of the core along its principal axes; USUAL: the 99% quantile of what images of the core have
among themselves. So d = 1 is the limit of what is usual, whatever the images and their size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from archives.dataset import ImageDataset, to_float
from torch_utils.precision import full_float32
from training.connected_core import USUAL, connected_core, nearest
from training.image_features import image_features
from training.robust_core import whitened

__all__ = ["CoreDistance", "features_in_chunks", "read_features", "robust_spread"]

LIMIT = 4.0  # features count up to so many deviations, so that no single one decides
COPY = 0.01  # images at a distance of so few deviations are copies
CHUNK = 512  # images that are processed at a time


class CoreDistance:
    """d^2 of images, given the features [N,d] of images that stand for the training set.

    Attributes: `core` bool [N], the images of the core, and `training`, d^2 of all of them, float64 [N], each one of
    the core without itself.
    """

    def __init__(self, features: np.ndarray, seed: int = 0):
        center = np.median(features, axis=0)
        spread = robust_spread(features - center)
        z = np.clip((features - center) / spread, -LIMIT, LIMIT)
        _, first, place = np.unique(np.round(z / COPY), axis=0, return_index=True, return_inverse=True)
        distinct = np.sort(first)  # an image among copies of itself has no other neighbors
        self.core = connected_core(z[distinct], seed)[np.searchsorted(distinct, first[place.ravel()])]
        points, mean, axes = whitened(z, self.core)
        self.training = np.empty(len(z))
        members = points[self.core]
        two = nearest(members, members, 2, own=np.arange(len(members)))[1]
        self.training[self.core] = two[:, 0]
        if not self.core.all():
            self.training[~self.core] = nearest(points[~self.core], members, 1)[1][:, 0]
        among = np.where(two[:, 0] > COPY, two[:, 0], two[:, -1])  # a copy says nothing about what is usual
        among = among[(among > COPY) & np.isfinite(among)]
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


def robust_spread(deviations: np.ndarray) -> np.ndarray:
    """Return the robust standard deviation [d] of features, given their deviations [N,d] from what is usual.

    Of features that hardly vary it is 0.2 times the mean of all.
    """
    spread = 1.4826 * np.median(np.abs(deviations), axis=0)
    return np.maximum(spread, max(0.2 * float(spread.mean()), 1e-6))


def features_in_chunks(dataset: ImageDataset, items: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the features of some images of a data set, float32 [n,d], CHUNK images at a time."""
    for start in range(0, len(items), CHUNK):
        yield image_features(to_float(dataset.images(items[start : start + CHUNK]))).numpy()


def read_features(dataset: ImageDataset, items: np.ndarray) -> np.ndarray:
    """Return the features of some images of a data set, float64 [n,d]."""
    return np.concatenate([*features_in_chunks(dataset, items)]).astype(np.float64)
