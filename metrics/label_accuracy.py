"""Label accuracy: the share of generated images that show the class they were asked for.

A judge decides which class an image shows. It learned from clean labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn.svm

from metrics.fid import as_float64

__all__ = ["SvmJudge", "label_accuracy"]

HELD_OUT = 0.2  # share of the reference that measures the judge
MAX_IMAGES = 5000  # more are too slow, since an SVM's time grows with the square of their number
PENALTY = 10.0  # C of the SVM


def label_accuracy(judged: Any, requested: Any) -> float:
    """Return the share of images whose judged class [N] is the requested one [N]. Raise ValueError without images."""
    judged, requested = np.asarray(judged), np.asarray(requested)
    if not len(judged):
        raise ValueError("label accuracy needs at least 1 image")
    return float(np.mean(judged == requested))


class SvmJudge:
    """Support-vector machine (SVM) with a Gaussian kernel, trained on features [N,d] and their clean labels [N].

    At most `max_images` are used, chosen by `seed`. `held_out` of them measure the `accuracy` of an SVM that is fitted
    on the rest; `tried` are the classes that it sees in them, and their own. Then the SVM that judges is fitted on all
    `fitted` images, which have these `classes`.

    If `balanced`, each class has the same weight in the fit and in `accuracy`, however rare it is. A rare class also
    has its share among the held-out images, and if there are too many images, the common classes lose some first.

    Raise ValueError if the images to fit have fewer than 2 classes.
    """

    def __init__(self, features: Any, labels: Any, seed: int = 0, max_images: int = MAX_IMAGES, balanced: bool = False):
        self._balanced = balanced
        chosen = np.random.RandomState(seed).permutation(len(features))
        if balanced:
            rank, _ = _ranks(np.asarray(labels)[chosen])
            chosen = chosen[np.argsort(rank, kind="stable")][:max_images]
            rank, size = _ranks(np.asarray(labels)[chosen])
            chosen = chosen[np.argsort((rank + 0.5) / size, kind="stable")]  # spreads every class evenly
        chosen = chosen[:max_images]
        x, y = as_float64(features[chosen]), np.asarray(labels)[chosen]
        self.held_out = max(round(HELD_OUT * len(x)), 1)
        if len(np.unique(y[self.held_out :])) < 2:
            raise ValueError("a judge needs reference images of at least 2 classes")
        right = y[: self.held_out]
        judged = self._fit(x[self.held_out :], y[self.held_out :]).predict(x[: self.held_out])
        parts = [right == c for c in np.unique(right)] if balanced else [slice(None)]
        self.tried = judged, right
        self.accuracy = float(np.mean([label_accuracy(judged[part], right[part]) for part in parts]))
        self.fitted, self.classes = len(x), np.unique(y)
        self._machine = self._fit(x, y)

    def _fit(self, x: np.ndarray, y: np.ndarray) -> sklearn.svm.SVC:
        weight = "balanced" if self._balanced else None
        return sklearn.svm.SVC(C=PENALTY, gamma="scale", kernel="rbf", class_weight=weight).fit(x, y)

    def predict(self, features: Any) -> np.ndarray:
        """Return the classes [N] of features [N,d]."""
        return self._machine.predict(as_float64(features))


def _ranks(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each label how many equal ones come before it, and how many equal ones there are."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[np.argsort(classes, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return rank, counts[classes]
