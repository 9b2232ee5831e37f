"""Bootstrap intervals of metrics: how far a value would move with other images of the same model.

Efron 1979, "Bootstrap methods: another look at the jackknife". The generated images are drawn again with replacement,
B times. Counts [B,M] say how often each of the M images is in each draw. The metrics take features and counts, so no
image and no feature is copied. The reference stays as it is.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LEVEL", "interval", "resample"]

LEVEL = 0.95  # share of the replicates inside an interval


def resample(draws: int, count: int, labels: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return how often each of `count` images is in each of `draws` resampled sets, uint16 [draws,count].

    With `labels` [count], each class keeps its number of images, because the user chose the classes.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros([draws, count], dtype=np.uint16)
    for c in [None] if labels is None else np.unique(labels):
        members = np.arange(count) if c is None else np.flatnonzero(labels == c)
        for row in counts:
            row[members] = np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))
    return counts


def interval(value: float, replicates: np.ndarray) -> list[float]:
    """Return [low, high], which contains LEVEL of the replicates [B] after their mean has been moved to `value`.

    The move matters: a draw with replacement has fewer different images, which shifts FID up and coverage down. Only
    the spread of the replicates is meaningful.
    """
    moved = np.asarray(replicates) - np.mean(replicates) + value
    return np.quantile(moved, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
