"""Transport costs c(x_0, x_{t+1}): unbalanced transport leaves out expensive images (docs/methods/rduot.md)."""

from __future__ import annotations

import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from training.networks_resnet import Classifier
from training.noise_levels import LOWEST_SIGMA, DiffusionSteps

__all__ = ["COSTS", "TransportCost", "core", "cost_by_origin", "squared_distance"]

COSTS = ("pixels", "standardized", "features", "robust")
SAMPLE = 4096  # Statistics come from at most this many training images.
CHUNK = 512  # images that are processed at a time
MAX_PIXELS = 4096  # largest number of values per image: diagonalizing their covariance takes seconds
CORE = 0.75  # `robust`: share of the images that form the core
CORE_ROUNDS = 10  # largest number of rounds to find the core; a round takes 5 seconds for 32x32 RGB images
FREE = 4  # `robust`: twice the mean squared distance per axis between an image of the core and independent noise
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
    robust: the same with principal axes in place of pixels. Axes, means and deviations come from the core, the three
    quarters of the training images that are most alike (`core`), so outliers do not influence them ("robust distance":
    Rousseeuw and van Zomeren, JASA 1990). It is a mean, not a sum, and only the excess over FREE counts, so usual
    images cost nothing for any tau.

    Raises UserError if images have too many values for `robust`.
    """

    def __init__(self, kind: str, dataset: ImageDataset, steps: DiffusionSteps, device: torch.device):
        self.kind, self.net, self.axes = kind, None, None
        if kind == "features":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same network in every run
                net = Classifier(dataset.resolution, dataset.num_channels, 1, depth="small", channel_mult=(1, 2, 4))
                # For training these layers start near zero. Features need their output.
                for block in (block for stage in net.stages for block in stage):
                    block.conv1.weight.data *= 100
            self.net = net.eval().requires_grad_(False).to(device)
        index = spread(torch.arange(len(dataset)), SAMPLE)
        if kind == "robust":
            index, self.axes = robust_axes(dataset, index, device)
        if kind != "pixels":
            self.mean, self.std = self._measure(dataset, index, steps, device)

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
        start = (self._embed(x_0) - self.mean[0]) / self.std[0]
        end = (self._embed(x_next) - self.mean[t + 1]) / self.std[t + 1]
        c = squared_distance(start, end, t)
        return (c / start.shape[1] - FREE).clamp(min=0) if self.kind == "robust" else c


def robust_axes(dataset: ImageDataset, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the core of the training images `index` and its principal axes, the columns of [C H W, C H W].

    Raises UserError if images have more than MAX_PIXELS values.
    """
    n = dataset.num_channels * dataset.resolution**2
    if n > MAX_PIXELS:
        raise dnnlib.UserError(
            f"the robust cost would be too slow: {dataset.name} has {n:,} values per image, more than {MAX_PIXELS:,}; "
            "choose another cost"
        )
    images = [x_0.flatten(1) for _, x_0 in training_images(dataset, index, torch.device("cpu"))]
    members, axes = core(torch.cat(images).to(torch.float64))
    return index[members], axes.to(device, torch.float32)


def core(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the core of the rows x [N,d], bool [N], and its principal axes [d,d] in columns.

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


@torch.no_grad()
def cost_by_origin(
    cost: TransportCost, dataset: ImageDataset, steps: DiffusionSteps, device: torch.device
) -> tuple[float, float] | None:
    """Return the mean costs of clean training images and of outliers at random t, or None if there are not both."""
    if dataset.outliers is None or dataset.outliers.all() or not dataset.outliers.any():
        return None
    generator = torch.Generator(device).manual_seed(0)
    totals, counts = [0.0, 0.0], [0, 0]
    outliers = torch.from_numpy(dataset.outliers)
    index = torch.cat([spread(mask.nonzero().flatten(), SAMPLE // 2) for mask in (~outliers, outliers)])
    for chunk, x_0 in training_images(dataset, index, device):
        t = torch.randint(steps.num_timesteps, [len(x_0)], generator=generator, device=device)
        noise = [torch.randn(x_0.shape, generator=generator, device=device) for _ in range(2)]
        c = cost(x_0, steps.pair(x_0, t, *noise)[1], t)
        outlier = outliers[chunk].to(device)
        for origin in (0, 1):
            totals[origin] += float(c[outlier == origin].sum())
            counts[origin] += int((outlier == origin).sum())
    return totals[0] / counts[0], totals[1] / counts[1]


def spread(index: torch.Tensor, n: int) -> torch.Tensor:
    """Return at most `n` of the entries of `index`, evenly spaced."""
    return index[:: -(-len(index) // n)]


def training_images(dataset: ImageDataset, index: torch.Tensor, device: torch.device):
    """Yield (indices, images in [-1,1]) of the training images `index`, CHUNK at a time."""
    for chunk in index.split(CHUNK):
        yield chunk, to_float(dataset.images(chunk).to(device))
