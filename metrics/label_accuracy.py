"""Label accuracy: the share of generated images that a judge, trained on clean labels, gives the class asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn.svm

from metrics.fid import as_float64

__all__ = ["SvmJudge", "label_accuracy"]

HELD_OUT = 0.2  # share of the reference that measures the judge
MAX_IMAGES = 5000  # an SVM's time grows with the square of the images; more of them is a task for a classifier
PENALTY = 10.0  # C of the SVM


def label_accuracy(judged: Any, requested: Any) -> float:
    """Share of images whose judged class [N] is the requested one [N]. Raises ValueError without images."""
    judged, requested = np.asarray(judged), np.asarray(requested)
    if not len(judged):
        raise ValueError("label accuracy needs at least 1 image")
    return float(np.mean(judged == requested))


class SvmJudge:
    """Support-vector machine with a Gaussian kernel on features [N,d] and their clean labels [N] of at least 2 classes.

    `accuracy`: measured on `held_out` images before the machine that judges is fitted on all `fitted` of them (at most
    `max_images`, chosen by `seed`). `balanced`: a rare class weighs as much as the others in the fit and in `accuracy`,
    has its share among the held-out, and goes first when there are more than `max_images`. Raises ValueError for a
    reference that cannot train one.
    """

    def __init__(self, features: Any, labels: Any, seed: int = 0, max_images: int = MAX_IMAGES, balanced: bool = False):
        self._balanced = balanced
        chosen = np.random.RandomState(seed).permutation(len(features))
        if balanced:
            rank, _ = _ranks(np.asarray(labels)[chosen])
            chosen = chosen[np.argsort(rank, kind="stable")][:max_images]
            rank, size = _ranks(np.asarray(labels)[chosen])
            chosen = chosen[np.argsort((rank + 0.5) / size, kind="stable")]  # every class spread evenly over the whole
        chosen = chosen[:max_images]
        x, y = as_float64(features[chosen]), np.asarray(labels)[chosen]
        self.held_out = max(round(HELD_OUT * len(x)), 1)
        if len(np.unique(y[self.held_out :])) < 2:
            raise ValueError("a judge needs reference images of at least 2 classes")
        judged, right = (
            self._fit(x[self.held_out :], y[self.held_out :]).predict(x[: self.held_out]),
            y[: self.held_out],
        )
        parts = [right == c for c in np.unique(right)] if balanced else [slice(None)]
        self.accuracy = float(np.mean([label_accuracy(judged[part], right[part]) for part in parts]))
        self.fitted = len(x)
        self._machine = self._fit(x, y)

    def _fit(self, x: np.ndarray, y: np.ndarray) -> sklearn.svm.SVC:
        weight = "balanced" if self._balanced else None
        return sklearn.svm.SVC(C=PENALTY, gamma="scale", kernel="rbf", class_weight=weight).fit(x, y)

    def predict(self, features: Any) -> np.ndarray:
        """Classes [N] of features [N,d]."""
        return self._machine.predict(as_float64(features))


def _ranks(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each label: how many of the same come before it, and how many there are."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[np.argsort(classes, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return rank, counts[classes]
