"""The core of a set of points: the share that lies closest together, with its mean and its principal axes.

Points outside the core have no say in mean and axes, so foreign points cannot hide behind a scatter of their own making
("robust distance": Rousseeuw and van Zomeren, JASA 1990). NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Core", "find_core", "whitened"]

ROUNDS = 20  # largest number of concentration steps from one start
FLOOR = 0.1  # smallest deviation, relative to the mean deviation: where points are all alike, it says too little


@dataclass
class Core:
    """Which of N points in d dimensions form the core, and what they look like."""

    members: np.ndarray  # bool [N]
    mean: np.ndarray  # float64 [d]
    axes: np.ndarray  # float64 [d,d], the principal axes of the members in columns
    std: np.ndarray  # float64 [d], the members' standard deviations along the axes, not below a floor

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distances [n] of points [n,d], as root mean squares over the axes."""
        return np.sqrt(np.square(((x - self.mean) @ self.axes) / self.std).mean(axis=1))


def find_core(x: np.ndarray, share: float = 0.75, starts: int = 4, seed: int = 0) -> Core:
    """Return the core of the points x [N,d], which holds the `share` of them that have the smallest scatter.

    Concentration steps of FAST-MCD find it (Rousseeuw and Van Driessen, Technometrics 1999): the next members are the
    points nearest to the present ones. They start from the points nearest to the median, from all points, and from
    `starts` small random subsets. The start that ends with the smallest determinant counts.
    """
    x = np.asarray(x, dtype=np.float64)
    rng = np.random.default_rng(seed)
    center = np.median(x, axis=0)
    spread = np.median(np.abs(x - center), axis=0)
    near = np.square((x - center) / np.maximum(spread, max(FLOOR * spread.mean(), 1e-9))).sum(axis=1)
    first = [near <= np.quantile(near, 0.5), np.ones(len(x), dtype=bool)]
    for _ in range(starts):
        members = np.zeros(len(x), dtype=bool)
        members[rng.permutation(len(x))[: x.shape[1] + 1]] = True
        first.append(members)
    found = [_concentrate(x, members, share) for members in first]
    return min(found, key=lambda core: np.log(core.std).sum())


def whitened(x: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points x [N,d] in deviations of the `members` (bool [N]) along their principal axes; mean and map to it.

    The points are (x - mean) @ map.
    """
    found = _describe(x, members)
    return ((x - found.mean) @ found.axes) / found.std, found.mean, found.axes / found.std


def _concentrate(x: np.ndarray, members: np.ndarray, share: float) -> Core:
    for _ in range(ROUNDS):
        core = _describe(x, members)
        distance = core.distance(x)
        nearest = distance <= np.quantile(distance, share)
        if (nearest != members).sum() <= len(x) / 1000:
            break
        members = nearest
    return _describe(x, members)


def _describe(x: np.ndarray, members: np.ndarray) -> Core:
    variances, axes = np.linalg.eigh(np.cov(x[members].T, bias=True).reshape(x.shape[1], -1))
    std = np.sqrt(np.maximum(variances, 0))
    return Core(members, x[members].mean(axis=0), axes, np.maximum(std, max(FLOOR * std.mean(), 1e-9)))
