"""Inception score from class probabilities (Salimans et al. 2016, "Improved techniques for training GANs", sec. 4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from metrics.fid import as_float64

__all__ = ["IS_SPLIT", "inception_score"]

IS_SPLIT = 5000  # images a split, as published scores of 50,000 images in 10 splits have it


def inception_score(probs: Any, split: int = IS_SPLIT) -> float:
    """exp E KL(p(y given x) to p(y)) of class probabilities [N,C], averaged over splits of `split` images.

    A last partial split counts like the others, and 0 ln 0 = 0. Raises ValueError without images.
    """
    probs = as_float64(probs)
    if not len(probs):
        raise ValueError("an inception score needs at least 1 image")
    scores = []
    for start in range(0, len(probs), split):
        p = probs[start : start + split]
        marginal = np.broadcast_to(p.mean(axis=0), p.shape)
        # Where p is 0 the ratio is 1 and the term 0; where p is not, the marginal is not either.
        ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
        scores.append(np.exp((p * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))
