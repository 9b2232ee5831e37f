"""Bootstrap intervals of metrics (Efron 1979): how far a value would move with other images of the same model.

The generated images are drawn again with replacement, counts [B,M] say how often each is in each draw, and the
metrics are computed from features and counts: no image and no feature is copied. The reference stays as it is.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LEVEL", "interval", "resample"]

LEVEL = 0.95


def resample(draws: int, count: int, labels: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """How often each of `count` images is in each of `draws` resampled sets, uint16 [draws,count].

    With `labels` [count] each class keeps its number of images: the classes were asked for, not drawn.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros([draws, count], dtype=np.uint16)
    for c in [None] if labels is None else np.unique(labels):
        members = np.arange(count) if c is None else np.flatnonzero(labels == c)
        for row in counts:
            row[members] = np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))
    return counts


def interval(value: float, replicates: np.ndarray) -> list[float]:
    """[low, high] around `value` that holds LEVEL of the replicates once their mean is moved to the value.

    The move matters: a draw with replacement has fewer different images, which shifts FID up and coverage down. What
    the replicates tell about is the spread.
    """
    moved = np.asarray(replicates) - np.mean(replicates) + value
    return np.quantile(moved, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
