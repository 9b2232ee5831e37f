"""Inception score from class probabilities: Salimans et al. 2016, "Improved techniques for training GANs", sec. 4."""

from __future__ import annotations

from typing import Any

import numpy as np

from metrics.fid import as_float64

__all__ = ["IS_SPLIT", "MIN_SPLIT", "inception_score"]

IS_SPLIT = 5000  # images per split; published scores use 50,000 images in 10 splits
MIN_SPLIT = 100  # smaller splits give a much lower score; who asks for them may mean the number of splits


def inception_score(probs: Any, split: int = IS_SPLIT, seed: int | None = None) -> float:
    """Return exp E KL(p(y | x) || p(y)) of class probabilities [N,C], averaged over splits of `split` images.

    A smaller last split counts like the others, and 0 ln 0 = 0. `seed` permutes the images first, so that no split
    holds other classes than the next one because images are sorted by class; None keeps their order. Raise ValueError
    without images.
    """
    probs = as_float64(probs)
    if seed is not None and len(probs) > split:
        probs = probs[np.random.default_rng(seed).permutation(len(probs))]
    if not len(probs):
        raise ValueError("an inception score needs at least 1 image")
    scores = []
    for start in range(0, len(probs), split):
        p = probs[start : start + split]
        marginal = np.broadcast_to(p.mean(axis=0), p.shape)
        # Where p is 0, the ratio becomes 1 and the term 0. Where p is above 0, the marginal is too.
        ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
        scores.append(np.exp((p * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))
