"""What unbalanced transport leaves out, from the costs of the training images alone.

Where x_{t+1} says nothing about x_0, the potential is k + tau c on images that are made at the optimum, and an image of
cost c is made w(c) times as often as it is in the data (docs/methods/rduot.md, "What is left out"):

    w(c) = Psi2*'(-k - tau c) / Psi1*'(k),    k such that the mean of w over the data is 1

Whether the costs form two groups needs no truth either: there is a valley between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Group", "Selection", "describe_costs", "expensive_group", "is_clean"]

LEAST = 20  # images of a group; fewer may be an accident
VALLEY = 0.5  # a valley is at most this high, relative to the lower one of the tops beside it
GRID, BINS, WIDTH = 512, 12, 40  # points of the density; bins of the histogram, and the length of its longest bar
MUCH = 0.3  # a share to warn about
TAIL = 0.025  # share that the robust cost leaves out of clean sets, at most (docs/methods/rduot.md)

Slope = Callable[[torch.Tensor], torch.Tensor]


class Selection:
    """w(c) of images of cost c, once it has seen the costs of training images.

    `slope1`, `slope2`: the derivatives of Psi1*, Psi2*.
    """

    def __init__(self, costs: np.ndarray, tau: float, slope1: Slope, slope2: Slope):
        self.tau, self.slope1, self.slope2 = tau, slope1, slope2
        costs = torch.from_numpy(np.ascontiguousarray(costs, dtype=np.float64))
        low, high = -50.0 - tau * float(costs.max()), 50.0
        for _ in range(100):  # the mean of w falls as k rises
            self.k = (low + high) / 2
            low, high = (self.k, high) if self(costs).mean() > 1 else (low, self.k)

    def __call__(self, costs: torch.Tensor) -> torch.Tensor:
        """Return w [n] of images of cost c [n]."""
        one = torch.full_like(costs, self.k)
        return self.slope2(-one - self.tau * costs) / self.slope1(one).clamp(min=1e-30)

    def draw(self, costs: np.ndarray, seed: int) -> np.ndarray:
        """Return which images of these costs [N] stay, bool [N]: each one with probability w / max w."""
        w = self(torch.from_numpy(costs)).numpy()
        return np.random.default_rng(seed % 2**32).random(len(w)) * w.max() < w


@dataclass
class Group:
    """The expensive ones among N images, apart from the others."""

    above: float  # the least value of the group
    share: float  # of the images


def expensive_group(values: np.ndarray) -> Group | None:
    """Return the group of the largest ones among values [N] that a valley of their density separates, or None.

    The density is a sum of normal densities, as wide as Silverman's rule says. The group has at least LEAST images, and
    less than half of all. Of several valleys, the lowest one counts.
    """
    low, high = np.quantile(values, [0.25, 0.75])
    width = 0.9 * min(float(values.std()), (high - low) / 1.34 or np.inf) * len(values) ** -0.2
    if width <= 1e-9 * np.abs(values).max():  # all are alike, up to rounding: copies of each other
        return None
    grid = np.linspace(values.min() - 3 * width, values.max() + 3 * width, GRID)
    step = grid[1] - grid[0]
    counts = np.histogram(values, bins=np.append(grid - step / 2, grid[-1] + step / 2))[0]
    reach = int(np.ceil(4 * width / step))
    density = np.convolve(counts, np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / width) ** 2), mode="same")
    # The highest top on either side of each point, and how many values lie above it.
    left, right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    number = counts[::-1].cumsum()[::-1]
    depth = density / np.maximum(np.minimum(left, right), 1e-300)
    allowed = (number >= LEAST) & (number < len(values) / 2) & (depth < VALLEY)
    if not allowed.any():
        return None
    above = float(grid[np.where(allowed, depth, np.inf).argmin()])
    return Group(above, float((values > above).mean()))


def _expected_share(weights: np.ndarray) -> float:
    """Return which share of images with these weights [N] a selection leaves out."""
    return 1 - float(weights.mean() / max(weights.max(), 1e-30))


def is_clean(weights: np.ndarray, values: np.ndarray) -> bool:
    """Return whether nothing says that images are foreign: a small share is expensive, and no group is apart.

    The arguments are those of `describe_costs`.
    """
    return _expected_share(weights) <= TAIL and expensive_group(values) is None


def describe_costs(costs: np.ndarray, weights: np.ndarray, values: np.ndarray) -> tuple[list[str], dict[str, float]]:
    """Return lines about the costs [N] of training images, and the same as numbers by name.

    `weights` [N]: of a `Selection`; `values` [N]: what the costs come from, before a limit below which nothing
    costs. The lines are a histogram of the values, whether they form two groups, and the share expected to be left out.
    """
    edges = np.unique(np.linspace(*np.quantile(values, [0.005, 0.995]), BINS - 1))
    shares = np.histogram(values, bins=np.array([-np.inf, *edges, np.inf]))[0] / len(values)
    names = [*(f"up to {edge:.3g}" for edge in edges), "above"]
    bars = ["#" * round(WIDTH * share) or ("." if share else "") for share in shares]
    lines = [f"  {name:>14s} {share:7.2%} {bar}" for name, share, bar in zip(names, shares, bars, strict=True)]
    group = expensive_group(values)
    left_out = _expected_share(weights)
    lines.append("  They form one group.")
    if group is not None:
        apart = f"{group.share:.1%} of the images, above {group.above:.3g}, are apart from the others"
        lines[-1] = f"  They form two groups: {apart}."
    lines.append(f"  Expected to be left out at this tau: {left_out:.1%} of the images.")
    if left_out > MUCH:
        lines.append("  Warning: that is a large share; a smaller tau or another cost keeps more")
    numbers = dict(mean=float(costs.mean()), left_out=left_out, group=0.0 if group is None else group.share)
    numbers |= {f"quantile_{q}": float(np.quantile(costs, q / 100)) for q in (50, 90, 95, 99)}
    return lines, numbers | {f"bin_{i:02d}": float(share) for i, share in enumerate(shares)}
