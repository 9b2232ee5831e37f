"""What it costs to carry x_{t+1} to an image x_0: the price that unbalanced transport refuses to pay for outliers."""

from __future__ import annotations

import torch

import dnnlib
from training.dataset import ImageDataset
from training.diffusion_steps import DiffusionSteps
from training.noise_levels import LOWEST_SIGMA
from training.resnet import Classifier

__all__ = ["COSTS", "TransportCost", "cost_by_origin", "squared_distance"]

COSTS = ("pixels", "standardized", "whitened", "features")
SAMPLE = 4096           # training images at most that statistics are taken from
CHUNK = 512             # of them at a time
MAX_PIXELS = 4096       # values an image whose covariance we diagonalise: seconds


def squared_distance(x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """||x_0 - x_{t+1}||^2 [N], summed over pixels (Dao et al. 2024); `t` does not matter."""
    return (x_0 - x_next).square().flatten(1).sum(dim=1)


class TransportCost:
    """c(x_0, x_{t+1}) [N] of images [N,C,H,W] in [-1,1], t [N] in 0..T-1.

    pixels: the squared distance. It makes images of large norm expensive, whatever the training set.
    standardized: the same once each pixel of x_0, and of x_{t+1}, has the training set's mean 0 and deviation 1 (at
    that noise level), so that what is rare in the training set is expensive.
    whitened: likewise along the principal axes of the training set in place of pixels.
    features: likewise with the features of a frozen network of random weights in place of pixels.
    """

    def __init__(self, kind: str, dataset: ImageDataset, steps: DiffusionSteps, device: torch.device):
        self.kind, self.net, self.axes = kind, None, None
        if kind == "features":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)    # the same network in every run
                net = Classifier(dataset.resolution, dataset.num_channels, 1, depth="small", channel_mult=(1, 2, 4))
                # Its last layers begin at almost nothing, for training's sake; features need them.
                for block in (block for stage in net.stages for block in stage):
                    block.conv1.weight.data *= 100
            self.net = net.eval().requires_grad_(False).to(device)
        if kind == "whitened":
            self.axes = principal_axes(dataset, device)
        if kind != "pixels":
            self.mean, self.std = self._measure(dataset, steps, device)

    @torch.no_grad()
    def _measure(self, dataset: ImageDataset, steps: DiffusionSteps, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Mean and deviation [T+1,features] of the training set at x_0, x_1, ..., x_T."""
        generator = torch.Generator(device).manual_seed(0)
        mean, std = [], []
        for k in range(steps.num_timesteps + 1):
            values = []
            for _, x_0 in training_images(dataset, device):
                noise = torch.randn(x_0.shape, generator=generator, device=device)
                t = torch.full([len(x_0)], k, device=device)
                values.append(self._embed(steps.diffuse(x_0, t, noise) if k else x_0))
            values = torch.cat(values)
            mean.append(values.mean(dim=0))
            # Where images are all alike the deviation is no measure: not below a tenth of the average one.
            deviation = values.std(dim=0, correction=0)
            std.append(deviation.clamp(min=max(0.1 * float(deviation.mean()), 1e-6)))
        return torch.stack(mean), torch.stack(std)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        if self.net is not None:
            return self.net.features(x, torch.tensor(LOWEST_SIGMA))
        return x.flatten(1) if self.axes is None else x.flatten(1) @ self.axes

    def __call__(self, x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.kind == "pixels":
            return squared_distance(x_0, x_next, t)
        start = (self._embed(x_0) - self.mean[0]) / self.std[0]
        end = (self._embed(x_next) - self.mean[t + 1]) / self.std[t + 1]
        return squared_distance(start, end, t)


def principal_axes(dataset: ImageDataset, device: torch.device) -> torch.Tensor:
    """Eigenvectors [C H W, C H W], in columns, of the covariance of the training images' pixels.

    UserError: more than MAX_PIXELS values an image.
    """
    n = dataset.num_channels * dataset.resolution**2
    if n > MAX_PIXELS:
        raise dnnlib.UserError(f"--cost=whitened: {dataset.name} has {n:,} values an image, more than {MAX_PIXELS:,}; "
                               "choose another cost")
    images = torch.cat([x_0.flatten(1) for _, x_0 in training_images(dataset, device)]).to("cpu", torch.float64)
    return torch.linalg.eigh(images.T.cov())[1].to(device, torch.float32)


@torch.no_grad()
def cost_by_origin(cost: TransportCost, dataset: ImageDataset, steps: DiffusionSteps,
                   device: torch.device) -> tuple[float, float] | None:
    """Mean cost of the clean training images and of the outliers at random t; None when there are not both."""
    if dataset.outliers is None or dataset.outliers.all() or not dataset.outliers.any():
        return None
    generator = torch.Generator(device).manual_seed(0)
    totals, counts = [0.0, 0.0], [0, 0]
    for index, x_0 in training_images(dataset, device, torch.from_numpy(dataset.outliers)):
        t = torch.randint(steps.num_timesteps, [len(x_0)], generator=generator, device=device)
        noise = [torch.randn(x_0.shape, generator=generator, device=device) for _ in range(2)]
        c = cost(x_0, steps.pair(x_0, t, *noise)[1], t)
        outlier = torch.from_numpy(dataset.outliers)[index].to(device)
        for origin in (0, 1):
            totals[origin] += float(c[outlier == origin].sum())
            counts[origin] += int((outlier == origin).sum())
    return totals[0] / counts[0], totals[1] / counts[1]


def training_images(dataset: ImageDataset, device: torch.device, outliers: torch.Tensor | None = None):
    """Yield (indices, images in [-1,1]) of at most SAMPLE images, spread over the set, or over clean and `outliers`."""
    parts = [torch.arange(len(dataset))]
    if outliers is not None:
        parts = [parts[0][~outliers], parts[0][outliers]]
    index = torch.cat([part[:: -(-len(part) * len(parts) // SAMPLE)] for part in parts])
    for chunk in index.split(CHUNK):
        yield chunk, dataset.images(chunk).to(device).to(torch.float32) / 127.5 - 1
