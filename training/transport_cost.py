"""Transport costs c(x_0, x_{t+1}): unbalanced transport leaves out expensive images (docs/methods/rduot.md)."""

from __future__ import annotations

import numpy as np
import torch

from archives.dataset import ImageDataset, to_float
from torch_utils import distributed
from training.core_distance import CoreDistance, read_features
from training.networks_resnet import Classifier
from training.noise_levels import LOWEST_SIGMA, DiffusionSteps

__all__ = ["COSTS", "TransportCost", "squared_distance"]

COSTS = ("pixels", "standardized", "features", "robust")
SAMPLE = 4096  # Statistics come from at most this many training images.
CHUNK = 512  # images that are processed at a time
CORE, CORE_ROUNDS, FREE = 0.75, 10, 4  # of version 0.1: share of the core, rounds at most, distance that costs nothing
LEAST = 0.05  # d^2 that the log tells apart; copies of an image have none
FLOOR = 0.3  # smallest deviation, relative to the mean deviation: where images are all alike, it says too little


def squared_distance(x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return ||x_0 - x_{t+1}||^2 [N], summed over pixels (Dao et al. 2024). `t` does not matter."""
    return (x_0 - x_next).square().flatten(1).sum(dim=1)


class TransportCost:
    """Cost c(x_0, x_{t+1}) [N] of images [N,C,H,W] in [-1,1] at t [N] in 0..T-1.

    pixels: the squared distance. It makes images of large norm expensive, whatever the training set looks like.
    standardized: the same, after the pixels of x_0 and x_{t+1} are standardized by the mean and standard deviation of
    the training images at their noise levels. It makes expensive what differs from the average training image.
    features: the same with the features of a frozen random network in place of pixels.
    robust: how far x_0 is from the core of the training set, max(ln d(x_0)^2, 0) (`training.core_distance`). It is 0
    for usual images, of the same scale for images of any size, and does not depend on x_{t+1}.
    """

    def __init__(
        self, kind: str, dataset: ImageDataset, steps: DiffusionSteps, device: torch.device, by_pixels: bool = False
    ):
        """Measure what the cost needs. `by_pixels`: the `robust` of version 0.1, for runs that began with it."""
        self.kind, self.net, self.distance, self.axes = kind, None, None, None
        self._dataset, self._steps, self._device = dataset, steps, device
        self.sample = spread(torch.arange(len(dataset)), SAMPLE)
        if kind == "robust" and not by_pixels:  # at random, since sets may repeat their classes at regular distances
            chosen = np.random.default_rng(0).permutation(len(dataset))[:SAMPLE]
            self.sample = torch.from_numpy(np.sort(chosen))
        if kind == "features":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same network in every run
                net = Classifier(dataset.resolution, dataset.num_channels, 1, depth="small", channel_mult=(1, 2, 4))
                # For training these layers start near zero. Features need their output.
                for block in (block for stage in net.stages for block in stage):
                    block.conv1.weight.data *= 100
            self.net = net.eval().requires_grad_(False).to(device)
        if kind == "robust" and by_pixels:
            images = [x_0.flatten(1) for _, x_0 in training_images(dataset, self.sample, torch.device("cpu"))]
            members, axes = pixel_core(torch.cat(images).to(torch.float64))
            self.axes = axes.to(device, torch.float32)
            self.mean, self.std = self._measure(dataset, self.sample[members], steps, device)
        elif kind == "robust":
            found = distributed.from_rank0(lambda: CoreDistance(read_features(dataset, self.sample.numpy())))
            self.distance = found.to(device)
        elif kind != "pixels":
            self.mean, self.std = self._measure(dataset, self.sample, steps, device)

    @torch.no_grad()
    def _measure(
        self, dataset: ImageDataset, index: torch.Tensor, steps: DiffusionSteps, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Return mean and standard deviation [T+1,features] of the training images `index` at x_0, x_1, ..., x_T."""
        generator = torch.Generator(device).manual_seed(0)
        mean, std = [], []
        for k in range(steps.num_timesteps + 1):
            values = []
            for _, x_0 in training_images(dataset, index, device):
                noise = torch.randn(x_0.shape, generator=generator, device=device)
                t = torch.full([len(x_0)], k, device=device)
                values.append(self._embed(steps.diffuse(x_0, t, noise) if k else x_0))
            values = torch.cat(values)
            mean.append(values.mean(dim=0))
            std.append(floored(values.std(dim=0, correction=0)))
        return torch.stack(mean), torch.stack(std)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        if self.net is not None:
            return self.net.features(x, torch.full([], LOWEST_SIGMA, device=x.device))
        return x.flatten(1) if self.axes is None else x.flatten(1) @ self.axes

    def __call__(self, x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the cost [N] of the pairs (x_0, x_next = x_{t+1})."""
        if self.kind == "pixels":
            return squared_distance(x_0, x_next, t)
        if self.distance is not None:
            return self.distance(x_0).clamp(min=1).log()
        start = (self._embed(x_0) - self.mean[0]) / self.std[0]
        end = (self._embed(x_next) - self.mean[t + 1]) / self.std[t + 1]
        c = squared_distance(start, end, t)
        return c if self.axes is None else (c / start.shape[1] - FREE).clamp(min=0)

    @torch.no_grad()
    def of_training(self, items: torch.Tensor | None = None) -> np.ndarray:
        """Return the costs of training images at random t, float64 [n]: those of `items`, or of the whole `sample`.

        With `robust`, images of the sample do not count as their own neighbors.
        """
        items = self.sample if items is None else items
        generator = torch.Generator(self._device).manual_seed(0)
        costs = [torch.empty(0, dtype=torch.float64)]  # a process may have no items
        chunks = training_images(self._dataset, items, self._device)
        for _, x_0 in distributed.progress_bar(
            iterable=chunks, total=-(-len(items) // CHUNK), desc="Costs", unit="chunk"
        ):
            t = torch.randint(self._steps.num_timesteps, [len(x_0)], generator=generator, device=self._device)
            noise = [torch.randn(x_0.shape, generator=generator, device=self._device) for _ in range(2)]
            costs.append(self(x_0, self._steps.pair(x_0, t, *noise)[1], t).cpu().double())
        costs = torch.cat(costs).numpy()
        if self.distance is not None:
            place = np.searchsorted(self.sample, items).clip(max=len(self.sample) - 1)
            known = self.sample.numpy()[place] == items.numpy()
            costs[known] = np.log(np.maximum(self.distance.training[place[known]], 1))
        return costs

    def before_limit(self, costs: np.ndarray) -> np.ndarray:
        """Return ln d^2 of the images of `sample` for `robust`, whose cost is 0 below 0; the costs themselves else."""
        return costs if self.distance is None else np.log(np.maximum(self.distance.training, LEAST))


def pixel_core(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the core, as in version 0.1, of the rows x [N,d], bool [N], and its principal axes [d,d] in columns.

    The core is the share CORE of the rows that lie nearest to their own mean in Mahalanobis distance. Concentration
    steps of FAST-MCD find it (Rousseeuw and Van Driessen, Technometrics 1999). They start from all rows, so outliers
    that are all alike and make up a fifth of the rows can pass for a part of the core. `floored` limits the deviations
    along the axes from below.
    """
    members = torch.ones(len(x), dtype=torch.bool)
    for _ in range(CORE_ROUNDS):
        mean = x[members].mean(dim=0)
        variances, axes = torch.linalg.eigh(x[members].T.cov(correction=0))
        std = floored(variances.clamp(min=0).sqrt())
        distance = (((x - mean) @ axes) / std).square().sum(dim=1)
        nearest = distance <= distance.quantile(CORE)
        if (nearest != members).sum() <= len(x) / 1000:
            break
        members = nearest
    return members, axes


def floored(std: torch.Tensor) -> torch.Tensor:
    """Raise deviations [d] to at least FLOOR times their mean."""
    return std.clamp(min=max(FLOOR * float(std.mean()), 1e-6))


def spread(index: torch.Tensor, n: int) -> torch.Tensor:
    """Return at most `n` of the entries of `index`, evenly spaced."""
    return index[:: -(-len(index) // n)]


def training_images(dataset: ImageDataset, index: torch.Tensor, device: torch.device):
    """Yield (indices, images in [-1,1]) of the training images `index`, CHUNK at a time."""
    for chunk in index.split(CHUNK):
        yield chunk, to_float(dataset.images(chunk).to(device))
