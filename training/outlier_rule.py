"""Images that do not belong: left out, or learned where noise hides what they are (docs/methods/posterior.md).

    drop      outliers are left out
    ambient   an outlier y_i teaches at the noise levels sigma >= sigma_i, where nobody can tell it from clean images

Nobody can tell a noisy outlier x = y_i + sigma n where the best classifier of clean images and outliers, both equally
common, gives P(clean | x, sigma) >= LIMIT. For known images it has a closed form, since noise turns a set into a
mixture of Gaussians:

    P(clean | x, sigma) = p_0(x) / (p_0(x) + p_1(x)),    p(x) = mean over j of N(x; y_j, sigma^2 I)

p_0: over clean images; p_1: over the other outliers. sigma_i is the least level from which on this holds on average
over n. Rule and limit: Daras et al., "Ambient Diffusion Omni", NeurIPS 2025, who train a classifier instead.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from torch_utils import distributed
from torch_utils.precision import widest
from torch_utils.training_stats import Stats

__all__ = ["MODES", "OutlierRule", "clean_probability", "common_items"]

MODES = ("keep", "drop", "ambient")
LIMIT = 0.45  # least probability of being clean; noise without end gives 0.5
LEVELS = torch.logspace(math.log10(0.02), math.log10(80), 32)  # candidates for sigma_i
ANCHORS = 1024  # clean images, and as many outliers, that stand for theirs
NOISES = 4  # draws of n
CHUNK = 64  # outliers at a time: memory for CHUNK x 2 ANCHORS x LEVELS numbers, and for 2 ANCHORS images


class OutlierRule:
    """What becomes of the outliers among the items of a data set, by the rule `mode`, 'drop' or 'ambient'.

    `outliers` bool [N]. UserError: no other image is left.
    """

    def __init__(self, dataset: ImageDataset, outliers: np.ndarray, mode: str, device: torch.device):
        self.mode = mode
        self.outliers = torch.from_numpy(np.ascontiguousarray(outliers)).to(device)
        self.train_indices = torch.from_numpy(np.flatnonzero(~outliers)) if mode == "drop" else None
        if outliers.all():
            raise dnnlib.UserError(f"{dataset.path}: every image is an outlier")
        self.least = torch.zeros(len(outliers), device=device)  # sigma_i; 0 for clean images
        if mode == "ambient" and outliers.any():
            found = distributed.from_rank0(lambda: least_levels(dataset, outliers, device).cpu())
            self.least[self.outliers] = found.to(device)

    def weight(self, sigma: torch.Tensor, items: torch.Tensor, stats: Stats) -> torch.Tensor:
        """Return 1 where an image teaches at its noise level, else 0, float32 in the shape of `sigma` [n,...]."""
        if self.mode == "drop":  # none of the images is an outlier
            return torch.ones_like(sigma)
        teaches = sigma.flatten() >= self.least[items]
        stats.add("Outliers/used", teaches.float(), self.outliers[items])
        return teaches.reshape(sigma.shape).to(sigma.dtype)

    def notes(self) -> list[str]:
        """Return a line that says what becomes of the outliers."""
        count = int(self.outliers.sum())
        line = f"Outliers: {count:,} of {len(self.outliers):,} images"
        if self.mode == "drop" or not count:
            return [f"{line}, which are left out." if count else f"{line}."]
        levels = self.least[self.outliers].cpu().numpy()
        low, middle, high = np.quantile(levels, [0.25, 0.5, 0.75], method="nearest")
        return [
            f"{line}. They teach from noise level {middle:.2g} on (median; quartiles {low:.2g} and {high:.2g}); "
            f"{np.isinf(levels).sum():,} of them never."
        ]


def common_items(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """Return the items that are in all `parts`, int64, ascending; None stands for all items. UserError: none are."""
    known = [part.numpy() for part in parts if part is not None]
    if not known:
        return None
    items = functools.reduce(np.intersect1d, known)
    if not len(items):
        raise dnnlib.UserError("no image is left: each one is an outlier or has a label that is left out")
    return torch.from_numpy(items)


def clean_probability(
    y: torch.Tensor, noises: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor, outliers: torch.Tensor
) -> torch.Tensor:
    """Return P(clean | y + sigma n, sigma), averaged over K draws of n: [n,levels].

    y [n,d]: images; `noises` [K,n,d]; `sigma` [levels]. `clean` [a,d] and `outliers` [b,d] stand for the two sets. An
    outlier that equals y, which is y itself or a copy, does not count; without any other, P is 0.
    """

    def log_densities(anchors: torch.Tensor, others: bool) -> torch.Tensor:
        square = y.square().sum(dim=1, keepdim=True) + anchors.square().sum(dim=1) - 2 * y @ anchors.T
        counted = square > 1e-6 if others else torch.ones_like(square, dtype=torch.bool)
        square = square.masked_fill(~counted, math.inf)[:, None]
        found = []
        for noise in noises:
            # ||y + sigma n - y_j||^2, up to sigma^2 ||n||^2, which cancels
            along = ((noise * y).sum(dim=1, keepdim=True) - noise @ anchors.T)[:, None]
            found.append((-square / (2 * sigma[:, None] ** 2) - along / sigma[:, None]).logsumexp(dim=2))
        log_p = torch.stack(found) - counted.sum(dim=1).clamp(min=1).log()[:, None]
        return log_p.masked_fill(~counted.any(dim=1)[:, None], math.inf)

    y, noises, sigma, clean, outliers = (x.to(widest(x.device)) for x in (y, noises, sigma, clean, outliers))
    return torch.sigmoid(log_densities(clean, False) - log_densities(outliers, True)).mean(dim=0)


@torch.no_grad()
def least_levels(dataset: ImageDataset, outliers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return sigma_i of each outlier, float32 [number of outliers]; infinite where noise never hides it."""
    rng = np.random.default_rng(0)
    mine, others = np.flatnonzero(outliers), np.flatnonzero(~outliers)
    count = min(ANCHORS, len(mine), len(others))  # equal numbers: more images would come nearer to any point

    def images(items: np.ndarray) -> torch.Tensor:
        return to_float(dataset.images(items).to(device)).flatten(1).to(widest(device))

    anchors = [images(np.sort(rng.permutation(items)[:count])) for items in (others, mine)]
    generator, sigma = torch.Generator(device).manual_seed(0), LEVELS.to(device)
    found = []
    for start in range(0, len(mine), CHUNK):
        y = images(mine[start : start + CHUNK])
        p = clean_probability(y, torch.randn([NOISES, *y.shape], generator=generator, device=device), sigma, *anchors)
        hidden = (p >= LIMIT).flip(1).cumprod(dim=1).sum(dim=1)  # levels in a row, from the highest down
        levels = torch.cat([sigma, sigma.new_tensor([math.inf])])
        found.append(levels[len(sigma) - hidden])
    return torch.cat(found)
