"""Label accuracy: the share of generated images that a judge, trained on clean labels, gives the class asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn.svm

from metrics.frechet import as_float64

__all__ = ["SvmJudge", "label_accuracy"]

HELD_OUT = 0.2      # share of the reference that measures the judge
MAX_IMAGES = 5000   # an SVM's time grows with the square of the images; more of them is a task for a classifier
PENALTY = 10.0      # C of the SVM


def label_accuracy(judged: Any, requested: Any) -> float:
    """Share of images whose judged class [N] is the requested one [N]. Raises ValueError without images."""
    judged, requested = np.asarray(judged), np.asarray(requested)
    if not len(judged):
        raise ValueError("label accuracy needs at least 1 image")
    return float(np.mean(judged == requested))


class SvmJudge:
    """Support-vector machine with a Gaussian kernel on features [N,d] and their clean labels [N] of at least 2 classes.

    `accuracy`: measured on `held_out` images before the machine that judges is fitted on all `fitted` of them (at most
    `max_images`, chosen by `seed`). Raises ValueError for a reference that cannot train one.
    """

    def __init__(self, features: Any, labels: Any, seed: int = 0, max_images: int = MAX_IMAGES):
        chosen = np.random.RandomState(seed).permutation(len(features))[:max_images]
        x, y = as_float64(features[chosen]), np.asarray(labels)[chosen]
        self.held_out = max(round(HELD_OUT * len(x)), 1)
        if len(np.unique(y[self.held_out:])) < 2:
            raise ValueError("a judge needs reference images of at least 2 classes")
        self.accuracy = label_accuracy(
            self._fit(x[self.held_out:], y[self.held_out:]).predict(x[:self.held_out]), y[:self.held_out])
        self.fitted = len(x)
        self._machine = self._fit(x, y)

    @staticmethod
    def _fit(x: np.ndarray, y: np.ndarray) -> sklearn.svm.SVC:
        return sklearn.svm.SVC(C=PENALTY, gamma="scale", kernel="rbf").fit(x, y)

    def predict(self, features: Any) -> np.ndarray:
        """Classes [N] of features [N,d]."""
        return self._machine.predict(as_float64(features))
